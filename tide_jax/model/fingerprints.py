"""Names for models that are made of their numbers: what a router file is tied to.

A hash of the architecture and of a few values of every parameter, rounded to bfloat16, taken at even distances of the
shape that the parameter is known by. The values can be collected while parameters are read or written, a piece at a
time: so a model whose weights become 8-bit integers keeps the name of the floats that they were.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from tide_jax.model.architecture import DecoderConfig

_SAMPLES = 16
_UNNAMED = ("model_type", "eos_token_ids", "pad_token_id", "generation")  # fields that change no state


def sampled_places(shape: tuple[int, ...], input_axes: int) -> tuple[np.ndarray, ...]:
    """An index into a parameter as it is kept, ``shape`` with `input_axes` trailing axes that lead in its known one."""
    outputs = len(shape) - input_axes
    places = np.linspace(0, max(0, int(np.prod(shape)) - 1), _SAMPLES).astype(np.int64)
    index = np.unravel_index(places, shape[outputs:] + shape[:outputs])
    return tuple(axis.astype(np.int32) for axis in index[input_axes:] + index[:input_axes])


def digest(config: DecoderConfig, samples: Mapping[str, np.ndarray]) -> str:
    """16 hexadecimal digits of an architecture and the sampled values of each parameter."""
    fields = dataclasses.asdict(config)
    for name in _UNNAMED:
        del fields[name]
    found = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for path in sorted(samples):
        found.update(samples[path].astype(ml_dtypes.bfloat16).tobytes())
    return found.hexdigest()[:16]


class Samples:
    """Sampled values of parameters that come a piece at a time.

    Args:
      shapes: of every parameter as it is kept.
      input_axes: trailing axes that lead in the known shape, where there are any.

    Attributes:
      paths: the parameters.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], input_axes: Mapping[str, int]) -> None:
        self.paths = frozenset(shapes)
        self._places = {path: sampled_places(shape, input_axes.get(path, 0)) for path, shape in shapes.items()}
        self._values = {path: np.zeros(_SAMPLES, ml_dtypes.bfloat16) for path in shapes}
        self._found = {path: np.zeros(_SAMPLES, np.bool_) for path in shapes}

    def take(self, path: str, slot: tuple[int | slice, ...], piece: np.ndarray) -> None:
        """Looks at `piece`, which fills ``parameter[slot]``: whole numbers and whole axes."""
        places = self._places[path]
        fixed = [(axis, index) for axis, index in enumerate(slot) if isinstance(index, int)]
        inside = np.ones(_SAMPLES, np.bool_)
        for axis, index in fixed:
            inside &= places[axis] == index
        free = [axis for axis in range(len(places)) if axis not in dict(fixed)]
        self._values[path][inside] = piece[tuple(places[axis][inside] for axis in free)].astype(ml_dtypes.bfloat16)
        self._found[path] |= inside

    def digest(self, config: DecoderConfig) -> str | None:
        """The fingerprint; None where a sampled value was not seen."""
        return digest(config, self._values) if all(found.all() for found in self._found.values()) else None

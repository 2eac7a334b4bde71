"""Fingerprints of models, computed from their weights; a router file is tied to one.

A fingerprint is a hash of the architecture and of a few values of every parameter, rounded to bfloat16. The values lie
at even distances in the parameter's known shape. They can be collected piece by piece while parameters are read or
written. So a model whose weights become 8-bit integers keeps the fingerprint of the original floats.
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
_UNNAMED = ("model_type", "eos_token_ids", "pad_token_id", "generation")  # fields that do not affect the computation


def sample_places(shape: tuple[int, ...], input_axes: int) -> tuple[np.ndarray, ...]:
    """An index into a stored parameter of `shape`; its `input_axes` trailing axes come first in the known shape."""
    outputs = len(shape) - input_axes
    places = np.linspace(0, max(0, int(np.prod(shape)) - 1), _SAMPLES).astype(np.int64)
    index = np.unravel_index(places, shape[outputs:] + shape[:outputs])
    return tuple(axis.astype(np.int32) for axis in index[input_axes:] + index[:input_axes])


def digest(config: DecoderConfig, samples: Mapping[str, np.ndarray]) -> str:
    """16 hexadecimal digits from an architecture and the sampled values of each parameter."""
    fields = dataclasses.asdict(config)
    for name in _UNNAMED:
        del fields[name]
    found = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for path in sorted(samples):
        found.update(samples[path].astype(ml_dtypes.bfloat16).tobytes())
    return found.hexdigest()[:16]


class Samples:
    """Collects sampled values from parameters that arrive in pieces.

    Args:
      shapes: stored shape of every parameter.
      input_axes: for kernels, the number of trailing axes that come first in the known shape.

    Attributes:
      paths: the parameters.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], input_axes: Mapping[str, int]) -> None:
        self.paths = frozenset(shapes)
        self._places = {path: sample_places(shape, input_axes.get(path, 0)) for path, shape in shapes.items()}
        self._values = {path: np.zeros(_SAMPLES, ml_dtypes.bfloat16) for path in shapes}
        self._found = {path: np.zeros(_SAMPLES, np.bool_) for path in shapes}

    def take(self, path: str, slot: tuple[int | slice, ...], piece: np.ndarray) -> None:
        """Takes the samples that lie in `piece`, which fills ``parameter[slot]``.

        `slot` consists of whole numbers and full slices.
        """
        places = self._places[path]
        fixed = [(axis, index) for axis, index in enumerate(slot) if isinstance(index, int)]
        # The piece contains a sample if the slot's fixed indices match; the other axes index into the piece.
        inside = np.ones(_SAMPLES, np.bool_)
        for axis, index in fixed:
            inside &= places[axis] == index
        free = [axis for axis in range(len(places)) if axis not in dict(fixed)]
        self._values[path][inside] = piece[tuple(places[axis][inside] for axis in free)].astype(ml_dtypes.bfloat16)
        self._found[path] |= inside

    def digest(self, config: DecoderConfig) -> str | None:
        """The fingerprint; None if a sampled value is missing."""
        return digest(config, self._values) if all(found.all() for found in self._found.values()) else None

"""Verifies that a written folder of 8-bit integers holds the numbers of its checkpoint.

Rounding itself moves logits, so logits do not reveal an error in one of many experts. The written numbers do. The
weight map says where each number of the source goes; there, integer times scale may differ by half a rounding step. The
step is computed from the source's numbers, so that a scale written too large does not widen the tolerance.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tide_jax.errors import TideError, shorten
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.decoder import summed_axes
from tide_jax.model.files.shards import ShardedTensors
from tide_jax.model.rounding import blocks, floats_of, scale_path

TOLERANCE = 0.501
"""In steps of ``max |w| / 127`` over the inputs of an output. Float32 products and quotients add an error of 1e-5
steps."""
_SMALLEST = float(np.finfo(np.float32).tiny)  # below it, floats have too few digits for the tolerance


def verify_weights(directory: Path, config: DecoderConfig, expected: Iterable[tuple[str, np.ndarray]]) -> None:
    """Reads a written folder and compares it with its source, one parameter at a time.

    Args:
      directory: the folder of 8-bit integers.
      config: the architecture.
      expected: every parameter, assembled from the source: float32 for those that are integers in the folder, the
        folder's dtype for the others.

    Raises:
      TideError: an integer times its scale is more than `TOLERANCE` steps away from the source's number, or a float
        differs. The message names the parameter and the output.
    """
    files, axes = ShardedTensors(directory), summed_axes(config)
    for path, floats in expected:
        found = files.read_stored(path)
        if path in axes:
            _check_integers(path, found, files.read_stored(scale_path(path)), floats, axes[path])
        else:
            _check_floats(path, found, floats)


def _check_integers(
    path: str, integers: np.ndarray, scale: np.ndarray, floats: np.ndarray, axes: tuple[int, ...]
) -> None:
    error = _errors(integers, scale, floats, axes)
    worst = np.unravel_index(int(np.argmax(error)), error.shape)
    if not error[worst] <= TOLERANCE:
        found = f"is up to {error[worst]:.3g} rounding steps away from the checkpoint's numbers"
        raise _mismatch_error(f"output {_format_index(path, worst)} {found}", f"at most {TOLERANCE}")


def _errors(integers: np.ndarray, scale: np.ndarray, floats: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Largest error of each output, in rounding steps; infinity if it is NaN."""
    error = np.empty(scale.shape, np.float32)
    for block in blocks(floats, axes):
        outputs = ... if 0 in axes else block
        distance = np.abs(floats_of(integers[block], scale[outputs], axes) - floats[block]).max(axis=axes)
        step = np.abs(floats[block]).max(axis=axes) / np.float32(127)
        error[outputs] = np.maximum(distance - _SMALLEST, 0) / np.maximum(step, _SMALLEST)
    return np.nan_to_num(error, nan=np.inf)


def _check_floats(path: str, found: np.ndarray, expected: np.ndarray) -> None:
    differ = found != expected
    if differ.any():
        worst = np.unravel_index(int(np.argmax(differ)), differ.shape)
        raise _mismatch_error(
            f"{_format_index(path, worst)} is {float(found[worst]):.9g}", f"{float(expected[worst]):.9g}"
        )


def _format_index(path: str, index: tuple[np.intp, ...]) -> str:
    return f"{shorten(path, 100)}[{', '.join(str(int(i)) for i in index)}]"


def _mismatch_error(found: str, expected: str) -> TideError:
    return TideError(f"the written {found}, expected {expected}: nothing was written, please report the model")

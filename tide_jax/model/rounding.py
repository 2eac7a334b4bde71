"""Rounds weights to 8-bit integers, and computes with them.

At small batch, a token costs the time to read the weights, and 8-bit weights take a quarter of the bytes of float32. So
the matrices that every token uses are stored as integers with a float32 scale for each output: those of `Dense`, the
experts, and the table of the output head. A product is ``scale * (x @ integers)``; activations, sums and the cache stay
floats.

Rounding is symmetric, per output: ``scale = max |w| / 127`` over the inputs, ``q = round(w / scale)``, halves to even.
A row of zeros has scale 1, so all scales are positive. If a checkpoint's floats come from 8-bit integers with a scale
for each output, rounding restores these integers and keeps their scale.

Weights stay float if they are small, are read row by row, or make decisions: norms, biases, learned positions, an
embedding that is only looked up (a token reads one row of it), and the routers of experts (after rounding they would
choose other experts). An embedding that also serves as head is rounded, because each token reads all of it; a look-up
then gives ``row * scale``.

A module marks a parameter as one that may be rounded by naming the axes that a product sums over (`axes_of`). So this
file knows no family, and a parameter without the mark stays float.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int8

from tide_jax.errors import TideError, shorten

Weights = Literal["float", "int8"]
WEIGHTS: tuple[Weights, ...] = ("float", "int8")
M = TypeVar("M", bound=nnx.Module)
_MOST = 127
_BLOCK = 2**23  # numbers of a tensor that are processed at once


def check_weights(weights: Any) -> Weights | None:
    """Validates the caller's `weights`. Raises TideError unless it is None or one of `WEIGHTS`."""
    if weights is None:
        return None
    if not isinstance(weights, str) or weights not in WEIGHTS:
        raise TideError(f"weights={shorten(repr(weights), 60)} is not known; choose 'int8' or 'float', or leave it out")
    return "int8" if weights == "int8" else "float"


def precision(dtype: Any, weights: Weights) -> str:
    """The number format of a model's computation, for reports and for keys of measurements."""
    return jnp.dtype(dtype).name if weights == "float" else f"{jnp.dtype(dtype).name} with int8 weights"


def blocks(tensor: np.ndarray, axes: tuple[int, ...]) -> Iterator[slice]:
    """Slices of a tensor's first axis with a few million numbers each; one slice if a product sums over that axis."""
    rows = len(tensor) if 0 in axes else max(1, _BLOCK * len(tensor) // max(1, tensor.size))
    for start in range(0, len(tensor), max(1, rows)):
        yield slice(start, start + rows)


def round_weights(
    weights: Float[np.ndarray, "..."], axes: tuple[int, ...], own: Float[np.ndarray, "..."] | None = None
) -> tuple[Int8[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Rounds one tensor; besides the result, it needs memory for a few million numbers.

    Args:
      weights: finite floats.
      axes: the axes that a product sums over.
      own: float32 scales in the shape of the other axes, 0 where unknown. An output's numbers are whole multiples of
        its own scale. The scale is kept if these multiples are 8-bit integers; -128 is allowed.

    Returns:
      The integers, and the float32 scales in the shape of the other axes.
    """
    rounded = np.empty(weights.shape, np.int8)
    scale = np.empty([size for axis, size in enumerate(weights.shape) if axis not in axes], np.float32)
    for part in blocks(weights, axes):
        block = weights[part].astype(np.float32)
        # Numbers so small that their scale underflows float32 count as zero.
        step = np.max(np.abs(block), axis=axes, keepdims=True, initial=0.0) / np.float32(_MOST)
        step, least = np.where(step > 0, step, np.float32(1)), np.float32(-_MOST)
        if own is not None:
            # Keep an output's own scale if all its multiples fit into 8 bits.
            known = np.expand_dims(own[... if 0 in axes else part], axes)
            lowest, highest = (np.expand_dims(limit(axis=axes), axes) for limit in (block.min, block.max))
            # Floats that were multiplied by a scale and are now divided by it have a relative error of 2**-24 each
            # time: far less than half a step in 128.
            kept = (
                (known > 0) & (lowest > known * np.float32(-_MOST - 1.5)) & (highest < known * np.float32(_MOST + 0.5))
            )
            step, least = np.where(kept, known, step), np.where(kept, np.float32(-_MOST - 1), least)
        np.divide(block, step, out=block)
        rounded[part] = np.clip(np.rint(block, out=block), least, np.float32(_MOST))
        scale[... if 0 in axes else part] = np.squeeze(step, axes)
    return rounded, scale


def floats_of(integers: Int8[np.ndarray, "..."], scale: Float[np.ndarray, "..."], axes: tuple[int, ...]) -> np.ndarray:
    """The float32 weights that integers represent; `axes` as in `round_weights`."""
    return integers.astype(np.float32) * np.expand_dims(scale, axes)


def as_floats(kernel: nnx.Param, scale: nnx.Param | None, dtype: Any) -> Float[Array, "..."]:
    """The weights of a module as floats in `dtype`, inside or outside a program; only a cast if they are floats."""
    if scale is None:
        return kernel[...].astype(dtype)
    lined_up = jnp.expand_dims(scale[...], axes_of(kernel) or ())
    return (kernel[...].astype(jnp.float32) * lined_up).astype(dtype)


def apply_scale(sums: Float[Array, "... F"], scale: Float[Array, "#... F"], dtype: Any) -> Float[Array, "... F"]:
    """float32 sums times their scales, in `dtype`."""
    return (sums * scale).astype(dtype)


def axes_of(parameter: nnx.Variable) -> tuple[int, ...] | None:
    """The axes that a product sums over, for a parameter that may be rounded; None for others."""
    return parameter.get_metadata().get("summed")


def scale_path(path: str) -> str:
    """Path of a parameter's scales: ``q.scale`` for ``q.kernel``, ``experts.down_scale`` for ``experts.down``."""
    return f"{path.removesuffix('.kernel')}.scale" if path.endswith(".kernel") else f"{path}_scale"


def as_int8(model: M) -> M:
    """The form of a model with 8-bit weights, for `nnx.eval_shape`; modifies the model and discards its values."""
    for _, module in nnx.iter_modules(model):
        for name, leaf in list(vars(module).items()):
            if not isinstance(leaf, nnx.Param) or (axes := axes_of(leaf)) is None:
                continue
            shape = leaf.get_value().shape
            outputs = [size for axis, size in enumerate(shape) if axis not in axes]
            leaf.set_value(jnp.zeros(shape, jnp.int8))
            # The attribute was None, which Flax treats as static unless it is marked as data.
            setattr(module, scale_path(f".{name}")[1:], nnx.data(nnx.Param(jnp.ones(outputs, jnp.float32))))
    return model


def check_scales(path: str, scale: np.ndarray, where: str) -> np.ndarray:
    """Scales from a file. Raises TideError, which names the file's folder, unless all are positive and finite."""
    with np.errstate(invalid="ignore"):
        wrong = ~(np.isfinite(scale) & (scale > 0))
    if wrong.any():
        found = float(scale[wrong][0])
        raise TideError(
            f"{where}: scale {path} holds {found:g}, expected positive finite numbers: the weights are damaged, "
            "convert the checkpoint again"
        )
    return scale


def kept_as_floats(shapes: Mapping[str, tuple[int, ...]], rounded: Mapping[str, Any]) -> list[str]:
    """Parameters with two or more axes that have no 8-bit form, sorted; layers share one name."""
    left = [path for path, shape in shapes.items() if len(shape) > 1 and path not in rounded]
    return sorted({re.sub(r"\blayers\.\d+\.", "layers.*.", path) for path in left})


def tensor_bytes(shapes: Mapping[str, tuple[int, ...]], rounded: Mapping[str, tuple[int, ...]], itemsize: int) -> int:
    """Bytes of tensors in their stored type.

    Args:
      shapes: stored shapes of the tensors.
      rounded: for integer tensors, the axes that a product sums over.
      itemsize: bytes per float.
    """
    total = 0
    for path, shape in shapes.items():
        count = math.prod(shape)
        axes = rounded.get(path)
        outputs = 0 if axes is None else math.prod(size for axis, size in enumerate(shape) if axis not in axes)
        total += count * itemsize if axes is None else count + 4 * outputs
    return total

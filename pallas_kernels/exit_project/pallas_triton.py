"""Exit projection as a Pallas kernel for the Triton backend.

XLA computes a head's large products: it has the better matrix kernels, and it reads the same weights for one row as for
many. The kernel computes all row-wise operations in registers. It reads and writes each exiting row once. The output
aliases the buffer, so other rows are not touched.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float

from pallas_kernels.common import NormSettings, NormWeights, power_of_two, row_warps
from pallas_kernels.exit_project.reference import AffineHead, head_product


def exit_project(
    x: Float[Array, "N D"],
    head: AffineHead | None,
    final_norm: NormWeights,
    exits: Bool[Array, " N"],
    out: Float[Array, "N D"],
    *,
    settings: NormSettings,
    interpret: bool = False,
) -> Float[Array, "N D"]:
    """Same result as the reference within rounding; `interpret` runs the kernel with XLA, on any platform."""
    layout = _RowLayout(x.shape[1], power_of_two(x.shape[1]))
    head_inputs = None if head is None else _HeadInputs(head_product(x, head, settings.eps).reshape(-1), head.bias)
    rows = pl.pallas_call(
        functools.partial(_kernel, layout, settings),
        grid=(x.shape[0],),
        out_shape=jax.ShapeDtypeStruct((out.size,), out.dtype),
        input_output_aliases={0: 0},
        compiler_params=plt.CompilerParams(num_warps=row_warps(layout.block), num_stages=1),
        interpret=interpret,
        name="exit_project",
    )(out.reshape(-1), x.reshape(-1), exits, head_inputs, final_norm)
    return rows.reshape(out.shape)


class _RowLayout(NamedTuple):
    """A row of `size` channels in a program's block: `block` is `size`, rounded up to a power of two."""

    size: int
    block: int

    def load_row(self, ref: Any, start: Array) -> Float[Array, " block"]:
        """A row of a flat array, in float32. In a flat array, a power-of-two block may extend past the end of a row."""
        return plt.load(ref.at[pl.ds(start, self.block)], mask=self.inside(), other=0.0).astype(jnp.float32)

    def load_parameter(self, ref: Any) -> Float[Array, " block"]:
        """A parameter that all rows share, in float32."""
        at = jnp.arange(self.block, dtype=jnp.int32)
        return plt.load(ref.at[at], mask=self.inside(), other=0.0).astype(jnp.float32)

    def inside(self) -> Bool[Array, " block"]:
        """Mask of the block's channels that exist."""
        return jnp.arange(self.block, dtype=jnp.int32) < self.size

    def rms_normalise(self, y: Float[Array, " block"], eps: float) -> Float[Array, " block"]:
        """RMSNorm without a gain; channels past the end must be zero."""
        return y * lax.rsqrt(jnp.sum(y * y) / self.size + eps)


class _HeadInputs(NamedTuple):
    product: Any
    bias: Any


def _kernel(
    layout: _RowLayout,
    settings: NormSettings,
    _: Any,
    x_ref: Any,
    exits_ref: Any,
    head: _HeadInputs | None,
    final_norm: NormWeights,
    out_ref: Any,
) -> None:
    row = pl.program_id(0)
    start = row * layout.size

    @pl.when(exits_ref[row])
    def _write() -> None:
        y = layout.load_row(x_ref, start)
        if head is not None:
            y = layout.rms_normalise(y, settings.eps)
            y = y + layout.load_row(head.product, start) + layout.load_parameter(head.bias)
            # Round to the model's dtype between head and norm, as the reference does.
            y = y.astype(x_ref.dtype).astype(jnp.float32)
        y = _apply_norm(layout, y, final_norm, settings).astype(out_ref.dtype)
        plt.store(out_ref.at[pl.ds(start, layout.block)], y, mask=layout.inside())


def _apply_norm(
    layout: _RowLayout, y: Float[Array, " block"], weights: NormWeights, settings: NormSettings
) -> Float[Array, " block"]:
    if settings.kind == "none":
        return y
    if settings.kind == "layer":
        y = jnp.where(layout.inside(), y - jnp.sum(y) / layout.size, 0.0)
    y = layout.rms_normalise(y, settings.eps)
    if weights.scale is not None:
        scale = layout.load_parameter(weights.scale)
        y = y * (1.0 + scale if settings.unit_offset else scale)
    return y if weights.bias is None else y + layout.load_parameter(weights.bias)

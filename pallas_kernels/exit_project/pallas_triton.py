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

from pallas_kernels.exit_project.config import warps
from pallas_kernels.exit_project.reference import AffineHead, FinalNorm, FinalNormKind, mapped_rows
from pallas_kernels.exit_step.shapes import power_of_two


def exit_project(
    x: Float[Array, "N D"],
    head: AffineHead | None,
    final_norm: FinalNorm,
    exits: Bool[Array, " N"],
    out: Float[Array, "N D"],
    *,
    eps: float,
    norm: FinalNormKind = "rms",
    unit_offset: bool = False,
    interpret: bool = False,
) -> Float[Array, "N D"]:
    """Same result as the reference within rounding; `interpret` runs the kernel with XLA, on any platform."""
    size = x.shape[1]
    block = power_of_two(size)
    plan = _Plan(size, block, eps, norm, unit_offset)
    head_part = None if head is None else _HeadPart(mapped_rows(x, head, eps).reshape(-1), head.bias)
    rows = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid=(x.shape[0],),
        out_shape=jax.ShapeDtypeStruct((out.size,), out.dtype),
        input_output_aliases={0: 0},
        compiler_params=plt.CompilerParams(num_warps=warps(block), num_stages=1),
        interpret=interpret,
        name="exit_project",
    )(out.reshape(-1), x.reshape(-1), exits, head_part, final_norm)
    return rows.reshape(out.shape)


class _Plan(NamedTuple):
    """Static part of a call; `block` is `size`, rounded up to a power of two."""

    size: int
    block: int
    eps: float
    norm: FinalNormKind
    unit_offset: bool

    def row(self, ref: Any, start: Array) -> Float[Array, " block"]:
        """A row of a flat array, in float32. In a flat array, a power-of-two block may extend past the end of a row."""
        return plt.load(ref.at[pl.ds(start, self.block)], mask=self.inside(), other=0.0).astype(jnp.float32)

    def parameter(self, ref: Any) -> Float[Array, " block"]:
        """A parameter that all rows share, in float32."""
        at = jnp.arange(self.block, dtype=jnp.int32)
        return plt.load(ref.at[at], mask=self.inside(), other=0.0).astype(jnp.float32)

    def inside(self) -> Bool[Array, " block"]:
        """Mask of the block's channels that exist."""
        return jnp.arange(self.block, dtype=jnp.int32) < self.size

    def scaled(self, y: Float[Array, " block"]) -> Float[Array, " block"]:
        """RMSNorm without a gain; channels past the end must be zero."""
        return y * lax.rsqrt(jnp.sum(y * y) / self.size + self.eps)


class _HeadPart(NamedTuple):
    mapped: Any
    bias: Any


def _kernel(
    plan: _Plan, _: Any, x_ref: Any, exits_ref: Any, head: _HeadPart | None, final_norm: FinalNorm, out_ref: Any
) -> None:
    row = pl.program_id(0)
    start = row * plan.size

    @pl.when(exits_ref[row])
    def _write() -> None:
        y = plan.row(x_ref, start)
        if head is not None:
            y = plan.scaled(y) + plan.row(head.mapped, start) + plan.parameter(head.bias)
            # Round to the model's dtype between head and norm, as the reference does.
            y = y.astype(x_ref.dtype).astype(jnp.float32)
        y = _final(plan, y, final_norm).astype(out_ref.dtype)
        plt.store(out_ref.at[pl.ds(start, plan.block)], y, mask=plan.inside())


def _final(plan: _Plan, y: Float[Array, " block"], final_norm: FinalNorm) -> Float[Array, " block"]:
    if plan.norm == "none":
        return y
    if plan.norm == "layer":
        y = jnp.where(plan.inside(), y - jnp.sum(y) / plan.size, 0.0)
    y = plan.scaled(y)
    if final_norm.scale is not None:
        scale = plan.parameter(final_norm.scale)
        y = y * (1.0 + scale if plan.unit_offset else scale)
    return y if final_norm.bias is None else y + plan.parameter(final_norm.bias)

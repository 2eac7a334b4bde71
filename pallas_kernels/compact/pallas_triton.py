"""Gathering and scattering of rows as Pallas kernels for the Triton backend.

One program copies one row, or a part of a wide row. Inactive rows are not read. When scattering, the output aliases the
buffer, so inactive rows are not written either.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float

from pallas_kernels.compact.config import block, warps
from pallas_kernels.compact.reference import Partition


def gather_rows(
    x: Float[Array, "B N D"], rows: Partition, size: int, *, interpret: bool = False
) -> Float[Array, "B M D"]:
    """Same result as the reference; `interpret` runs the kernel's operations with XLA, on any platform."""
    batch, count, columns = x.shape
    plan = _Plan(count, size, columns, block(columns))
    out = jax.ShapeDtypeStruct((batch * size * columns,), x.dtype)
    inputs = x.reshape(-1), rows.order.reshape(-1), rows.kept
    return plan.call(_gather, "compact_gather", batch, inputs, out, interpret).reshape(batch, size, columns)


def scatter_rows(
    compacted: Float[Array, "B M D"], rows: Partition, out: Float[Array, "B N D"], *, interpret: bool = False
) -> Float[Array, "B N D"]:
    """Same result as the reference; `interpret` runs the kernel's operations with XLA, on any platform."""
    batch, count, columns = out.shape
    plan = _Plan(count, compacted.shape[1], columns, block(columns))
    inputs = out.reshape(-1), compacted.reshape(-1), rows.order.reshape(-1), rows.kept
    found = jax.ShapeDtypeStruct((out.size,), out.dtype)
    return plan.call(_scatter, "compact_scatter", batch, inputs, found, interpret, aliases={0: 0}).reshape(out.shape)


class _Plan(NamedTuple):
    """Static part of a call: moves `size` of `rows` rows; each program moves `block` of `columns` channels."""

    rows: int
    size: int
    columns: int
    block: int

    def call(
        self,
        kernel: Any,
        name: str,
        batch: int,
        inputs: tuple[Array, ...],
        out: jax.ShapeDtypeStruct,
        interpret: bool,
        aliases: dict[int, int] | None = None,
    ) -> Array:
        """Runs a kernel with one program for each row to move, batch entry and part of a row."""
        return pl.pallas_call(
            functools.partial(kernel, self),
            grid=(self.size, batch, -(-self.columns // self.block)),
            out_shape=out,
            input_output_aliases=aliases or {},
            compiler_params=plt.CompilerParams(num_warps=warps(self.block), num_stages=1),
            interpret=interpret,
            name=name,
        )(*inputs)

    def part(self, row: Array, first: Array) -> Any:
        """Slice of a row in a flat array. In a flat array, a power-of-two block may extend past the end of a row."""
        return pl.ds(row * self.columns + first, self.block)

    def inside(self, first: Array) -> Bool[Array, " block"]:
        """Mask of the block's channels that exist, counted from `first`."""
        return first + jnp.arange(self.block, dtype=jnp.int32) < self.columns


def _gather(plan: _Plan, x_ref: Any, order_ref: Any, kept_ref: Any, out_ref: Any) -> None:
    number, entry, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * plan.block
    source = entry * plan.rows + order_ref[entry * plan.rows + number]
    inside = plan.inside(first)
    there = inside & (number < kept_ref[entry])
    found = plt.load(x_ref.at[plan.part(source, first)], mask=there, other=0.0)
    plt.store(out_ref.at[plan.part(entry * plan.size + number, first)], found, mask=inside)


def _scatter(plan: _Plan, _: Any, compacted_ref: Any, order_ref: Any, kept_ref: Any, out_ref: Any) -> None:
    number, entry, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * plan.block

    # Only active rows are written; all others keep the buffer's values.
    @pl.when(number < kept_ref[entry])
    def _move() -> None:
        target = entry * plan.rows + order_ref[entry * plan.rows + number]
        at, inside = plan.part(entry * plan.size + number, first), plan.inside(first)
        row = plt.load(compacted_ref.at[at], mask=inside, other=0.0).astype(out_ref.dtype)
        plt.store(out_ref.at[plan.part(target, first)], row, mask=inside)

"""Gathering and scattering of rows in Triton's own language, called through jax_triton. Importing this needs triton."""

from __future__ import annotations

from typing import Any

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Float

from pallas_kernels import jax_triton_call
from pallas_kernels.compact.config import block, warps
from pallas_kernels.compact.reference import Partition


def gather_rows(x: Float[Array, "B N D"], rows: Partition, size: int) -> Float[Array, "B M D"]:
    """Same result as the reference."""
    batch, count, columns = x.shape
    out = jax.ShapeDtypeStruct((batch, size, columns), x.dtype)
    return _run(_gather, (x, rows.order, rows.kept), out, size, {"N": count, "M": size})


def scatter_rows(
    compacted: Float[Array, "B M D"], rows: Partition, out: Float[Array, "B N D"]
) -> Float[Array, "B N D"]:
    """Same result as the reference.

    Inactive rows are copied, because each release of jax_triton has a different interface for outputs that alias
    inputs.
    """
    sizes = {"N": out.shape[1], "M": compacted.shape[1]}
    inputs = compacted, rows.place, rows.kept, out
    return _run(_scatter, inputs, jax.ShapeDtypeStruct(out.shape, out.dtype), out.shape[1], sizes)


def _run(kernel: Any, inputs: tuple[Array, ...], out: jax.ShapeDtypeStruct, rows: int, sizes: dict[str, int]) -> Array:
    batch, _, columns = out.shape
    width = block(columns)
    grid = (rows, batch, -(-columns // width))
    constants = sizes | {"D": columns, "BLOCK": width}
    (found,) = jax_triton_call.run(kernel, inputs, (out,), grid=grid, warps=warps(width), constants=constants)
    return found


@triton.jit
def _gather(
    x, order, count, found, N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    number, entry = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    source = entry * N + tl.load(order + entry * N + number)
    there = columns < tl.where(number < tl.load(count + entry), D, 0)
    row = tl.load(x + source * D + columns, mask=there, other=0.0)
    tl.store(found + (entry * M + number) * D + columns, row, mask=columns < D)


@triton.jit
def _scatter(
    compacted, place, count, out, found, N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    number, entry = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    at, inside = (entry * N + number) * D + columns, columns < D
    went = tl.load(place + entry * N + number)
    moved = went < tl.minimum(tl.load(count + entry), M)
    # The masks allow only the load that is needed: a row that moves does not read the buffer.
    new = tl.load(compacted + (entry * M + went) * D + columns, mask=columns < tl.where(moved, D, 0), other=0.0)
    old = tl.load(out + at, mask=columns < tl.where(moved, 0, D), other=0.0)
    tl.store(found + at, tl.where(moved, new.to(found.dtype.element_ty), old), mask=inside)

"""Exit step with a Mosaic GPU kernel for Hopper, which uses asynchronous copies to shared memory and WGMMA.

The kernel computes the down-projection and reads each state once: for 64 rows and some of the channels, it sums squares
and products with the router. XLA computes the rest, a few numbers per row. Weights are split into 16-bit parts as in
the Triton kernels (`Problem.weight_parts`). The kernel is meant for many rows; fewer than 64 are padded with zeros.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.common import NormKind
from pallas_kernels.exit_step.plan import MOSAIC_COLUMNS as COLUMNS
from pallas_kernels.exit_step.plan import Problem
from pallas_kernels.exit_step.reference import ExitRows, ExitStep, Gate, Router, decide

ROWS = 64
"""Rows per program, as the matrix instruction requires."""
MAX_SPLITS = 16
"""Most programs that share rows; each writes its own sums, 64 rows of them even for one row."""


def exit_step(
    x: Float[Array, "N D"],
    router: Router,
    gate: Gate,
    rows: ExitRows,
    *,
    eps: float,
    norm: NormKind = "rms",
    interpret: Any = None,
    splits: int | None = None,
) -> ExitStep:
    """Same result as the reference; scores agree within rounding.

    Args:
      interpret: parameters of JAX's interpreter for Mosaic GPU kernels, to run on any platform.
      splits: number of programs that share rows, a divisor of the number of 64-channel blocks; chosen for the GPU if
        omitted.
    """
    problem = Problem.of(x, router, norm)
    # Pad rows to blocks of 64 and the router's columns to the kernel's width.
    missing, narrow = -problem.rows % ROWS, problem.mosaic_hidden - problem.hidden
    shares = _Shares(problem, splits or _choose_splits(problem, (problem.rows + missing) // ROWS))
    x = jnp.pad(x, ((0, missing), (0, 0))) if missing else x
    down, down_bias, up, up_bias = (a.astype(jnp.float32) for a in router)
    down = jnp.pad(down, ((0, 0), (0, narrow))) if narrow else down
    squares, products = _launch(shares, interpret, x, down)
    # Sum the splits, then apply the norm's factor and the rest of the router.
    factor = lax.rsqrt(jnp.sum(squares, axis=0) / problem.size + eps)[: problem.rows, None]
    hidden = jnp.sum(products, axis=0)[: problem.rows, : problem.hidden] * factor
    hidden = jax.nn.silu(hidden + down_bias[None, :])
    logits = jnp.dot(hidden, up, precision=lax.Precision.HIGHEST) + up_bias
    return decide(jax.nn.sigmoid(logits), gate, rows)


class _Shares(NamedTuple):
    """How `splits` programs share the channels of a block of rows."""

    problem: Problem
    splits: int

    @property
    def tiles(self) -> int:
        """Number of channel blocks that a program multiplies."""
        return self.problem.size // (COLUMNS * self.splits)


def _choose_splits(problem: Problem, row_blocks: int) -> int:
    """Enough programs to keep the GPU busy, all with the same number of channels."""
    tiles = problem.size // COLUMNS
    wanted = max(1, min(MAX_SPLITS, gpu.current().multiprocessors // row_blocks))
    return max(n for n in range(1, wanted + 1) if tiles % n == 0)


def _launch(
    shares: _Shares, interpret: Any, x: Float[Array, "M D"], weights: Float[Array, "D K"]
) -> tuple[Float[Array, "S M"], Float[Array, "S M K"]]:
    """Sums of squares and products, each over some of the channels."""
    count, width, parts = x.shape[0], shares.problem.mosaic_hidden, shares.problem.weight_parts
    outputs = (shares.splits, count), (shares.splits, count, width)
    scratch = {
        "x_tiles": _shared_memory((2, ROWS, COLUMNS), x.dtype),
        "weight_tiles": _shared_memory((2, COLUMNS, width), jnp.float32),
        "part_tiles": _shared_memory((2, parts, COLUMNS, width), x.dtype),
        "products": _shared_memory((ROWS, width), jnp.float32),
        "squares": plgpu.SMEM((ROWS,), jnp.float32),
        "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=2),
    }
    return plgpu.kernel(
        functools.partial(_kernel, shares),
        out_type=tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs),
        scratch_types=scratch,
        grid=(count // ROWS, shares.splits),
        grid_names=("rows", "split"),
        interpret=interpret,
    )(x, weights)


def _shared_memory(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory in the layout of the matrix instruction: tiles of 8 rows by 128 bytes, swizzled."""
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(128)))


def _kernel(
    shares: _Shares,
    x_ref: Any,
    weights_ref: Any,
    squares_out: Any,
    products_out: Any,
    *,
    x_tiles: Any,
    weight_tiles: Any,
    part_tiles: Any,
    products: Any,
    squares: Any,
    arrived: Any,
) -> None:
    split = lax.axis_index("split")
    rows = pl.ds(lax.axis_index("rows") * ROWS, ROWS)

    def fetch(tile: Array | int, slot: Array | int) -> None:
        columns = pl.ds((split * shares.tiles + tile) * COLUMNS, COLUMNS)
        plgpu.copy_gmem_to_smem(x_ref.at[rows, columns], x_tiles.at[slot], arrived.at[slot])
        plgpu.copy_gmem_to_smem(weights_ref.at[columns, :], weight_tiles.at[slot], arrived.at[slot])

    def multiply(tile: Array | int, sums: Any) -> Float[Array, " R"]:
        """Adds a tile's products to `sums`; returns the tile's sums of squares."""
        slot = lax.rem(tile, 2) if not isinstance(tile, int) else tile % 2
        plgpu.barrier_wait(arrived.at[slot])
        wide = x_tiles[slot].astype(jnp.float32)
        _split_weights(shares.problem, weight_tiles[slot], part_tiles.at[slot])
        # All warps have now read and multiplied the previous tile, so its memory is free.
        plgpu.commit_smem()

        @pl.when(tile + 1 < shares.tiles)
        def _prefetch() -> None:
            fetch(tile + 1, 1 - slot)

        for part in range(shares.problem.weight_parts):
            plgpu.wgmma(sums, x_tiles.at[slot], part_tiles.at[slot, part])
        plgpu.wgmma_wait(0)
        return jnp.sum(wide * wide, axis=1)

    def project(sums: Any) -> tuple[Array, Array]:
        fetch(0, 0)
        first = multiply(0, sums)
        total = lax.fori_loop(1, shares.tiles, lambda tile, total: total + multiply(tile, sums), first)
        return total, sums[...]

    squares[...], products[...] = pl.run_scoped(
        project, plgpu.WGMMAAccumulatorRef((ROWS, shares.problem.mosaic_hidden))
    )
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(squares, squares_out.at[split, rows])
    plgpu.copy_smem_to_gmem(products, products_out.at[split, rows, :])
    plgpu.wait_smem_to_gmem(0)


def _split_weights(problem: Problem, weights: Float[Array, "C K"], parts: Any) -> None:
    """Writes float32 weights as 16-bit parts, highest part first."""
    for part in range(problem.weight_parts):
        bits = lax.bitcast_convert_type(weights, jnp.int32) & jnp.int32(problem.part_mask)
        high = lax.bitcast_convert_type(bits, jnp.float32)
        parts[part] = high.astype(parts.dtype)
        weights = weights - high

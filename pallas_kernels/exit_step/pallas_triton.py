"""Exit step as Pallas kernels for the Triton backend; `pallas_kernels.exit_step.plan` describes each kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float

from pallas_kernels.common import NormKind
from pallas_kernels.exit_step.plan import Blocks, Plan, Problem, Stage
from pallas_kernels.exit_step.reference import ExitRows, ExitStep, Gate, Router


def exit_step(
    x: Float[Array, "N D"],
    router: Router,
    gate: Gate,
    rows: ExitRows,
    *,
    eps: float,
    norm: NormKind = "rms",
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> ExitStep:
    """Same result as the reference; scores agree within rounding.

    Args:
      interpret: runs the kernel's operations with XLA, on any platform.
      blocks: block sizes; chosen for the GPU if omitted.
    """
    plan = Plan.of(Problem.of(x, router, norm), eps, blocks)
    return plan.run(functools.partial(_launch, plan, interpret), x, router, gate, rows)


def _launch(plan: Plan, interpret: bool, stage: Stage, inputs: Sequence[Array]) -> Sequence[Array]:
    kernel = {"whole": _whole, "parts": _parts, "finish": _finish}[stage.name]
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=stage.grid,
        out_shape=stage.outputs,
        compiler_params=plt.CompilerParams(num_warps=stage.warps, num_stages=2),
        interpret=interpret,
        name=f"exit_step_{stage.name}",
    )(*inputs)


def _whole(plan: Plan, x_ref: Any, mean_ref: Any, down_ref: Any, *decision: Any) -> None:
    start = pl.program_id(0) * plan.blocks.rows
    squares, hidden = _project(plan, start, 0, x_ref, mean_ref, down_ref)
    _decide(plan, start, squares, hidden, *decision)


def _parts(plan: Plan, x_ref: Any, mean_ref: Any, down_ref: Any, squares_out: Any, hidden_out: Any) -> None:
    start, split = pl.program_id(0) * plan.blocks.rows, pl.program_id(1)
    squares, hidden = _project(plan, start, split * plan.tiles, x_ref, mean_ref, down_ref)
    rows, there = pl.ds(start, plan.blocks.rows), _below(start, plan.blocks.rows, plan.problem.rows)
    plt.store(squares_out.at[split, rows], squares, mask=there)
    plt.store(hidden_out.at[split, rows, :], hidden, mask=jnp.broadcast_to(there[:, None], hidden.shape))


def _finish(plan: Plan, squares_ref: Any, hidden_ref: Any, *decision: Any) -> None:
    row, written = pl.program_id(0), _below(0, plan.padded_splits, plan.blocks.splits)
    squares = plt.load(squares_ref.at[:, row], mask=written, other=0.0)
    mask = jnp.broadcast_to(written[:, None], (plan.padded_splits, plan.problem.padded_hidden))
    hidden = plt.load(hidden_ref.at[:, row, :], mask=mask, other=0.0)
    _decide(plan, row, jnp.sum(squares)[None], jnp.sum(hidden, axis=0)[None, :], *decision)


def _project(
    plan: Plan, start: Array, tile: Array | int, x_ref: Any, mean_ref: Any, down_ref: Any
) -> tuple[Float[Array, " R"], Float[Array, "R K"]]:
    """Sums of squares, and products with the router, for the rows from `start` over this program's channels."""
    count, width = plan.blocks.rows, plan.blocks.columns
    rows, there = pl.ds(start, count), _below(start, count, plan.problem.rows)
    mean = plt.load(mean_ref.at[rows], mask=there, other=0.0)[:, None] if plan.problem.norm == "layer" else None

    def add(step: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        first = (tile + step) * width
        columns, inside = pl.ds(first, width), _below(first, width, plan.problem.size)
        mask = there[:, None] & inside[None, :]
        x = plt.load(x_ref.at[rows, columns], mask=mask, other=0.0)
        wide = x.astype(jnp.float32)
        if mean is not None:
            x = wide = jnp.where(mask, wide - mean, 0.0)
        mask = jnp.broadcast_to(inside[:, None], (width, plan.problem.padded_hidden))
        weights = plt.load(down_ref.at[columns, :], mask=mask, other=0.0).astype(jnp.float32)
        return sums[0] + jnp.sum(wide * wide, axis=1), sums[1] + _product(plan, x, weights)

    zero = jnp.zeros((count,), jnp.float32), jnp.zeros((count, plan.problem.padded_hidden), jnp.float32)
    return lax.fori_loop(0, plan.tiles, add, zero)


def _product(plan: Plan, x: Float[Array, "R C"], weights: Float[Array, "C K"]) -> Float[Array, "R K"]:
    """``x @ weights`` to float32's accuracy: in float32 without TF32, or in 16-bit parts on the tensor cores.

    Parts are split off by masking bits, because compilers may remove a conversion to 16 bits and back.
    """
    if plan.problem.weight_parts == 0:
        return jnp.dot(x, weights, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    total = jnp.zeros((x.shape[0], weights.shape[1]), jnp.float32)
    for _ in range(plan.problem.weight_parts):
        bits = lax.bitcast_convert_type(weights, jnp.int32) & jnp.int32(plan.problem.part_mask)
        part = lax.bitcast_convert_type(bits, jnp.float32)
        total = total + jnp.dot(x, part.astype(x.dtype), preferred_element_type=jnp.float32)
        weights = weights - part
    return total


def _decide(
    plan: Plan,
    start: Array,
    squares: Float[Array, " R"],
    hidden: Float[Array, "R K"],
    bias_ref: Any,
    up_ref: Any,
    up_bias_ref: Any,
    threshold_ref: Any,
    layer_ref: Any,
    min_layers_ref: Any,
    active_ref: Any,
    may_exit_ref: Any,
    exit_layers_ref: Any,
    scores_out: Any,
    exits_out: Any,
    active_out: Any,
    exit_layers_out: Any,
) -> None:
    """Scores of the rows from `start`, and the decisions that follow from them."""
    count = squares.shape[0]
    rows, there = pl.ds(start, count), _below(start, count, plan.problem.rows)
    # The norm is one factor per row, so it can follow the projection.
    factor = lax.rsqrt(squares / plan.problem.size + plan.eps)
    hidden = hidden * factor[:, None] + bias_ref[...].astype(jnp.float32)[None, :]
    hidden = hidden * _sigmoid(hidden)
    scores = _sigmoid(jnp.sum(hidden * up_ref[...].astype(jnp.float32)[None, :], axis=1) + up_bias_ref[0])
    active, may_exit = (plt.load(ref.at[rows], mask=there, other=False) for ref in (active_ref, may_exit_ref))
    ran = plt.load(exit_layers_ref.at[rows], mask=there, other=0)
    exits = active & may_exit & (layer_ref[0] + 1 >= min_layers_ref[0]) & (scores > threshold_ref[0])
    plt.store(scores_out.at[rows], scores, mask=there)
    plt.store(exits_out.at[rows], exits, mask=there)
    plt.store(active_out.at[rows], active & ~exits, mask=there)
    plt.store(exit_layers_out.at[rows], jnp.where(active, layer_ref[0], ran), mask=there)


def _below(start: Array | int, count: int, limit: int) -> Bool[Array, " count"]:
    """Mask of the `count` indices from `start` that are below the limit."""
    return start + jnp.arange(count, dtype=jnp.int32) < limit


def _sigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return 1.0 / (1.0 + jnp.exp(-x))

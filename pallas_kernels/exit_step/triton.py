"""Exit step in Triton's own language, called through jax_triton. Importing this needs triton.

`pallas_kernels.exit_step.plan` describes each kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from jaxtyping import Array, Float

from pallas_kernels import jax_triton_call
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
    blocks: Blocks | None = None,
) -> ExitStep:
    """Same result as the reference; scores agree within rounding.

    Args:
      blocks: block sizes; chosen for the GPU if omitted.
    """
    plan = Plan.of(Problem.of(x, router, norm), eps, blocks)
    return plan.run(functools.partial(_launch, plan), x, router, gate, rows)


def _launch(plan: Plan, stage: Stage, inputs: Sequence[Array]) -> Sequence[Array]:
    kernel = {"whole": _whole, "parts": _parts, "finish": _finish}[stage.name]
    constants = _constants(plan, stage)
    return jax_triton_call.run(kernel, inputs, stage.outputs, grid=stage.grid, warps=stage.warps, constants=constants)


def _constants(plan: Plan, stage: Stage) -> dict[str, Any]:
    """Compile-time arguments of a stage's kernel."""
    problem, blocks = plan.problem, plan.blocks
    shared = {"N": problem.rows, "K": problem.padded_hidden}
    project = {"D": problem.size, "ROWS": blocks.rows, "COLUMNS": blocks.columns, "TILES": plan.tiles}
    project |= {"CENTRE": problem.norm == "layer", "MASK": problem.part_mask, "PARTS": problem.weight_parts}
    decide = {"SIZE": float(problem.size), "EPS": plan.eps}
    if stage.name == "parts":
        return shared | project
    if stage.name == "whole":
        return shared | project | decide
    return shared | decide | {"SPLITS": plan.blocks.splits, "PADDED_SPLITS": plan.padded_splits}


@triton.jit
def _whole(
    x, mean, down, bias, up, up_bias, threshold, layer, min_layers, active, may_exit, exit_layers,
    scores_out, exits_out, active_out, exit_layers_out,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
    CENTRE: tl.constexpr, MASK: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * ROWS
    squares, hidden = _project(x, mean, down, start, 0, N, K, D, ROWS, COLUMNS, TILES, CENTRE, MASK, PARTS)
    _decide(
        squares, hidden, start + tl.arange(0, ROWS), bias, up, up_bias, threshold, layer, min_layers,
        active, may_exit, exit_layers, scores_out, exits_out, active_out, exit_layers_out, N, K, SIZE, EPS,
    )  # fmt: skip


@triton.jit
def _parts(
    x, mean, down, squares_out, hidden_out,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
    CENTRE: tl.constexpr, MASK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    start, split = tl.program_id(0) * ROWS, tl.program_id(1)
    squares, hidden = _project(
        x, mean, down, start, split * TILES, N, K, D, ROWS, COLUMNS, TILES, CENTRE, MASK, PARTS
    )  # fmt: skip
    rows = start + tl.arange(0, ROWS)
    at, there = split.to(tl.int64) * N + rows, rows < N
    tl.store(squares_out + at, squares, mask=there)
    tl.store(hidden_out + at[:, None] * K + tl.arange(0, K)[None, :], hidden, mask=there[:, None])


@triton.jit
def _finish(
    squares, hidden, bias, up, up_bias, threshold, layer, min_layers, active, may_exit, exit_layers,
    scores_out, exits_out, active_out, exit_layers_out,
    N: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, EPS: tl.constexpr,
    SPLITS: tl.constexpr, PADDED_SPLITS: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0), tl.arange(0, PADDED_SPLITS)
    at, written = split.to(tl.int64) * N + row, split < SPLITS
    total = tl.sum(tl.load(squares + at[:, None], mask=written[:, None], other=0.0), axis=0)
    parts = tl.load(hidden + at[:, None] * K + tl.arange(0, K)[None, :], mask=written[:, None], other=0.0)
    _decide(
        total, tl.sum(parts, axis=0)[None, :], row + tl.arange(0, 1), bias, up, up_bias, threshold, layer, min_layers,
        active, may_exit, exit_layers, scores_out, exits_out, active_out, exit_layers_out, N, K, SIZE, EPS,
    )  # fmt: skip


@triton.jit
def _project(
    x, mean, down, start, tile,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
    CENTRE: tl.constexpr, MASK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    rows, units = start + tl.arange(0, ROWS), tl.arange(0, K)
    squares = tl.zeros((ROWS,), tl.float32)
    hidden = tl.zeros((ROWS, K), tl.float32)
    for step in range(TILES):
        columns = (tile + step) * COLUMNS + tl.arange(0, COLUMNS)
        mask = (rows < N)[:, None] & (columns < D)[None, :]
        states = tl.load(x + rows.to(tl.int64)[:, None] * D + columns[None, :], mask=mask, other=0.0)
        if CENTRE:
            centre = tl.load(mean + rows, mask=rows < N, other=0.0)
            states = tl.where(mask, states.to(tl.float32) - centre[:, None], 0.0)
        wide = states.to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
        weights = tl.load(down + columns[:, None] * K + units[None, :], mask=(columns < D)[:, None], other=0.0)
        hidden = _product(states, weights.to(tl.float32), hidden, MASK, PARTS)
    return squares, hidden


@triton.jit
def _product(states, weights, hidden, MASK: tl.constexpr, PARTS: tl.constexpr):
    # float32 without TF32, or exact products of 16-bit states with each part of the weights.
    if PARTS == 0:
        hidden = tl.dot(states, weights, hidden, input_precision="ieee")
    for _ in tl.static_range(PARTS):
        high = (weights.to(tl.int32, bitcast=True) & MASK).to(tl.float32, bitcast=True)
        hidden = tl.dot(states, high.to(states.dtype), hidden)
        weights = weights - high
    return hidden


@triton.jit
def _decide(
    squares, hidden, rows, bias, up, up_bias, threshold, layer, min_layers, active, may_exit, exit_layers,
    scores_out, exits_out, active_out, exit_layers_out,
    N: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    units, there = tl.arange(0, K), rows < N
    factor = tl.rsqrt(squares / SIZE + EPS)
    hidden = hidden * factor[:, None] + tl.load(bias + units).to(tl.float32)[None, :]
    hidden = hidden / (1.0 + tl.exp(-hidden))
    logit = tl.sum(hidden * tl.load(up + units).to(tl.float32)[None, :], axis=1) + tl.load(up_bias)
    scores = 1.0 / (1.0 + tl.exp(-logit))
    ran, needed = tl.load(layer), tl.load(min_layers)
    was_active = tl.load(active + rows, mask=there, other=0) != 0
    exits = was_active & (tl.load(may_exit + rows, mask=there, other=0) != 0) & (scores > tl.load(threshold))
    exits = exits & (ran + 1 >= needed)
    tl.store(scores_out + rows, scores, mask=there)
    tl.store(exits_out + rows, exits, mask=there)
    tl.store(active_out + rows, was_active & (exits == 0), mask=there)
    before = tl.load(exit_layers + rows, mask=there, other=0)
    tl.store(exit_layers_out + rows, tl.where(was_active, ran, before), mask=there)

"""Measures prompts at full depth through `tide_jax.functional.prefill`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scripts.gpu.model import Steered
from scripts.gpu.ops import OUT_OF_TIME, Row
from scripts.gpu.timing import Budget, Spread, seconds
from scripts.reporting import reason
from tide_jax.functional import Prompt, StepOutput, init_cache, prefill


class PrefillPlan(NamedTuple):
    """Settings of the prompt measurement.

    Attributes:
      shapes: rows and tokens.
      rounds: timed runs of each shape, after one to warm up.
    """

    shapes: Sequence[tuple[int, int]] = ((1, 512), (1, 2048))
    rounds: int = 5


def run_prefill(
    steered: Steered,
    plan: PrefillPlan,
    budget: Budget,
    progress: Callable[[str], None],
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Returns a row for each shape; `keep` gets the rows so far, after each shape."""
    rows: list[Row] = []
    for batch, tokens in plan.shapes:
        row: Row = {"batch": batch, "tokens": tokens}
        rows.append(row)
        if budget.over("prefill"):
            row["not_run"] = OUT_OF_TIME
            keep(rows)
            continue
        progress(f"prefill, {batch} x {tokens}")
        try:
            row |= _measure(steered, plan, batch, tokens)
        except Exception as error:
            row["error"] = reason(error)
        keep(rows)
    return rows


def _measure(steered: Steered, plan: PrefillPlan, batch: int, tokens: int) -> Row:
    start = time.perf_counter()
    leaves, tree = jax.tree.flatten(steered.model)

    def run(leaves: list[Any], ids: jax.Array) -> StepOutput:
        model = jax.tree.unflatten(tree, leaves)
        prompt = Prompt(ids, jnp.full((batch,), tokens, jnp.int32))
        return prefill(model, prompt, init_cache(model.config, batch, tokens, model.dtype))

    program = jax.jit(run).lower(leaves, jax.ShapeDtypeStruct((batch, tokens), jnp.int32)).compile()
    compiled = time.perf_counter() - start
    ids = jnp.asarray(steered.ids(np.full((batch, tokens), steered.layers)))
    once = functools.partial(program, leaves, ids)
    seconds(once)
    spread = Spread.of([seconds(once) for _ in range(plan.rounds)])
    return {
        "ms": 1e3 * spread.median,
        "ms_least": 1e3 * spread.least,
        "ms_most": 1e3 * spread.most,
        "tokens_per_second": batch * tokens / spread.median,
        "compile_seconds": compiled,
    }

"""Measures prompts of a steered model, with and without exits, through `tide_jax.functional.prefill`."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scripts.gpu.decode import leaving, targets
from scripts.gpu.model import Steered
from scripts.gpu.ops import OUT_OF_TIME, Row
from scripts.gpu.timing import Budget, Spread, seconds
from scripts.reporting import reason
from tide_jax.functional import init_cache, prefill
from tide_jax.generation.generate import Prompt, StepOutput

PAPER_SHARE, PAPER_DEPTH = 0.05, 1 / 3
"""The TIDE paper's mix: the share of prompt tokens that exit, and the depth at which they do."""


class PrefillPlan(NamedTuple):
    """Settings of the prompt measurement.

    Attributes:
      shapes: rows and tokens.
      rounds: runs of each mix, all mixes in turn.
      implementation: implementation of the kernels.
    """

    shapes: Sequence[tuple[int, int]] = ((1, 512), (1, 2048))
    rounds: int = 5
    implementation: str = "reference"


def mixes(steered: Steered, tokens: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Depths of each prompt token, by name. The first and the last token run all layers."""
    layers, depths = steered.layers, steered.depths[:-1]

    def mix(count: int, depth: int) -> np.ndarray:
        chosen = np.full(tokens, layers)
        chosen[1 + random.permutation(tokens - 2)[:count]] = depth
        return chosen

    found = {"no exits": np.full(tokens, layers)}
    for share, depth in targets(steered):
        count = min(tokens - 2, leaving(share, depth, layers, tokens))
        found[f"{count} of {tokens} tokens leave after {depth}"] = mix(count, depth)
    third, few = steered.nearest(PAPER_DEPTH), int(PAPER_SHARE * tokens)
    found[f"the paper's mix: {few} of {tokens} tokens leave after {third}"] = mix(few, third)
    for depth in (steered.nearest(0.5), depths[0]):
        found[f"all but the first and last leave after {depth}"] = mix(tokens - 2, depth)
    return found


class Program(NamedTuple):
    """A compiled prefill, its flattened model and exits, and its compile seconds."""

    run: Callable[..., StepOutput]
    leaves: list[Any]
    compile_seconds: float


def run_prefill(steered: Steered, plan: PrefillPlan, budget: Budget, progress: Callable[[str], None]) -> list[Row]:
    """Returns a row for each shape and mix. All programs are compiled first, in parallel."""
    rows: list[Row] = []
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        started = {
            (shape, exits): pool.submit(_program, steered, plan, *shape, exits)
            for shape in plan.shapes
            for exits in (False, True)
            if not budget.over("prefill")
        }
    for batch, tokens in plan.shapes:
        progress(f"prefill, {batch} x {tokens}")
        made = {exits: started.get(((batch, tokens), exits)) for exits in (False, True)}
        rows += _shape(steered, plan, batch, tokens, made, budget)
    return rows


def _shape(
    steered: Steered,
    plan: PrefillPlan,
    batch: int,
    tokens: int,
    programs: dict[bool, Future[Program] | None],
    budget: Budget,
) -> list[Row]:
    mixed = {"full depth": np.full(tokens, steered.layers)} | mixes(steered, tokens, np.random.default_rng(0))
    found: dict[str, Row] = {name: {"batch": batch, "tokens": tokens, "variant": name} for name in mixed}
    times = {name: list[float]() for name in mixed}
    for number in range(plan.rounds + 1):  # the first round warms up
        for name, depths in mixed.items():
            row = found[name]
            if "error" in row:
                continue
            started = programs[name != "full depth"]
            if started is None or budget.over("prefill"):
                row.setdefault("not_run", OUT_OF_TIME)
                continue
            try:
                program = started.result()
                run = _run(steered, program, batch, depths)
                if number:
                    times[name].append(seconds(run))
                else:
                    _describe(row, steered, run(), depths, program.compile_seconds)
            except Exception as error:
                row["error"] = reason(error)
    full = Spread.of(times["full depth"]).median if times["full depth"] else None
    for name, values in times.items():
        if values:
            found[name].pop("not_run", None)
            spread = Spread.of(values)
            found[name] |= {"ms": 1e3 * spread.median, "ms_least": 1e3 * spread.least, "ms_most": 1e3 * spread.most}
            found[name]["tokens_per_second"] = batch * tokens / spread.median
            if full is not None:
                found[name]["latency_gain"] = 1 - spread.median / full
    return list(found.values())


def _program(steered: Steered, plan: PrefillPlan, batch: int, tokens: int, exits: bool) -> Program:
    leaves, tree = jax.tree.flatten(
        (steered.model, dataclasses.replace(steered.exits, implementation=plan.implementation) if exits else None)
    )

    def run(leaves: list[Any], ids: jax.Array) -> StepOutput:
        model, given = jax.tree.unflatten(tree, leaves)
        prompt = Prompt(ids, jnp.full((batch,), tokens, jnp.int32))
        cache = init_cache(model.config, batch, tokens, model.dtype)
        return prefill(model, prompt, cache, given)

    start = time.perf_counter()
    program = jax.jit(run).lower(leaves, jax.ShapeDtypeStruct((batch, tokens), jnp.int32)).compile()
    return Program(program, leaves, time.perf_counter() - start)


def _run(steered: Steered, program: Program, batch: int, depths: np.ndarray) -> Callable[[], StepOutput]:
    ids = jnp.asarray(steered.ids(np.repeat(depths[None, :], batch, axis=0)))
    return functools.partial(program.run, program.leaves, ids)


def _describe(row: Row, steered: Steered, out: StepOutput, depths: np.ndarray, compile_seconds: float) -> None:
    last, deepest = jax.device_get((out.exit_layers, out.layers_executed))
    row |= {
        "mean_depth": float(depths.mean() / steered.layers),
        "layers_executed": int(deepest),
        "as_forced": bool((last + 1 == depths[-1]).all()),
        "compile_seconds": compile_seconds,
    }

"""Measures the whole decode step of a steered model.

Variants run against the bandwidth floor, at forced depths, with routers that let no token exit, and as a chain of
conditionals instead of the library's loop.

Skip efficiency is that of scripts.bench.decode: (time saved / layer time at full depth) / (share of layers skipped),
where layer time is full-depth time minus that of embedding, output head and argmax alone.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from scripts.gpu.model import Steered
from scripts.gpu.ops import OUT_OF_TIME, Roof, Row
from scripts.gpu.timing import Budget, Spread, seconds
from scripts.reporting import reason
from tide_jax.config import layer_groups
from tide_jax.exits.exits import Exits
from tide_jax.exits.gate import TokenState, finish_group
from tide_jax.exits.walk import GroupRows, Stacks
from tide_jax.functional import decode_step, init_cache
from tide_jax.generation.cuda_graphs import OPTIONS
from tide_jax.generation.finite import finite_rows
from tide_jax.generation.generate import StepOutput
from tide_jax.model.cache import KVCache
from tide_jax.model.decoder import Decoder

TARGET_DEPTH = 0.93
"""Mean share of layers at which gains are compared with the TIDE paper's."""
BELOW = (0.92, 0.9)
"""More such shares, to see where the paper's figures are reached."""
Step = Callable[..., StepOutput]
"""Like `tide_jax.functional.decode_step`."""


class DecodePlan(NamedTuple):
    """Settings of the decoding measurement.

    Attributes:
      batches: numbers of rows.
      context: tokens in the cache before the first step.
      steps: steps of one run. With 50, mixes of 32 layers reach `TARGET_DEPTH` exactly.
      rounds: runs of each variant, all variants in turn.
      implementation: implementation of the kernels in the step.
      graphs: whether to run the loops as one CUDA graph, too.
      names: the variants to run; None for all.
    """

    batches: Sequence[int] = (1, 8, 32)
    context: int = 256
    steps: int = 50
    rounds: int = 3
    implementation: str = "reference"
    graphs: bool = True
    names: Sequence[str] | None = None

    def wanted(self, variants: Sequence[Variant]) -> list[Variant]:
        """Those of `variants` that are to run."""
        return [v for v in variants if self.names is None or v.name in self.names]


class Variant(NamedTuple):
    """A run to time: a program, and the depth of every step's tokens."""

    name: str
    program: str
    depths: np.ndarray


def cond_chain_step(
    model: Decoder,
    cache: KVCache,
    tokens: jax.Array,
    positions: jax.Array,
    active: jax.Array,
    exits: Exits,
) -> StepOutput:
    """`tide_jax.functional.decode_step` with a `lax.cond` for each group instead of the loop and its switch."""
    positions = jnp.where(active, positions, -1)[:, None]
    groups = layer_groups(model.config.num_layers, exits.routers.exit_points)
    contexts, rows = model.contexts(positions, cache), GroupRows(groups, model.config)
    alone = positions.size == 1

    def run(g: int, state: TokenState) -> tuple[TokenState, Stacks]:
        found, going = [], state.active[:, :, None]
        for i in groups[g]:
            y, new = model.layers[i](state.x, contexts, cache.layer(i))
            state = state._replace(x=y if alone else jnp.where(going, y, state.x))
            found.append(new)
        return finish_group(model, groups, g, state, exits, positions >= 1), rows.stack(g, found, positions.shape[1])

    def fill(g: int, state: TokenState) -> tuple[TokenState, Stacks]:
        filled = [model.layers[i].project_rows(state.x, contexts) for i in groups[g]]
        return state, rows.stack(g, filled, positions.shape[1])

    state = TokenState.start(model, tokens[:, None], positions)
    found, executed = [], jnp.int32(0)
    for g, group in enumerate(groups):
        going = jnp.any(state.active)
        executed += jnp.where(going, len(group), 0)
        state, new = lax.cond(going, functools.partial(run, g), functools.partial(fill, g), state)
        found.append(new)
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *found)
    grown = cache.append(rows.by_layer(stacked), positions, model.layers)
    finite = finite_rows(state.states)
    return StepOutput(model.logits(state.states)[:, 0], grown, state.exit_layers[:, 0], executed, finite)


def decoded(step: Step, leaves: Any, tree: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Decodes given tokens one after the other, as if each were sampled from the previous logits.

    Args:
      leaves, tree: the model, its filled cache and the exits, flattened once: a model has hundreds of arrays.
      tokens: int32 [steps, B].

    Returns:
      The last sampled tokens, and the layers run for each step and row.
    """
    model, cache, exits = jax.tree.unflatten(tree, leaves)
    positions = jnp.full(tokens.shape[1:], cache.length, jnp.int32)

    def body(i: jax.Array, carry: Any) -> Any:
        cache, drawn, depths = carry
        given = tokens[i] + jnp.minimum(drawn, 0)  # always adds 0, but makes each step wait for the previous one
        out = step(model, cache, given, positions + i, jnp.ones(given.shape, bool), exits)
        drawn = jnp.argmax(out.logits, axis=-1).astype(jnp.int32)
        return out.cache, drawn, depths.at[i].set(out.exit_layers + 1)

    start = cache, jnp.zeros(tokens.shape[1:], jnp.int32), jnp.zeros(tokens.shape, jnp.int32)
    return lax.fori_loop(0, tokens.shape[0], body, start)[1:]


def head_alone(leaves: Any, tree: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`decoded` without layers: embedding, final norm, output head and argmax."""
    model, _, _ = jax.tree.unflatten(tree, leaves)

    def body(i: jax.Array, drawn: jax.Array) -> jax.Array:
        given = (tokens[i] + jnp.minimum(drawn, 0))[:, None]
        x = model.embed_tokens(given, jnp.zeros(given.shape, jnp.int32))
        return jnp.argmax(model.logits(model.final_norm(model.residual(x)))[:, 0], axis=-1).astype(jnp.int32)

    drawn = lax.fori_loop(0, tokens.shape[0], body, jnp.zeros(tokens.shape[1:], jnp.int32))
    return drawn, jnp.zeros(tokens.shape, jnp.int32)


def filled_cache(steered: Steered, batch: int, tokens: int, room: int) -> KVCache:
    """A cache filled with random rows."""
    cache = init_cache(steered.model.config, batch, tokens + room, steered.model.dtype)
    arrays, tree = jax.tree.flatten(cache.layers)
    filled = [jax.random.normal(jax.random.key(i), a.shape, a.dtype) for i, a in enumerate(arrays)]
    slots = jnp.arange(cache.capacity, dtype=jnp.int32)
    positions = jnp.broadcast_to(jnp.where(slots < tokens, slots, -1), cache.positions.shape)
    return cache._replace(layers=jax.tree.unflatten(tree, filled), positions=positions, length=jnp.int32(tokens))


def targets(steered: Steered) -> list[tuple[float, int]]:
    """Mean shares of the layers to reach, each with the depth of the exit point at which some tokens exit."""
    depths, middle = steered.depths[:-1], steered.nearest(0.5)
    found = [(TARGET_DEPTH, depth) for depth in sorted({depths[-1], middle, depths[0]}, reverse=True)]
    return found + [(share, middle) for share in BELOW]


def exiting_tokens(share: float, depth: int, layers: int, tokens: int) -> int:
    """How many of `tokens` must exit after `depth` layers for a mean of `share` of the layers, or slightly more."""
    return int((1 - share) * layers * tokens / (layers - depth) + 1e-9)


def mixes(steered: Steered, steps: int) -> dict[str, np.ndarray]:
    """Depths of each step: some steps, evenly spread, exit at one exit point, all rows of a batch together."""
    found, layers = {}, steered.layers
    for share, depth in targets(steered):
        count = exiting_tokens(share, depth, layers, steps)
        chosen = np.full(steps, layers)
        chosen[np.linspace(0, steps - 1, count).round().astype(int)] = depth
        if count:
            found[f"mean {chosen.mean() / layers:.3f}: {count} of {steps} steps exit after {depth}"] = chosen
    return found


def variants(steered: Steered, plan: DecodePlan, batch: int) -> list[Variant]:
    """The variants for a batch size, the most informative first."""
    depths, middle = steered.depths[:-1], steered.nearest(0.5)
    full, mixed = np.full(plan.steps, steered.layers), mixes(steered, plan.steps)
    found = [
        Variant("full depth", "full", full),
        Variant("routers on, no exits", "routers", full),
        Variant("head only", "head", full),
        *(Variant(f"forced {depth}", "routers", np.full(plan.steps, depth)) for depth in depths),
        *(Variant(name, "routers", chosen) for name, chosen in mixed.items()),
        Variant("cond chain, no exits", "cond", full),
        Variant(f"cond chain, forced {middle}", "cond", np.full(plan.steps, middle)),
        *(Variant(f"cond chain, {name}", "cond", chosen) for name, chosen in list(mixed.items())[:1]),
    ]
    if batch == plan.batches[0] and plan.implementation != "reference":
        found.append(Variant("routers on, no exits, plain JAX", "routers, plain JAX", full))
    return found


def graph_variants(steered: Steered, plan: DecodePlan) -> list[Variant]:
    """Loops as one CUDA graph. They run after the others, and save their results apart: they may end the process."""
    middle, full = steered.nearest(0.5), np.full(plan.steps, steered.layers)
    return [
        Variant("routers on, no exits, one graph", "one graph", full),
        Variant(f"forced {middle}, one graph", "one graph", np.full(plan.steps, middle)),
    ]


def run_decode(
    steered: Steered,
    plan: DecodePlan,
    roof: Roof,
    budget: Budget,
    progress: Callable[[str], None],
    keep: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Returns a row for each batch size and variant; `keep` gets the rows so far, after each batch size."""
    rows: list[Row] = []
    for batch in plan.batches:
        wanted = plan.wanted(variants(steered, plan, batch))
        if budget.over("decode"):
            rows += [{"batch": batch, "variant": v.name, "not_run": OUT_OF_TIME} for v in wanted]
        else:
            progress(f"decode, batch {batch}")
            rows += _Batch(steered, plan, batch).rows(wanted, roof, budget, progress)
        keep(rows)
        if plan.graphs and not budget.over("decode"):
            graphs = plan.wanted(graph_variants(steered, plan))
            beside = [v for v in wanted if v.name in ("full depth", "head only")]  # to compare with
            found = _Batch(steered, plan, batch).rows([*beside, *graphs], roof, budget, progress)
            rows += [row for row in found if row["variant"] in {v.name for v in graphs}]
            keep(rows)
    return rows


class _Batch(NamedTuple):
    """All variants at a batch size."""

    steered: Steered
    plan: DecodePlan
    batch: int

    def rows(self, wanted: list[Variant], roof: Roof, budget: Budget, progress: Callable[[str], None]) -> list[Row]:
        base = [{"batch": self.batch, "variant": v.name} for v in wanted]
        try:
            cache = filled_cache(self.steered, self.batch, self.plan.context, self.plan.steps)
        except Exception as error:
            return [row | {"error": reason(error)} for row in base]
        programs = self._compiled({v.program for v in wanted}, cache)
        progress(f"decode, batch {self.batch}: compiled")
        times: dict[str, list[float]] = {v.name: [] for v in wanted}
        found: dict[str, Row] = {v.name: {} for v in wanted}
        for number in range(self.plan.rounds + 1):  # the first round warms up
            for v in wanted:
                if "error" in found[v.name]:
                    continue
                if budget.over("decode"):
                    found[v.name].setdefault("not_run", OUT_OF_TIME)
                    continue
                self._once(v, programs[v.program], cache, times[v.name] if number else None, found[v.name])
        for name, values in times.items():
            if values:  # perhaps cut short, but measured
                found[name].pop("not_run", None)
                found[name] |= self._speed(Spread.of(values), len(values))
        self._compare(found, wanted, roof)
        return [row | found[row["variant"]] for row in base]

    def _compiled(self, names: set[str], cache: KVCache) -> dict[str, Any]:
        """Programs by name, with their compile seconds; a reason instead of a program that can't be built."""
        own = functools.partial(decoded, decode_step)
        functions = {
            "full": own,
            "routers": own,
            "routers, plain JAX": own,
            "cond": functools.partial(decoded, cond_chain_step),
            "head": head_alone,
            "one graph": own,
        }

        def lowered(name: str) -> Any:
            try:
                leaves, tree = self._flat(name, cache)
                tokens = jax.ShapeDtypeStruct((self.plan.steps, self.batch), jnp.int32)
                return jax.jit(functions[name], static_argnums=1).lower(leaves, tree, tokens), leaves
            except Exception as error:
                return reason(error)

        def compiled(made: Any, name: str) -> Any:
            if isinstance(made, str):
                return made
            start = time.perf_counter()
            try:
                program = made[0].compile(OPTIONS if name == "one graph" else None)
            except Exception as error:
                return reason(error)
            return program, made[1], time.perf_counter() - start

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            started = {name: pool.submit(compiled, lowered(name), name) for name in sorted(names)}
            return {name: found.result() for name, found in started.items()}

    def _flat(self, name: str, cache: KVCache) -> tuple[list[Any], Any]:
        implementation = "reference" if name == "routers, plain JAX" else self.plan.implementation
        exits = None
        if name not in ("full", "head"):
            exits = dataclasses.replace(self.steered.exits, implementation=implementation)
        return jax.tree.flatten((self.steered.model, cache, exits))

    def _once(self, v: Variant, made: Any, cache: KVCache, times: list[float] | None, row: Row) -> None:
        """Runs a variant once; the first run checks the depth."""
        if isinstance(made, str):
            row["error"] = made
            return
        program, leaves, compile_seconds = made
        try:
            ids = jnp.asarray(self.steered.ids(np.repeat(v.depths[:, None], self.batch, axis=1)))
            if times is not None:
                times.append(seconds(lambda: program(leaves, ids)) / self.plan.steps)
                return
            drawn, depths = jax.device_get(program(leaves, ids))
            row |= {"compile_seconds": compile_seconds, "drawn": [int(t) for t in drawn[:8]]}
            if v.program != "head":
                row["mean_depth"] = float(depths.mean() / self.steered.layers)
                row["as_forced"] = bool((depths == v.depths[:, None]).all())
        except Exception as error:
            row["error"] = reason(error)

    def _speed(self, spread: Spread, runs: int) -> Row:
        return {
            "ms_per_step": 1e3 * spread.median,
            "ms_least": 1e3 * spread.least,
            "ms_most": 1e3 * spread.most,
            "runs": runs,
            "tokens_per_second": self.batch / spread.median,
        }

    def _compare(self, found: dict[str, Row], wanted: list[Variant], roof: Roof) -> None:
        """Adds ratios to full depth and to the floor, and the share of the skipped layers' time that was saved."""
        full = found["full depth"].get("ms_per_step")
        head = found["head only"].get("ms_per_step")
        tokens = self.plan.context + self.plan.steps // 2
        bytes_moved = self.steered.bytes_read() + self.batch * self.steered.bytes_cached(tokens)
        floor = 1e3 * bytes_moved / roof.bandwidth
        for v in wanted:
            row = found[v.name]
            if full is None or "ms_per_step" not in row:
                continue
            row["gain"] = full / row["ms_per_step"] - 1
            skipped = 1 - v.depths.mean() / self.steered.layers
            if v.program == "full":
                row |= {"floor_ms": floor, "share_of_floor": floor / row["ms_per_step"]}
            elif v.program != "head" and skipped > 0 and head is not None:
                row["skip_efficiency"] = (full - row["ms_per_step"]) / (full - head) / skipped
            elif v.program != "head":
                row["overhead"] = row["ms_per_step"] / full - 1

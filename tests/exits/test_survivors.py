"""Deep layers on the tokens that are left: against the masked loop, which runs them for all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import BruteForce
from tiny_models import CONFIGS, random_prompts, tiny_model

from tide_jax import TIDE, ExitConfig
from tide_jax.exits import cache_fill, survivors
from tide_jax.exits.depth import DepthOutput, run_depth
from tide_jax.exits.exits import Exits
from tide_jax.exits.router import Routers
from tide_jax.exits.survivors import survivor_sizes
from tide_jax.functional import Decoder, init_cache
from tide_jax.generation import generate
from tide_jax.generation.generate import Prompt, StepOutput, prefill
from tide_jax.model.layers import DecoderLayer
from tide_jax.testing import random_routers

TOKENS = 16
QUICK = {"xla_backend_optimization_level": 0}
RANKS = {name: (None, 3, 0)[i % 3] for i, name in enumerate(CONFIGS)}
AFFINE = tuple(CONFIGS)[::2]


@pytest.fixture(autouse=True)
def short_rows_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survivors, "LEAST_TOKENS", TOKENS)


@functools.cache
def model_of(name: str) -> Decoder:
    return tiny_model(CONFIGS[name])


@functools.cache
def routers_of(name: str) -> Routers:
    config, looks = CONFIGS[name], model_of(name) if name not in AFFINE else None
    interval = 2 if config.num_layers > 4 else 1
    return random_routers(config, interval=interval, affine=name in AFFINE, translator_rank=RANKS[name], model=looks)


def padded_rows() -> tuple[jax.Array, jax.Array]:
    """Tokens and positions of rows padded on the left, on the right, on both sides, and not at all."""
    positions = np.full((4, TOKENS), -1)
    for row, (start, length) in zip(positions, ((9, 7), (0, 11), (3, 10), (0, TOKENS)), strict=True):
        row[start : start + length] = np.arange(length)
    return jnp.asarray(random_prompts((TOKENS,) * 4), jnp.int32), jnp.asarray(positions, jnp.int32)


def record_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each row for which layers have run since."""
    ran: list[int] = []
    run, run_on = DecoderLayer.__call__, DecoderLayer.run_on

    def recorded(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(layer: DecoderLayer, x: jax.Array, *arguments: Any) -> Any:
            jax.debug.callback(lambda: ran.append(x.shape[1]))
            return method(layer, x, *arguments)

        return call

    monkeypatch.setattr(DecoderLayer, "__call__", recorded(run))
    monkeypatch.setattr(DecoderLayer, "run_on", recorded(run_on))
    return ran


def assert_same(found: DepthOutput, expected: DepthOutput, positions: jax.Array) -> None:
    """Exit layers exactly; states and rows of real tokens to rounding."""
    real = np.asarray(positions) >= 0
    np.testing.assert_array_equal(found.exit_layers, expected.exit_layers)
    assert found.layers_executed == expected.layers_executed
    np.testing.assert_allclose(np.asarray(found.states)[real], np.asarray(expected.states)[real], atol=2e-5)
    for ours, theirs in zip(found.new, expected.new, strict=True):
        ours, theirs = (np.moveaxis(np.asarray(a), (1, 3), (0, 1))[real] for a in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pass_is_the_masked_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a cache of earlier tokens: rows that were run before, at positions of their own."""
    monkeypatch.setattr(survivors, "QUARTERS", (3,))
    model, routers = model_of(name), routers_of(name)
    tokens, positions = padded_rows()
    positions = jnp.where(positions < 0, -1, positions + 5)
    before = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32)[None], (4, 5))
    cache = init_cache(model.config, 4, 24, model.dtype)
    cache = cache.append(model.run_layers(tokens[:, :5], before, None)[1], before)
    may_exit, ran = jnp.asarray(np.random.default_rng(2).random((4, TOKENS)) < 0.7), record_sizes(monkeypatch)

    @functools.partial(jax.jit, static_argnames="fewer", compiler_options=QUICK)
    def run(exits: Exits, fewer: bool) -> DepthOutput:
        return run_depth(model, tokens, positions, cache, exits, may_exit=may_exit, survivors=fewer)

    depths: set[int] = set()
    for threshold in (0.2, 0.5):
        exits = Exits.uniform(routers.without_metadata(), threshold)
        expected = run(exits, False)
        assert_same(run(exits, True), expected, positions)
        depths |= set(np.asarray(expected.exit_layers)[np.asarray(positions) >= 0].tolist())
    jax.effects_barrier()
    assert set(ran) == {TOKENS, TOKENS * 3 // 4}
    assert len(depths) > 1


def test_layers_run_for_no_more_tokens_than_the_smallest_size_that_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = model_of("pre norm"), record_sizes(monkeypatch)
    routers = random_routers(model.config, interval=1)
    tokens = jnp.asarray(random_prompts((TOKENS,) * 2), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32)[None], (2, TOKENS))
    exits = Exits.uniform(routers, 0.4)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(may_exit: jax.Array) -> DepthOutput:
        return run_depth(model, tokens, positions, None, exits, may_exit=may_exit, survivors=True)

    for share in (0.2, 0.6, 1.0):
        ran.clear()
        layers = run(jnp.asarray(np.random.default_rng(1).random((2, TOKENS)) < share)).exit_layers
        jax.effects_barrier()
        left = [int((np.asarray(layers) >= layer).sum(axis=1).max()) for layer in range(model.config.num_layers)]
        sizes = sorted((TOKENS, *survivor_sizes(TOKENS)))
        assert ran == [next(size for size in sizes if size >= count) for count in left if count]
    assert len(set(ran)) > 2


def test_a_prompt_in_chunks_is_the_masked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, routers = model_of("sliding windows"), routers_of("sliding windows")
    monkeypatch.setattr(generate, "PREFILL_CHUNK", TOKENS)
    monkeypatch.setattr(survivors, "QUARTERS", (2,))
    width = 2 * TOKENS + 24  # a first chunk of another size
    prompt = Prompt(
        jnp.asarray(random_prompts((width,) * 3), jnp.int32), jnp.asarray([width, 9, width - 21], jnp.int32)
    )
    exits = Exits.uniform(routers.without_metadata(), 0.5, prompt=True)

    def step(least: int) -> StepOutput:
        monkeypatch.setattr(survivors, "LEAST_TOKENS", least)
        cache = init_cache(model.config, 3, width, model.dtype)
        return jax.jit(lambda: prefill(model, prompt, cache, exits), compiler_options=QUICK)()

    found, expected = step(TOKENS), step(1000)
    np.testing.assert_array_equal(found.exit_layers, expected.exit_layers)
    np.testing.assert_allclose(found.logits, expected.logits, atol=3e-5)
    real = np.asarray(found.cache.positions) >= 0
    for ours, theirs in ((found.cache.keys, expected.cache.keys), (found.cache.values, expected.cache.values)):
        ours, theirs = (np.moveaxis(np.asarray(a), (1, 3), (0, 1))[real] for a in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=3e-5)


def test_a_prompt_and_what_follows_is_the_brute_force() -> None:
    config = ExitConfig(exit_threshold=0.5, min_layers=0, prefill_exits=True)
    engine = TIDE(model_of("post norm"), routers_of("post norm"), config)
    prompts = random_prompts((16, 5, 14))
    out = engine.generate(prompts, max_new_tokens=3, eos_token_id=[])
    for b, prompt in enumerate(prompts):
        tokens, exit_layers, margin = BruteForce(engine.model, engine.routers, 0.5).generate(
            prompt, 3, prefill_exits=True
        )
        assert margin > 1e-5
        assert out.tokens[b].tolist() == tokens
        assert out.exit_layers[b].tolist() == exit_layers


def test_rows_are_moved_and_the_cache_filled_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[tuple[str, str | None]] = set()

    def record(module: Any, name: str) -> None:
        entry = getattr(module, name)

        def recorded(*arguments: Any, implementation: str | None = None, **settings: Any) -> Any:
            asked.add((name, implementation))
            return entry(*arguments, implementation=implementation, **settings)

        monkeypatch.setattr(module, name, recorded)

    record(cache_fill, "kv_fill")
    record(survivors, "gather_rows")
    record(survivors, "scatter_rows")
    monkeypatch.setattr(survivors, "QUARTERS", (2,))
    model, routers = model_of("post norm"), routers_of("post norm")
    tokens, positions = padded_rows()

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def run(name: str | None) -> DepthOutput:
        return run_depth(
            model, tokens, positions, None, Exits.uniform(routers, 0.4, implementation=name), survivors=True
        )

    expected = run(None)
    for name in (None, "pallas_interpret"):
        assert_same(run(name), expected, positions)
        # Where no kernel is to run, a layer's rows are its own projection.
        entries = ("gather_rows", "scatter_rows") if name is None else ("kv_fill", "gather_rows", "scatter_rows")
        assert asked >= {(entry, name) for entry in entries}
    assert ("kv_fill", None) not in asked


def test_prompts_that_may_not_exit_compile_as_without_routers() -> None:
    model, routers = model_of("pre norm"), routers_of("pre norm")
    prompt = Prompt(jnp.zeros((1, TOKENS), jnp.int32), jnp.asarray([TOKENS], jnp.int32))
    cache = init_cache(model.config, 1, TOKENS, model.dtype)

    def program(exits: Exits | None) -> str:
        return str(jax.make_jaxpr(lambda: prefill(model, prompt, cache, exits))())

    shut, opened = (Exits.uniform(routers.without_metadata(), 0.5, prompt=may) for may in (False, True))
    assert program(shut) == program(None)
    assert len(program(opened)) > 3 * len(program(None))


def test_only_prompts_that_may_exit_make_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survivors, "QUARTERS", (2,))
    engine = TIDE(model_of("post norm"), routers_of("post norm"), ExitConfig(min_layers=0))
    prompts = random_prompts((16,))
    assert engine.generate(prompts, max_new_tokens=2).stats.compile_time > 0
    exiting = engine.with_config(prefill_exits=True)
    assert exiting.generate(prompts, max_new_tokens=2).stats.compile_time > 0
    for other in (engine, exiting, exiting.with_config(exit_threshold=0.3, min_layers=2)):
        assert other.generate(prompts, max_new_tokens=2).stats.compile_time == 0


def test_short_rows_have_no_branches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert survivor_sizes(TOKENS) == (12, 8, 4)
    assert survivor_sizes(TOKENS - 1) == ()
    model, routers = model_of("pre norm"), routers_of("pre norm")
    tokens, positions = padded_rows()

    def program(exits: Exits | None, fewer: bool) -> str:
        return str(jax.make_jaxpr(lambda: run_depth(model, tokens, positions, None, exits, survivors=fewer))())

    exits, recompute = (Exits.uniform(routers, 0.5, kv_strategy=kind) for kind in ("propagate", "recompute"))
    whole = program(exits, False)
    assert program(exits, True) != whole
    assert program(recompute, True) == program(recompute, False)
    assert program(None, True) == program(None, False)
    monkeypatch.setattr(survivors, "LEAST_TOKENS", TOKENS + 1)
    assert program(exits, True).count("cond[") == whole.count("cond[")

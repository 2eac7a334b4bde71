"""Recomputed caches: the brute force's tokens and layers, and the keys and values of the full model."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import BruteForce
from tiny_models import CONFIGS, random_prompts, record_layers, routed_engine, tiny_model

from tide_jax import TIDE, ExitConfig, TideError
from tide_jax.exits.exits import Exits
from tide_jax.exits.queue import QUEUE_LENGTH
from tide_jax.functional import Decoder, KVCache, decode_step, init_cache
from tide_jax.testing import constant_routers, random_routers, tiny_config

PROMPTS = random_prompts((7, 1, 12))
NEW = 2 * QUEUE_LENGTH + 3  # the queue fills more than once where everything leaves
FLOAT32_NOISE = 1e-5
DIALS: list[dict[str, Any]] = [
    {"exit_threshold": 0.5, "min_layers": 0},
    {"exit_threshold": 0.3, "min_layers": 2},
    {"exit_threshold": 0.1, "min_layers": 0},
]


@functools.cache
def engine_of(name: str) -> TIDE:
    return routed_engine(name, exit_threshold=0.5, kv_strategy="recompute")


def brute_force_of(engine: TIDE) -> BruteForce:
    config = engine.config
    return BruteForce(engine.model, engine.routers, config.exit_threshold, config.min_layers, exact=True)


@pytest.mark.matrix
@pytest.mark.parametrize("name", CONFIGS)
def test_scoring_is_the_brute_force(name: str) -> None:
    engine, prompt_lengths = engine_of(name), [3, 0, 5]
    scored = engine(PROMPTS, prompt_lengths=prompt_lengths)
    for b, (row, prompt_length) in enumerate(zip(PROMPTS, prompt_lengths, strict=True)):
        expected = brute_force_of(engine).walk(row, prompt_length)
        assert expected.margin > FLOAT32_NOISE
        assert scored.exit_layers[b, : len(row)].tolist() == expected.exit_layers
        np.testing.assert_allclose(scored.logits[b, : len(row)], expected.logits, atol=3e-5)
    assert scored.stats.layers_executed == engine.model.config.num_layers
    assert scored.stats.depth < 1.0, "something left"


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["pre norm", "sliding windows"])
@pytest.mark.parametrize("dials", DIALS)
def test_generation_is_the_brute_force(name: str, dials: dict[str, Any]) -> None:
    engine = engine_of(name).with_config(**dials)
    out = engine.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[])
    assert out.stats.depth < 1.0
    assert len(set(out.exit_layers[:, 1:].reshape(-1).tolist())) > 1, "tokens leave at different depths"
    for b, prompt in enumerate(PROMPTS):
        tokens, exit_layers, margin = brute_force_of(engine).generate(prompt, NEW)
        assert margin > FLOAT32_NOISE
        assert out.tokens[b].tolist() == tokens, b
        assert out.exit_layers[b].tolist() == exit_layers, b


@pytest.mark.matrix
@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"pre norm", "sliding windows"}))
def test_every_architecture_generates_as_the_brute_force(name: str) -> None:
    engine, prompts, new = engine_of(name).with_config(exit_threshold=0.4), PROMPTS[:1], QUEUE_LENGTH + 3
    out = engine.generate(prompts, max_new_tokens=new, eos_token_id=[])
    tokens, exit_layers, margin = brute_force_of(engine).generate(prompts[0], new)
    assert margin > FLOAT32_NOISE
    assert out.tokens[0].tolist() == tokens
    assert out.exit_layers[0].tolist() == exit_layers


def test_prompts_may_exit_and_rows_may_end() -> None:
    engine = engine_of("pre norm").with_config(prefill_exits=True)
    out = engine.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[])
    ends = [int(row[k]) for row, k in zip(out.tokens, (2, 9, NEW - 1), strict=True)]
    ended = engine.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[[e] for e in ends])
    for b, prompt in enumerate(PROMPTS):
        tokens, exit_layers, margin = brute_force_of(engine).generate(prompt, NEW, prefill_exits=True, eos=ends[b])
        assert margin > FLOAT32_NOISE
        assert ended.tokens[b, : ended.lengths[b]].tolist() == tokens
        assert ended.exit_layers[b, : ended.lengths[b]].tolist() == exit_layers


def test_streaming_is_generating() -> None:
    engine = engine_of("pre norm")
    out = engine.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[])
    steps = list(engine.stream(PROMPTS, max_new_tokens=NEW, eos_token_id=[]))
    np.testing.assert_array_equal(np.stack([s.tokens for s in steps], axis=1), out.tokens)
    assert sum(s.layers_executed for s in steps) == out.stats.layers_executed


# ------------------------------------------------------------------------------------------------------------ the cache


def exits_of(model: Decoder, threshold: float, min_layers: int = 0) -> Exits:
    routers = random_routers(model.config, interval=2)
    return Exits.uniform(routers.without_metadata(), threshold, min_layers, kv_strategy="recompute")


def rows_of_full_model(model: Decoder, tokens: np.ndarray) -> Any:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return model.run_layers(jnp.asarray(tokens), positions, None)[1]


@pytest.mark.parametrize("name", ["pre norm", "sliding windows"])
def test_the_cache_holds_the_full_models_rows_where_a_group_has_run(name: str) -> None:
    model, batch, steps = tiny_model(CONFIGS[name]), 2, 3 * QUEUE_LENGTH
    tokens = np.asarray(random_prompts((steps,) * batch), np.int32)
    full, exits = rows_of_full_model(model, tokens), exits_of(model, 0.3)
    cache = init_cache(model.config, batch, steps, model.dtype, exits=exits)
    step, waited, went_deep = jax.jit(decode_step), set(), set()
    ahead = QUEUE_LENGTH - 1
    for t in range(steps):
        out = step(model, cache, tokens[:, t], jnp.full((batch,), t, jnp.int32), jnp.full((batch,), True), exits)
        cache, ran = out.cache, np.asarray(out.cache.pending.ran) - ahead
        waited.add(int(t + 1 - ran[-1]))
        went_deep.add(int(out.layers_executed))
        assert list(ran) == sorted(ran, reverse=True)
        for layer in range(model.config.num_layers):
            group = min(layer // 2, len(ran) - 1)
            for found, expected in zip(cache.kv.layers[layer], full[layer], strict=True):
                got = np.asarray(found[:, :, ahead : ahead + ran[group]])
                np.testing.assert_allclose(got, expected[:, :, : ran[group]], atol=2e-5)
    assert len(waited) > 3, "queues of many lengths"
    assert len(went_deep) > 1


def test_a_full_queue_runs_every_layer_and_no_earlier(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config(num_layers=4))
    ran = record_layers(model, monkeypatch)
    config = ExitConfig(min_layers=2, kv_strategy="recompute")
    engine = TIDE(model, constant_routers(model.config, interval=1), config)
    out = engine.generate([PROMPTS[0]], max_new_tokens=2 * QUEUE_LENGTH + 1, eos_token_id=[])
    jax.effects_barrier()
    steps = ([2] * (QUEUE_LENGTH - 1) + [4]) * 2  # a step for each token but the last
    assert sorted(ran) == sorted(layer for layers in [4, *steps] for layer in range(layers))
    assert (out.exit_layers[0] + 1).tolist() == [4] + [2] * 2 * QUEUE_LENGTH
    assert out.stats.layers_executed == 4 + sum(steps)


@pytest.mark.matrix
@pytest.mark.parametrize("queue_length", [1, 2, 3])
def test_short_queues_give_the_same_tokens(queue_length: int) -> None:
    model = tiny_model(CONFIGS["pre norm"])
    exits, steps = exits_of(model, 0.3), 10
    tokens = np.asarray(random_prompts((steps,)), np.int32)
    states = []
    for length in (queue_length, QUEUE_LENGTH):
        cache = init_cache(model.config, 1, steps, model.dtype, exits=exits, queue_length=length)
        step, logits = jax.jit(decode_step), []
        for t in range(steps):
            out = step(model, cache, tokens[:, t], jnp.full((1,), t, jnp.int32), jnp.asarray([True]), exits)
            cache = out.cache
            logits.append(np.asarray(out.logits))
        states.append(np.stack(logits))
    np.testing.assert_allclose(states[0], states[1], atol=2e-5)


def test_a_cache_of_the_other_kind_is_refused() -> None:
    model = tiny_model(CONFIGS["pre norm"])
    exits, token = exits_of(model, 0.5), jnp.zeros((1,), jnp.int32)

    def step(cache: KVCache, exits: Exits | None) -> Any:
        return decode_step(model, cache, token, token, jnp.asarray([True]), exits)

    with pytest.raises(TideError, match="queue_length=0"):
        init_cache(model.config, 1, 4, model.dtype, exits=exits, queue_length=0)
    plain = init_cache(model.config, 1, 4, model.dtype)
    with pytest.raises(TideError, match=r"made for other exits.*init_cache"):
        step(plain, exits)
    with pytest.raises(TideError, match="made for other exits"):
        step(init_cache(model.config, 1, 4, model.dtype, exits=exits), None)

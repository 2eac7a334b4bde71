"""Exits of a model whose layers keep keys and values, states, or nothing: what skipped layers owe their states."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import BruteForce
from tiny_models import CONFIGS, random_prompts, routed_engine, tiny_model

from tide_jax import TIDE
from tide_jax.exits.deferred_fill import MOST_ROWS
from tide_jax.exits.exits import Exits
from tide_jax.exits.queue import QUEUE_LENGTH
from tide_jax.functional import Decoder, KVCache, decode_step, init_cache
from tide_jax.generation import generate
from tide_jax.model.memory import by_part
from tide_jax.model.recurrent.mixer import State
from tide_jax.testing import random_routers

PROMPTS = random_prompts((7, 1, 12))
NEW = 2 * QUEUE_LENGTH + 3  # the queue fills more than once
FLOAT32_NOISE = 1e-5


NAMES = ["hybrid", "side by side", "other recurrences", "guided", "shortcut"]
EVERY_MODEL = pytest.mark.parametrize("model_name", NAMES)
MODELS = pytest.mark.parametrize(
    "model_name", [name if name in NAMES[:2] else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)


@functools.cache
def engine_of(name: str, strategy: Any) -> TIDE:
    return routed_engine(name, exit_threshold=0.45, kv_strategy=strategy)


def check_against_brute_force(engine: TIDE, prompts: list[list[int]], rows: tuple[int, ...]) -> None:
    config, exact = engine.config, engine.config.kv_strategy == "recompute"
    brute_force = BruteForce(engine.model, engine.routers, config.exit_threshold, config.min_layers, exact)
    out = engine.generate(prompts, max_new_tokens=NEW, eos_token_id=[])
    assert len(set(out.exit_layers[:, 1:].reshape(-1).tolist())) > 1, "tokens leave at different depths"
    for b in rows:
        tokens, exit_layers, margin = brute_force.generate(prompts[b], NEW, prefill_exits=config.prefill_exits)
        assert margin > FLOAT32_NOISE
        assert out.tokens[b].tolist() == tokens, b
        assert out.exit_layers[b].tolist() == exit_layers, b


@EVERY_MODEL
@pytest.mark.parametrize("strategy", ["propagate", "recompute"])
def test_ragged_rows_generate_as_the_brute_force(strategy: str, model_name: str) -> None:
    check_against_brute_force(engine_of(model_name, strategy), PROMPTS, (0, 1, 2))


@MODELS
def test_rows_projected_at_once_are_the_brute_forces(model_name: str) -> None:
    """Larger batches do not defer."""
    prompts = random_prompts((5, 3, 4, 2, 5, 1, 6, 3, 4))
    assert len(prompts) > MOST_ROWS
    check_against_brute_force(engine_of(model_name, "propagate").with_config(prefill_exits=True), prompts, (0, 5, 8))


@MODELS
@pytest.mark.parametrize("strategy", ["propagate", "recompute"])
def test_streaming_is_generating(strategy: str, model_name: str) -> None:
    engine = engine_of(model_name, strategy)
    out = engine.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[])
    steps = list(engine.stream(PROMPTS, max_new_tokens=NEW, eos_token_id=[]))
    np.testing.assert_array_equal(np.stack([s.tokens for s in steps], axis=1), out.tokens)


@EVERY_MODEL
def test_one_pass_with_exits_is_token_by_token(model_name: str) -> None:
    """In one pass, a token that has left shows later ones what its skipped layers keep of it, and nothing else."""
    engine, row = engine_of(model_name, "propagate"), random_prompts((24,))[0]
    scored = engine([row], prompt_lengths=0)
    assert len(set(scored.exit_layers[0].tolist())) > 1, "tokens leave at different depths"
    shut, routed = (Exits.uniform(engine.routers.without_metadata(), threshold) for threshold in (1.0, 0.45))
    cache = init_cache(engine.model.config, 1, len(row), engine.model.dtype, exits=routed)
    for t, token in enumerate(row):
        place, exits = jnp.full((1,), t, jnp.int32), routed if t else shut  # the first token runs every layer
        step = jitted_step(engine.model, cache, jnp.full((1,), token, jnp.int32), place, jnp.full((1,), True), exits)
        cache = step.cache
        assert step.exit_layers[0] == scored.exit_layers[0, t]
        np.testing.assert_allclose(step.logits, scored.logits[:, t], atol=3e-5)


@MODELS
def test_a_prompt_in_chunks_leaves_the_states_of_the_whole(model_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_model(CONFIGS[model_name]), [PROMPTS[2], PROMPTS[0]]
    whole = states_after(model, prompts)
    monkeypatch.setattr(generate, "PREFILL_CHUNK", 5)
    for found, expected in zip(states_after(model, prompts), whole, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


def states_after(model: Decoder, prompts: list[list[int]]) -> list[np.ndarray]:
    """What every layer keeps of the prompts, padded on the left: keys and values of tokens, and states."""
    prompt = padded(prompts)
    cache = init_cache(model.config, len(prompts), prompt.tokens.shape[1], model.dtype)
    filled = jax.jit(lambda m, p, c: generate.prefill(m, p, c).cache)(model, prompt, cache)
    there = np.asarray(filled.positions >= 0)[:, None, :, None]
    kept = [
        by_part(
            memory, slots=lambda kv: [np.where(there, a, 0) for a in kv], state=lambda s: [np.asarray(a) for a in s]
        )
        for memory in filled.layers
    ]
    assert sum(map(np.size, jax.tree.leaves(kept))) > 0
    return jax.tree.leaves(kept)


def padded(prompts: list[list[int]]) -> generate.Prompt:
    width = max(map(len, prompts))
    tokens = [[9] * (width - len(row)) + row for row in prompts]
    return generate.Prompt(jnp.asarray(tokens, jnp.int32), jnp.asarray([len(row) for row in prompts], jnp.int32))


def test_recomputed_states_are_the_full_models_where_a_group_has_run() -> None:
    """A state stands where its group has run: behind it, tokens wait."""
    model, batch, steps = tiny_model(CONFIGS["hybrid"]), 2, 2 * QUEUE_LENGTH
    tokens = np.asarray(random_prompts((steps,) * batch), np.int32)
    routers = random_routers(model.config, interval=2).without_metadata()
    exits = Exits.uniform(routers, 0.45, 0, kv_strategy="recompute")
    cache = init_cache(model.config, batch, steps, model.dtype, exits=exits)
    full, waited = full_states(model, tokens), set()
    for t in range(steps):
        out = jitted_step(model, cache, tokens[:, t], jnp.full((batch,), t, jnp.int32), jnp.full((batch,), True), exits)
        cache, ran = out.cache, np.asarray(out.cache.pending.ran) - (QUEUE_LENGTH - 1)
        waited.add(int(t + 1 - ran[-1]))
        for layer, memory in enumerate(cache.kv.layers):
            if not isinstance(memory, State):
                continue
            for found, expected in zip(memory, full[ran[min(layer // 2, len(ran) - 1)]].layers[layer], strict=True):
                np.testing.assert_allclose(found, expected, atol=2e-5)
    assert len(waited) > 3, "queues of many lengths"


jitted_step = jax.jit(decode_step)


def full_states(model: Decoder, tokens: np.ndarray) -> list[KVCache]:
    """The full model's cache before the first token, and after each."""
    batch, steps = tokens.shape
    caches = [init_cache(model.config, batch, steps, model.dtype)]
    for t in range(steps):
        positions, active = jnp.full((batch,), t, jnp.int32), jnp.full((batch,), True)
        caches.append(jitted_step(model, caches[-1], tokens[:, t], positions, active).cache)
    return caches

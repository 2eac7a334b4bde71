"""Long rows: caches read block by block and prompts run in chunks give what one pass over the whole text gives."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, tiny_model

from tide_jax import TIDE, ExitConfig
from tide_jax.functional import Decoder, decode_step, init_cache, prefill
from tide_jax.generation.generate import PREFILL_CHUNK, Prompt
from tide_jax.model.attention.span import BLOCK
from tide_jax.testing import constant_routers

TOKENS = np.random.default_rng(1).integers(3, 259, (2, 3 * BLOCK)).astype(np.int32)


@functools.cache
def model_of(name: str) -> Decoder:
    return tiny_model(dataclasses.replace(CONFIGS[name], max_positions=2048))


@functools.cache
def logits_of(name: str) -> np.ndarray:
    return np.asarray(jax.jit(lambda m, t: m(t))(model_of(name), jnp.asarray(TOKENS)))


@functools.cache
def step() -> Any:
    return jax.jit(decode_step)


@functools.cache
def start() -> Any:
    return jax.jit(prefill)


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["pre norm", "alibi and sinks", "latent attention", "sliding windows"])
@pytest.mark.parametrize("slots", [2 * BLOCK + 71, 3 * BLOCK, 4 * BLOCK + 200])
def test_blocks_of_the_cache_are_the_whole_cache(name: str, slots: int) -> None:
    model, expected = model_of(name), logits_of(name)
    for filled in (16, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK):
        cache = init_cache(model.config, 2, slots, model.dtype)
        out = _filled(model, cache, filled)
        for at in (filled, filled + 1):
            column = jnp.full((2,), at, jnp.int32)
            out = step()(model, out.cache, jnp.asarray(TOKENS[:, at]), column, jnp.ones((2,), bool))
            np.testing.assert_allclose(out.logits, expected[:, at], atol=1e-4)


def _filled(model: Decoder, cache: Any, filled: int) -> Any:
    """Prompts of one compiled width, and a token in a slot that holds nothing yet must not be seen."""
    width = 2 * BLOCK
    padded = np.zeros((2, width), np.int32)
    padded[:, :filled] = TOKENS[:, :filled]
    out = start()(model, Prompt(jnp.asarray(padded), jnp.full((2,), width, jnp.int32)), cache)
    there = jnp.arange(out.cache.capacity)[None] < filled
    return out._replace(
        cache=out.cache._replace(positions=jnp.where(there, out.cache.positions, -1), length=jnp.int32(filled))
    )


@pytest.mark.parametrize("width", [PREFILL_CHUNK, PREFILL_CHUNK + 256, 2 * PREFILL_CHUNK])
def test_prompts_in_chunks_are_prompts_in_one_pass(width: int) -> None:
    model, lengths = model_of("sliding windows"), [min(width - 3, TOKENS.shape[1]), 5]
    tokens = np.zeros((2, width), np.int32)
    for b, n in enumerate(lengths):
        tokens[b, width - n :] = TOKENS[b, :n]
    cache = init_cache(model.config, 2, width + 8, model.dtype)
    out = start()(model, Prompt(jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32)), cache)
    expected = logits_of("sliding windows")
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(out.logits[b], expected[b, n - 1], atol=1e-4)
    assert int(out.cache.length) == width
    assert out.layers_executed == model.config.num_layers


def test_prompt_tokens_leave_in_every_chunk() -> None:
    model = model_of("pre norm")
    settings = ExitConfig(exit_threshold=0.5, min_layers=0, prefill_exits=True)
    engine = TIDE(model, constant_routers(model.config, interval=2), settings)
    prompt = np.tile(TOKENS[:1], (1, 2))[:, : PREFILL_CHUNK + 200]
    out = engine.generate(prompt, max_new_tokens=2, eos_token_id=[])
    scored = engine(prompt)
    assert out.tokens[0, 0] == np.argmax(scored.logits[0, -1])
    assert out.exit_layers[0, 0] == scored.exit_layers[0, -1] < model.config.num_layers - 1


def test_length_dependent_frequencies_see_the_whole_prompt() -> None:
    config = model_of("pre norm").config
    kind = config.attention_types[0]
    rope = dataclasses.replace(kind.rope, kind="dynamic", factor=2.0, max_positions=300)
    config = dataclasses.replace(config, attention_types=(dataclasses.replace(kind, rope=rope),))
    model, width = tiny_model(config), PREFILL_CHUNK + 256
    cache = init_cache(config, 1, width, model.dtype)
    prompt = Prompt(jnp.asarray(TOKENS[:1, :width]), jnp.full((1,), width, jnp.int32))
    expected = jax.jit(lambda m, t: m(t))(model, prompt.tokens)
    np.testing.assert_allclose(start()(model, prompt, cache).logits, expected[:, -1], atol=1e-4)

"""Rows of skipped layers that are projected later: what projecting them at once gives, and the brute force's tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import BruteForce
from tiny_models import CONFIGS, random_prompts, record_layers, routed_engine, tiny_model

from tide_jax import TIDE, ExitConfig, TideError
from tide_jax.exits import deferred_fill
from tide_jax.exits.deferred_fill import MOST_ROWS, is_faster
from tide_jax.exits.exits import Exits
from tide_jax.exits.queue import QUEUE_LENGTH
from tide_jax.functional import Decoder, KVCache, decode_step, init_cache
from tide_jax.generation import generate
from tide_jax.generation.generate import StepOutput
from tide_jax.model.architecture import AttentionType, RopeConfig
from tide_jax.testing import constant_routers, random_routers, tiny_config, tiny_decoder

PROMPTS = random_prompts((7, 12))
NEW = 2 * QUEUE_LENGTH + 3  # the queue fills more than once where everything leaves
FLOAT32_NOISE = 1e-5


@functools.cache
def engine_of(name: str) -> TIDE:
    return routed_engine(name, exit_threshold=0.45)


def check_against_brute_force(engine: TIDE, prompts: list[list[int]], new: int) -> set[int]:
    """The layers that tokens left after."""
    assert len(prompts) <= MOST_ROWS
    config = engine.config
    brute_force = BruteForce(engine.model, engine.routers, config.exit_threshold, config.min_layers)
    out = engine.generate(prompts, max_new_tokens=new, eos_token_id=[])
    for b, prompt in enumerate(prompts):
        tokens, exit_layers, margin = brute_force.generate(prompt, new, prefill_exits=config.prefill_exits)
        assert margin > FLOAT32_NOISE
        assert out.tokens[b].tolist() == tokens, b
        assert out.exit_layers[b].tolist() == exit_layers, b
    return set(out.exit_layers[:, 1:].reshape(-1).tolist())


@pytest.mark.matrix
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_generates_as_the_brute_force(name: str) -> None:
    check_against_brute_force(engine_of(name), PROMPTS[:1], QUEUE_LENGTH + 3)


@pytest.mark.matrix
@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 2)])
@pytest.mark.parametrize("dials", [{"exit_threshold": 0.3}, {"prefill_exits": True}])
def test_generation_is_the_brute_force(rows: slice, dials: dict[str, Any]) -> None:
    engine = engine_of("pre norm").with_config(**dials)
    assert len(check_against_brute_force(engine, PROMPTS[rows], NEW)) > 1, "tokens leave at different depths"


def test_where_every_token_leaves_at_once_the_queue_fills_again_and_again() -> None:
    assert check_against_brute_force(engine_of("pre norm").with_config(exit_threshold=0.1), PROMPTS, NEW) == {1}


def test_streaming_is_generating() -> None:
    out = engine_of("pre norm").generate(PROMPTS[0], max_new_tokens=NEW, eos_token_id=[])
    steps = list(engine_of("pre norm").stream(PROMPTS[0], max_new_tokens=NEW, eos_token_id=[]))
    assert [int(s.tokens[0]) for s in steps] == out.tokens[0].tolist()
    assert sum(s.layers_executed for s in steps) == out.stats.layers_executed


def test_a_skipped_layer_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config(num_layers=4))
    ran = record_layers(model, monkeypatch)
    engine = TIDE(model, constant_routers(model.config, interval=1), ExitConfig(min_layers=2))
    out = engine.generate([PROMPTS[0]], max_new_tokens=NEW, eos_token_id=[])
    jax.effects_barrier()
    assert sorted(ran) == sorted([*range(4), *([0, 1] * (NEW - 1))])
    assert out.stats.layers_executed == 4 + 2 * (NEW - 1)


@pytest.mark.slow
def test_the_engine_defers_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    known, steps = engine_of("pre norm"), []
    step = generate.deferred_step
    monkeypatch.setattr(generate, "deferred_step", lambda *a, **k: steps.append(a[1].shape[0]) or step(*a, **k))
    for rows in (1, MOST_ROWS, MOST_ROWS + 1):
        jax.clear_caches()
        engine = TIDE(known.model, known.routers, known.config)
        engine.generate(random_prompts((5,) * rows), max_new_tokens=5, eos_token_id=[])
    assert set(steps) == {1, MOST_ROWS}
    assert is_faster(known.model, MOST_ROWS)
    assert not is_faster(known.model, MOST_ROWS + 1)
    rope = RopeConfig(theta=10000.0, rotary_dim=8, kind="dynamic", factor=2.0, max_positions=16)
    changing = tiny_config(attention_types=(AttentionType(scale=8**-0.5, rope=rope),))
    assert not is_faster(tiny_model(changing), 1), "keys made later would turn by other frequencies"


def test_a_gpu_defers_where_loops_are_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine_of("pre norm").model
    monkeypatch.setattr(deferred_fill, "_platforms", lambda model: {"gpu"})
    assert is_faster(model, 1, graphs=True)
    assert not is_faster(model, 1)
    assert not is_faster(model, MOST_ROWS + 1, graphs=True)


def test_on_a_gpu_rows_are_written_in_the_order_of_the_cache() -> None:
    """Without this, XLA transposes the whole cache at every step (make gpu-aot)."""
    model = engine_of("pre norm").model
    exits = exits_of(model, 0.3, deferred=True)
    cache = init_cache(model.config, 1, 8, model.dtype, exits=exits)
    token = jnp.zeros((1,), jnp.int32)
    traced = jax.jit(decode_step).trace(model, cache, token, token, token == 0, exits)
    # Keys and values of each layer, those that were missing and the step's own.
    wanted = {"cuda": 4 * model.config.num_layers, "cpu": 0}
    for platform, count in wanted.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("LayoutConstraint") == count, platform


def test_bfloat16_generates() -> None:
    model = tiny_decoder(tiny_config(num_layers=4), dtype=jnp.bfloat16)
    routers = random_routers(model.config, interval=2, affine=True, translator_rank=3, model=model)
    engine = TIDE(model, routers, ExitConfig(exit_threshold=0.3, min_layers=0))
    out = engine.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[])
    assert out.stats.depth < 1.0
    assert out.lengths.tolist() == [NEW, NEW]


# ------------------------------------------------------------------------------------------------------- one step


def exits_of(model: Decoder, threshold: float, *, deferred: bool, translator_rank: int | None = 3) -> Exits:
    routers = random_routers(model.config, interval=2, translator_rank=translator_rank)
    return Exits.uniform(routers.without_metadata(), threshold, deferred=deferred)


def decoded(
    model: Decoder,
    exits: Exits,
    active: np.ndarray,
    queue_length: int = QUEUE_LENGTH,
    slots: int | None = None,
) -> list[StepOutput]:
    """Steps over the same random tokens; `active` [steps, B] says which rows go on."""
    steps, batch = active.shape
    tokens = np.asarray(random_prompts((steps,) * batch), np.int32)
    cache = init_cache(
        model.config,
        batch,
        slots or steps,
        model.dtype,
        exits=exits,
        queue_length=queue_length,
    )
    step, outs = jax.jit(decode_step), []
    for t in range(steps):
        outs.append(step(model, cache, tokens[:, t], jnp.full((batch,), t, jnp.int32), active[t], exits))
        cache = outs[-1].cache
    return outs


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["pre norm", "sliding windows", "latent attention"])
@pytest.mark.parametrize("queue_length", [1, 2, 3, QUEUE_LENGTH])
def test_steps_and_caches_are_those_of_projecting_at_once(name: str, queue_length: int) -> None:
    model, steps = tiny_model(CONFIGS[name]), 3 * QUEUE_LENGTH
    active = np.ones((steps, 2), bool)
    active[steps // 2 :, 1] = False  # a row that ends
    later = decoded(model, exits_of(model, 0.3, deferred=True), active, queue_length)
    at_once = decoded(model, exits_of(model, 0.3, deferred=False), active)
    waited, depths, ahead = set(), set(), queue_length - 1
    for t, (found, expected) in enumerate(zip(later, at_once, strict=True)):
        np.testing.assert_allclose(found.logits[active[t]], expected.logits[active[t]], atol=2e-5)
        assert found.exit_layers.tolist() == expected.exit_layers.tolist()
        assert found.layers_executed == expected.layers_executed
        ran = np.asarray(found.cache.pending.ran) - ahead
        assert list(ran) == sorted(ran, reverse=True)
        waited.add(int(t + 1 - ran[-1]))
        depths.add(int(found.layers_executed))
        check_cache(found.cache.kv, expected.cache, ran, ahead)
    assert max(waited) < queue_length
    assert len(waited) > min(queue_length, 3) - 1, "queues of many lengths"
    assert len(depths) > 1


def check_cache(found: KVCache, expected: KVCache, ran: np.ndarray, ahead: int) -> None:
    """Rows of every group, as far as it has seen to them. Those of rows that have ended nobody reads."""
    real = np.asarray(expected.positions) >= 0
    for layer, pair in enumerate(zip(found.layers, expected.layers, strict=True)):
        count = ran[min(layer // 2, len(ran) - 1)]
        for got, wanted in zip(*pair, strict=True):
            rows = np.asarray(got)[:, :, ahead : ahead + count].swapaxes(1, 2)[real[:, :count]]
            np.testing.assert_allclose(
                rows, np.asarray(wanted)[:, :, :count].swapaxes(1, 2)[real[:, :count]], atol=2e-5
            )


def test_what_waits_is_in_none_of_a_long_caches_blocks() -> None:
    model, active = tiny_model(CONFIGS["sliding windows"]), np.ones((2 * QUEUE_LENGTH, 2), bool)
    exits = exits_of(model, 0.3, deferred=True)
    short, long = (decoded(model, exits, active, slots=slots) for slots in (2 * QUEUE_LENGTH, 1000))
    np.testing.assert_allclose([s.logits for s in long], [s.logits for s in short], atol=2e-5)


@pytest.mark.parametrize("rank", [None, 0])
def test_routers_need_no_translators(rank: int | None) -> None:
    model, active = tiny_model(CONFIGS["pre norm"]), np.ones((QUEUE_LENGTH + 2, 1), bool)
    later = decoded(model, exits_of(model, 0.3, deferred=True, translator_rank=rank), active)
    at_once = decoded(model, exits_of(model, 0.3, deferred=False, translator_rank=rank), active)
    np.testing.assert_allclose([s.logits for s in later], [s.logits for s in at_once], atol=2e-5)


def test_a_cache_of_another_kind_is_refused() -> None:
    model, token = tiny_model(CONFIGS["pre norm"]), jnp.zeros((1,), jnp.int32)
    exits = exits_of(model, 0.5, deferred=True)

    def step(exits: Exits, made_for: Exits | None) -> Any:
        cache = init_cache(model.config, 1, 4, model.dtype, exits=made_for)
        return decode_step(model, cache, token, token, jnp.asarray([True]), exits)

    run_later = dataclasses.replace(exits, kv_strategy="recompute", deferred=False)
    at_once, other_codes = (
        dataclasses.replace(exits, deferred=False),
        exits_of(model, 0.5, deferred=True, translator_rank=2),
    )
    step(exits, exits)
    for wanted, made_for in (
        (exits, None),
        (exits, run_later),
        (exits, other_codes),
        (run_later, exits),
        (at_once, exits),
        (run_later, None),
    ):
        with pytest.raises(TideError, match=r"made for other exits.*init_cache\(\.\.\., exits=exits\)"):
            step(wanted, made_for)

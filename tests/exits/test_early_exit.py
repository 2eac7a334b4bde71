"""Early exit: full depth as in a plain pass, exits against the brute force, and layers that are really not run."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import BruteForce
from tiny_models import CONFIGS, random_prompts, record_layers, tiny_model, with_parameters

from tide_jax import TIDE, ExitConfig, TideError
from tide_jax.exits.depth import run_depth
from tide_jax.functional import Decoder, KVCache, init_cache
from tide_jax.model.attention.span import KeyValue
from tide_jax.model.layers import DecoderLayer
from tide_jax.testing import constant_routers, random_routers, tiny_config, tiny_decoder

PROMPTS = random_prompts((7, 1, 12))
NEW = 6
AFFINE = ("sandwich norms", "parallel", "sliding windows")
SECOND_LOOKS = tuple(CONFIGS)[::2]
TRANSLATOR_RANKS = {name: (None, 3, 0)[i % 3] for i, name in enumerate(CONFIGS)}
FLOAT32_NOISE = 1e-5  # scores closer to a threshold than this decide nothing


@functools.cache
def model_of(name: str) -> Decoder:
    return tiny_model(CONFIGS[name])


@functools.cache
def engine_of(name: str) -> TIDE:
    """One engine for each model, some with affine heads, translators or a second look: its compiled programs are shared
    by all tests."""
    config, rank = CONFIGS[name], TRANSLATOR_RANKS[name]
    interval = 2 if config.num_layers > 4 else 1
    looks = model_of(name) if name in SECOND_LOOKS else None
    routers = random_routers(config, interval=interval, affine=name in AFFINE, translator_rank=rank, model=looks)
    return TIDE(model_of(name), routers, ExitConfig(exit_threshold=0.5, min_layers=0))


def brute_force_of(engine: TIDE) -> BruteForce:
    return BruteForce(engine.model, engine.routers, engine.config.exit_threshold, engine.config.min_layers)


# -------------------------------------------------------------------------------------------------------- full depth


class Pass(NamedTuple):
    """A prompt and the token after it: final-normed states and new cache rows of both."""

    prompt: jax.Array
    prompt_rows: KeyValue
    token: jax.Array
    token_rows: KeyValue


def two_passes(run: Any, model: Decoder, tokens: jax.Array, positions: jax.Array) -> Pass:
    """`run` on all tokens but the last, then on the last one with a cache."""
    head, tail = (tokens[:, :-1], positions[:, :-1]), (tokens[:, -1:], positions[:, -1:])
    prompt, rows = run(model, *head, None)
    cache = init_cache(model.config, tokens.shape[0], tokens.shape[1] + 3, model.dtype)
    cache = cache.append(rows, head[1], model.layers)
    return Pass(prompt, rows, *run(model, *tail, cache))


def plain(model: Decoder, tokens: jax.Array, positions: jax.Array, cache: KVCache | None) -> tuple:
    x, rows = model.run_layers(tokens, positions, cache)
    return model.final_norm(x), rows


def with_exits_off(model: Decoder, tokens: jax.Array, positions: jax.Array, cache: KVCache | None) -> tuple:
    out = run_depth(model, tokens, positions, cache)
    return out.states, out.new


@pytest.mark.matrix
@pytest.mark.parametrize("name", CONFIGS)
def test_without_routers_a_pass_is_the_plain_one(name: str) -> None:
    """To a rounding: without a loop in between, XLA fuses sums with what lies beside them, and their order changes."""
    model = model_of(name)
    tokens = jnp.asarray(random_prompts((9, 9)), jnp.int32)
    positions = jnp.asarray([range(9), [-1, -1, *range(7)]], jnp.int32)
    equal = functools.partial(np.testing.assert_allclose, rtol=0, atol=4e-6)
    jitted = jax.jit(two_passes, static_argnums=0)
    expected, found = (jitted(run, model, tokens, positions) for run in (plain, with_exits_off))
    real = np.asarray(positions) >= 0
    equal(np.asarray(found.prompt)[real[:, :-1]], np.asarray(expected.prompt)[real[:, :-1]])
    equal(found.token, expected.token)
    for rows, expected_rows in ((found.prompt_rows, expected.prompt_rows), (found.token_rows, expected.token_rows)):
        jax.tree.map(equal, rows, expected_rows)


def test_full_generation_is_a_plain_greedy_loop() -> None:
    engine, prompt = engine_of("post norm"), PROMPTS[0]
    out = engine.generate([prompt], max_new_tokens=NEW, mode="full", eos_token_id=[])
    model = engine.model

    @jax.jit
    def forward(model: Decoder, tokens: jax.Array, positions: jax.Array, cache: KVCache) -> tuple:
        x, rows = model.run_layers(tokens, positions, cache)
        return model.logits(model.final_norm(x[:, -1:]))[0, 0], cache.append(rows, positions, model.layers)

    cache = init_cache(model.config, 1, 32, model.dtype)
    tokens, start, expected = prompt, 0, []
    for _ in range(NEW):
        positions = jnp.arange(start, start + len(tokens), dtype=jnp.int32)[None]
        logits, cache = forward(model, jnp.asarray([tokens], jnp.int32), positions, cache)
        start, tokens = start + len(tokens), [int(np.argmax(logits))]
        expected += tokens
    assert out.tokens[0].tolist() == expected
    assert (out.exit_layers == model.config.num_layers - 1).all()
    assert out.stats.layers_executed == NEW * model.config.num_layers


def test_routers_that_nobody_passes_change_nothing() -> None:
    engine = engine_of("pre norm")
    shut = engine.with_config(exit_threshold=1.0)
    found, expected = shut(PROMPTS).logits, engine(PROMPTS, mode="full").logits
    for b, row in enumerate(PROMPTS):
        np.testing.assert_allclose(found[b, : len(row)], expected[b, : len(row)], atol=1e-5)
    assert shut(PROMPTS).stats.depth == 1.0


# ------------------------------------------------------------------------------------------------------ the definition

DIALS: list[dict[str, Any]] = [
    {"exit_threshold": 0.5, "min_layers": 0},
    {"exit_threshold": 0.3, "min_layers": 3},
    {"exit_threshold": 0.8, "min_layers": 2},
    {"exit_threshold": 0.1, "min_layers": 2},
]


@pytest.mark.parametrize("name", CONFIGS)
def test_scoring_is_the_brute_force(name: str) -> None:
    left_at: set[int] = set()
    for dials in DIALS:
        layers = engine_of(name).model.config.num_layers
        engine = engine_of(name).with_config(**(dials | {"min_layers": min(layers, dials["min_layers"])}))
        prompt_lengths = [3, 0, 5]
        scored = engine(PROMPTS, prompt_lengths=prompt_lengths)
        for b, (row, prompt_length) in enumerate(zip(PROMPTS, prompt_lengths, strict=True)):
            expected = brute_force_of(engine).walk(row, prompt_length)
            assert expected.margin > FLOAT32_NOISE
            assert scored.exit_layers[b, : len(row)].tolist() == expected.exit_layers, (dials, b)
            np.testing.assert_allclose(scored.logits[b, : len(row)], expected.logits, atol=3e-5, err_msg=f"{dials}")
            left_at |= set(expected.exit_layers)
    assert left_at == {*engine.routers.exit_points, engine.model.config.num_layers - 1}, "every exit was taken"


@pytest.mark.matrix(keep=2)
@pytest.mark.parametrize("name", ["pre norm", "sliding windows"])
@pytest.mark.parametrize("prefill_exits", [False, True])
def test_generation_is_the_brute_force(name: str, prefill_exits: bool) -> None:
    left_at: set[int] = set()
    for dials in DIALS:
        engine = engine_of(name).with_config(**dials, prefill_exits=prefill_exits)
        out = engine.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[])
        for b, prompt in enumerate(PROMPTS):
            tokens, exit_layers, margin = brute_force_of(engine).generate(prompt, NEW, prefill_exits=prefill_exits)
            assert margin > FLOAT32_NOISE
            assert out.tokens[b].tolist() == tokens, (dials, b)
            assert out.exit_layers[b].tolist() == exit_layers, (dials, b)
            left_at |= set(exit_layers)
    assert left_at == {*engine.routers.exit_points, engine.model.config.num_layers - 1}, "every exit was taken"


def test_each_exit_point_has_its_threshold() -> None:
    engine = engine_of("pre norm").with_config(exit_threshold=(0.9, 0.2))
    scored = engine(PROMPTS)
    for b, row in enumerate(PROMPTS):
        expected = brute_force_of(engine).walk(row, 0)
        assert expected.margin > FLOAT32_NOISE
        assert scored.exit_layers[b, : len(row)].tolist() == expected.exit_layers
    assert not np.array_equal(scored.exit_layers, engine.with_config(exit_threshold=(0.2, 0.9))(PROMPTS).exit_layers)


def test_a_tilt_is_these_thresholds() -> None:
    engine = engine_of("pre norm")
    tilted = engine.with_config(exit_threshold=0.5, threshold_tilt=1.0)
    thresholds = tilted.config.thresholds(engine.routers.exit_points, engine.model.config.num_layers)
    assert thresholds[0] < 0.5 < thresholds[-1]
    expected = engine.with_config(exit_threshold=thresholds)(PROMPTS).exit_layers
    np.testing.assert_array_equal(tilted(PROMPTS).exit_layers, expected)
    assert not np.array_equal(engine(PROMPTS).exit_layers, expected)


def test_scoring_the_generated_row_gives_its_exit_layers() -> None:
    engine = engine_of("sliding windows")
    out = engine.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[])
    rows = [prompt + out.tokens[b].tolist() for b, prompt in enumerate(PROMPTS)]
    scored = engine(rows, prompt_lengths=[len(prompt) for prompt in PROMPTS])
    for b, prompt in enumerate(PROMPTS):
        span = slice(len(prompt) - 1, len(prompt) + NEW - 1)
        assert scored.exit_layers[b, span].tolist() == out.exit_layers[b].tolist()
        assert np.argmax(scored.logits[b, span], axis=-1).tolist() == out.tokens[b].tolist()


def test_the_first_token_never_leaves_and_padding_has_no_layer() -> None:
    layers = engine_of("pre norm").with_config(exit_threshold=0.0)(PROMPTS).exit_layers
    assert layers.shape == (3, 12)
    for b, row in enumerate(PROMPTS):
        assert layers[b].tolist() == [4] + [1] * (len(row) - 1) + [-1] * (12 - len(row))


def test_rows_leave_independently_of_each_other() -> None:
    engine = engine_of("sliding windows").with_config(exit_threshold=0.5)
    together = engine.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[])
    assert len({tuple(layers) for layers in together.exit_layers.tolist()}) == 3, "the rows differ"
    deepest = together.exit_layers.max(axis=0) + 1
    assert together.stats.layers_executed == deepest.sum() < NEW * engine.model.config.num_layers
    for b, prompt in enumerate(PROMPTS):
        alone = engine.generate([prompt], max_new_tokens=NEW, eos_token_id=[])
        assert alone.tokens[0].tolist() == together.tokens[b].tolist()
        assert alone.exit_layers[0].tolist() == together.exit_layers[b].tolist()
        assert alone.stats.layers_executed == alone.stats.layers_run


# ------------------------------------------------------------------------------------------------------- real skipping


def test_a_skipped_layer_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config(num_layers=4))
    ran = record_layers(model, monkeypatch)
    engine = TIDE(model, constant_routers(model.config, interval=1), ExitConfig(min_layers=0))
    for depth in (1, 3):
        ran.clear()
        out = engine.with_config(min_layers=depth).generate([PROMPTS[0]], max_new_tokens=4, eos_token_id=[])
        jax.effects_barrier()
        expected = [4, depth, depth, depth]  # the prompt, and a step for each token but the last
        assert sorted(ran) == sorted(layer for layers in expected for layer in range(layers))
        assert (out.exit_layers[0] + 1).tolist() == expected
        assert out.stats.layers_executed == out.stats.layers_run == sum(expected)


def poisoned(model: Decoder, layers: range) -> Decoder:
    """NaN in everything that running these layers needs, but not in what projects keys and values."""
    names = ("attention.q.kernel", "attention.out.kernel", "mlp.gate_up.kernel", "mlp.down.kernel")
    return with_parameters(model, {f"layers.{i}.{name}": np.nan for i in layers for name in names})


def test_nothing_of_a_skipped_layer_reaches_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    good = engine_of("pre norm").with_config(exit_threshold=0.0, min_layers=2, prefill_exits=True)
    bad = TIDE(poisoned(good.model, range(2, 5)), good.routers, good.config)
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[2][:5]]
    expected, found = (engine.generate(prompts, max_new_tokens=NEW, eos_token_id=[]) for engine in (good, bad))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert (found.exit_layers == 1).all()
    # In scoring, position 0 runs the broken layers beside tokens that have left. The engine refuses such logits, so its
    # check has to be out of the way to see which tokens the damage reaches.
    with pytest.raises(TideError, match="logits are not finite"):
        bad(prompts)
    monkeypatch.setattr("tide_jax.generation.scoring.check_finite", lambda *_: None)
    logits = np.asarray(bad(prompts).logits)
    assert np.isnan(logits[0, 0]).all()
    assert np.isfinite(logits[0, 1 : len(prompts[0])]).all()
    # One group further the damage is on every token's way.
    logits = np.asarray(bad.with_config(min_layers=4)(prompts).logits)
    assert np.isnan(logits[0, : len(prompts[0])]).all()


# ----------------------------------------------------------------------------------------------------- no recompilation


def test_dials_never_recompile() -> None:
    engine = engine_of("pre norm")
    key = jax.random.key(0)
    first = engine.generate(PROMPTS, max_new_tokens=NEW, temperature=0.5, key=key, eos_token_id=3)
    assert first.stats.wall_time > 0
    changed = [
        (engine.with_config(exit_threshold=0.9), PROMPTS, {}),
        (engine.with_config(exit_threshold=(0.1, 0.2)), PROMPTS, {}),
        (engine.with_config(min_layers=5), PROMPTS, {}),
        (engine, PROMPTS, {"temperature": 0.0}),
        (engine, PROMPTS, {"temperature": 2.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.2}),
        (engine, random_prompts((2, 14, 16)), {}),
        (engine, np.asarray(random_prompts((10, 10, 10))), {}),
        (engine, PROMPTS, {"max_new_tokens": 13}),
        (engine, PROMPTS, {"eos_token_id": 17}),
        (engine, PROMPTS, {"eos_token_id": [[1], [2], [3]]}),
        (engine, PROMPTS, {"key": jax.random.key(7)}),
        (engine, PROMPTS, {"pad_token_id": 9}),
    ]
    for other, prompts, arguments in changed:
        arguments = {"max_new_tokens": NEW, "temperature": 0.5, "key": key, "eos_token_id": 3} | arguments
        assert other.generate(prompts, **arguments).stats.compile_time == 0.0, arguments
    assert engine.generate(random_prompts((17,) * 3), max_new_tokens=NEW).stats.compile_time > 0.0, "another bucket"


def test_another_fit_of_the_same_shape_scores_without_compiling() -> None:
    engine = engine_of("pre norm")
    engine(PROMPTS)
    assert engine.with_config(exit_threshold=0.61, min_layers=1)(PROMPTS).stats.compile_time == 0.0
    assert engine(PROMPTS, prompt_lengths=[1, 0, 4]).stats.compile_time == 0.0


def test_layers_of_one_structure_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced, run = [], DecoderLayer._run
    monkeypatch.setattr(DecoderLayer, "_run", lambda layer, *args: traced.append(layer) or run(layer, *args))
    model = tiny_decoder(tiny_config(num_layers=12, max_positions=77))
    jax.jit(model).lower(jnp.zeros((1, 11), jnp.int32))
    assert len(traced) == 1

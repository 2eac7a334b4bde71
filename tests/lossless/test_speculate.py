"""Lossless generation: the tokens of full depth whatever is drafted, fewer passes where drafts hold, bounded losses."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draft_costs import CPU, DEAR, FREE, TWIN, costs_of
from tiny_models import CONFIGS, engine_over, random_prompts, tiny_model

from tide_jax import TIDE, DriftMonitor, TideError
from tide_jax.functional import (
    PassCosts,
    advance_lossless,
    begin_lossless,
    generate_lossless,
    measure_pass_costs,
)
from tide_jax.generation.batch import bucket, eos_table, pad_left
from tide_jax.generation.generate import Prompt, Request
from tide_jax.generation.logit_rules import make_rules
from tide_jax.generation.sampling import make_sampling
from tide_jax.lossless.control import DraftControl
from tide_jax.lossless.drafts import text_drafts
from tide_jax.lossless.speculate import TEXT_ONLY, LosslessGenerated
from tide_jax.lossless.twin import TwinDrafter, make_twin
from tide_jax.model.generation_settings import GenerationSettings
from tide_jax.testing import tiny_config

NEW = 37
STATIC = ("capacity", "most_slots")
# One of each way to read the cache.
ARCHITECTURES = ("pre norm", "experts", "alibi and sinks", "latent attention", "sliding windows", "gated output")
PROMPTS = random_prompts((7, 1, 12, 9))


@functools.cache
def engine_of(name: str) -> TIDE:
    config = CONFIGS[name]
    if name == "pre norm":  # a pass runs all layers: two show what five would, and compile in half the time
        config = dataclasses.replace(config, num_layers=2, layer_pattern=(0, 0))
    return engine_over(config, exit_threshold=0.5)


@pytest.fixture(scope="module")
def twin() -> TwinDrafter:
    """That of the model most tests take."""
    return TwinDrafter(make_twin(engine_of("pre norm").model))


@functools.cache
def program() -> Any:
    # A function of its own: what is traced for `generate_lossless` is kept, and a test changes what it calls.
    return jax.jit(lambda *given, **static: generate_lossless(*given, **static), static_argnames=STATIC)


def lossless(
    engine: TIDE,
    prompts: Any,
    new: int = NEW,
    *,
    costs: PassCosts | None = None,
    eos: Any = (),
    key: int = 0,
    most_slots: int = 8,
    rules: Any = None,
    twin: TwinDrafter | None = None,
    **dials: Any,
) -> LosslessGenerated:
    """The pure function with the text's drafts; with a twin, these and the twin's. Without costs, drafts are cheap."""
    lengths = np.asarray([len(p) for p in prompts], np.int32)
    prompt = Prompt(jnp.asarray(pad_left(prompts, bucket(int(lengths.max())))), jnp.asarray(lengths))
    request = Request(
        sampling=make_sampling(**dials),
        key=jax.random.key(key),
        eos=jnp.asarray(eos_table(list(eos), len(prompts))),
        pad=jnp.int32(0),
        max_new_tokens=jnp.int32(new),
        rules=None if rules is None else make_rules(GenerationSettings(**rules), engine.model.config.vocab_size),
    )
    drafters = TEXT_ONLY if twin is None else (*TEXT_ONLY, twin)
    if costs is None:
        costs = FREE if twin is None else TWIN
    arguments = (engine.model, prompt, request, costs, None, drafters)
    return program()(*arguments, capacity=bucket(new), most_slots=most_slots)


def assert_full(engine: TIDE, prompts: Any, out: LosslessGenerated, new: int = NEW, **options: Any) -> None:
    full = engine.generate(prompts, max_new_tokens=new, mode="full", **({"eos_token_id": []} | options))
    for b in range(len(prompts)):
        assert int(out.lengths[b]) == full.lengths[b], b
        assert out.tokens[b, : full.lengths[b]].tolist() == full.tokens[b, : full.lengths[b]].tolist(), b


@pytest.mark.matrix
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_make_the_tokens_of_full_depth(name: str) -> None:
    engine = engine_of(name)
    out = lossless(engine, PROMPTS)
    assert_full(engine, PROMPTS, out)
    assert 0 < out.counts.accepted < out.counts.drafted, "some drafts hold, some fail"


@pytest.mark.matrix
@pytest.mark.parametrize("most_slots", [1, 2, 3, 11])
def test_passes_of_any_width(most_slots: int) -> None:
    engine, costs = engine_of("pre norm"), FREE
    if most_slots < 3:
        costs = FREE._replace(passes=FREE.passes[:most_slots])
    out = lossless(engine, PROMPTS, costs=costs, most_slots=most_slots)
    assert_full(engine, PROMPTS, out)
    assert (out.counts.accepted > 0) == (most_slots > 1)


@pytest.mark.slow
def test_hundreds_of_prompts() -> None:
    engine = engine_of("pre norm")
    rng = np.random.default_rng(3)
    accepted = drafted = 0
    for _ in range(30):
        lengths = rng.integers(1, 16, 8)
        prompts = [rng.integers(0, 259, n).tolist() for n in lengths]
        prompts = [p * 3 if rng.random() < 0.5 else p for p in prompts]
        prompts[0] = prompts[0] + [5] * (48 - len(prompts[0]))  # one shape for all
        out = lossless(engine, prompts, 24, costs=FREE if rng.random() < 0.5 else CPU)
        assert_full(engine, prompts, out, 24)
        accepted, drafted = accepted + int(out.counts.accepted), drafted + int(out.counts.drafted)
    assert 0 < accepted < drafted


def test_one_row_makes_fewer_passes_where_its_text_repeats() -> None:
    engine, prompt = engine_of("pre norm"), [list(range(20, 40)) * 2]
    out = lossless(engine, prompt, 48)
    assert_full(engine, prompt, out, 48)
    assert out.counts.passes < 48, "a pass makes more than a token"


@pytest.mark.matrix
@pytest.mark.parametrize(
    "dials",
    [
        {"temperature": 0.8},
        {"temperature": 0.3, "top_k": 5},
        {"temperature": 1.2, "top_p": 0.7, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.5},
    ],
)
def test_sampling_draws_what_full_depth_draws_with_the_same_key(
    dials: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts here are full depth's own tokens, but for every third: sampled text hardly repeats itself."""
    engine, width = engine_of("pre norm"), bucket(max(map(len, PROMPTS)))
    for seed in range(3):
        key = jax.random.key(seed)
        made = engine.generate(PROMPTS, max_new_tokens=NEW, mode="full", eos_token_id=[], key=key, **dials).tokens
        known = jnp.asarray(np.pad(made, ((0, 0), (width, 8))))

        def drafter(tokens: Any, start: Any, end: Any, count: int, known: Any = known) -> Any:
            columns = end[:, None] + jnp.arange(count)[None]
            guesses = jnp.take_along_axis(known, columns, axis=1, mode="clip") + (columns % 3 == 0).astype(jnp.int32)
            return guesses.astype(jnp.int32), jnp.full(end.shape, 8, jnp.int32)

        monkeypatch.setattr("tide_jax.lossless.drafts.text_drafts", drafter)
        program.cache_clear()
        out = lossless(engine, PROMPTS, key=seed, **dials)
        assert_full(engine, PROMPTS, out, key=key, **dials)
        assert 0 < out.counts.accepted < out.counts.drafted
    program.cache_clear()


@pytest.mark.matrix
@pytest.mark.parametrize("dials", [{}, {"temperature": 0.8}, {"repetition_penalty": 1.4}], ids=str)
@pytest.mark.parametrize(
    "rules",
    [
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7], *([a, b] for a in range(0, 259, 3) for b in range(0, 259, 9))]},
        {"min_new_tokens": 9, "suppress_tokens": list(range(3, 200))},
        {"min_length": 15, "begin_suppress_tokens": list(range(3, 200)), "forced_eos_token_id": [4, 9]},
    ],
    ids=lambda rules: next(iter(rules)),
)
def test_rules_hold_for_drafts_and_answers(rules: dict[str, Any], dials: dict[str, float]) -> None:
    """Ends lie among the tokens that are likely, so that least lengths matter; n-gram drafts would break rules."""
    engine, eos = engine_of("pre norm"), sorted({*PROMPTS[0], *range(200, 230)})
    prompts = [prompt * 3 for prompt in PROMPTS]
    for seed in (0, 1):
        out = lossless(engine, prompts, eos=eos, key=seed, rules=rules, **dials)
        assert_full(engine, prompts, out, eos_token_id=eos, key=jax.random.key(seed), **rules, **dials)


def test_sampled_tokens_have_the_full_models_distribution() -> None:
    engine, rows, temperature = engine_of("pre norm"), 64, 0.25
    prompt = [11, 12, 13, 11, 12]
    counts = np.zeros((engine.model.config.vocab_size,))
    drawn, second = [], np.zeros_like(counts)
    for seed in range(24):
        out = lossless(engine, [prompt] * rows, 2 + 1, key=seed, temperature=temperature)
        drawn += np.asarray(out.tokens)[:, :3].tolist()
    firsts = sorted({row[0] for row in drawn})
    logits = np.asarray(engine([[*prompt, t] for t in firsts], mode="full").logits)
    first = np.asarray(jax.nn.softmax(logits[0, len(prompt) - 1] / temperature))
    after = np.asarray(jax.nn.softmax(logits[:, len(prompt)] / temperature, axis=-1))
    weights = np.asarray([first[t] for t in firsts])
    second = weights @ after / weights.sum()
    for column, expected in ((0, first), (1, second)):
        counts = np.bincount([row[column] for row in drawn], minlength=len(expected)) / len(drawn)
        likely = expected > 0.01
        error = np.sqrt(expected * (1 - expected) / len(drawn))
        assert np.all(np.abs(counts - expected)[likely] < 4.5 * error[likely] + 0.002)


@pytest.mark.matrix
@pytest.mark.parametrize("new", [1, 2, 3, 16])
def test_generations_of_any_length(new: int) -> None:
    engine = engine_of("pre norm")
    out = lossless(engine, PROMPTS, new)
    assert out.lengths.tolist() == [new] * len(PROMPTS)
    assert_full(engine, PROMPTS, out, new)


def test_no_draft_behind_an_end_of_sequence_token_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """All drafts are full depth's own tokens, and one in the middle ends the row."""
    engine, width, key = engine_of("pre norm"), bucket(len(PROMPTS[0])), jax.random.key(1)
    options = {"key": key, "temperature": 1.0}
    made = engine.generate(PROMPTS[:1], max_new_tokens=NEW, mode="full", eos_token_id=[], **options).tokens
    known = jnp.asarray(np.pad(made, ((0, 0), (width, 8))))

    def drafter(tokens: Any, start: Any, end: Any, count: int) -> Any:
        found = jnp.take_along_axis(known, end[:, None] + jnp.arange(count)[None], axis=1, mode="clip")
        return found.astype(jnp.int32), jnp.full(end.shape, 8, jnp.int32)

    monkeypatch.setattr("tide_jax.lossless.drafts.text_drafts", drafter)
    program.cache_clear()
    for at in range(2, 7):
        eos = int(made[0, at])
        out = lossless(engine, PROMPTS[:1], eos=[eos], key=1, temperature=1.0)
        assert_full(engine, PROMPTS[:1], out, eos_token_id=[eos], **options)
        assert int(out.lengths[0]) <= at + 1 < NEW
    program.cache_clear()


def test_rows_end_at_their_end_of_sequence_token() -> None:
    engine = engine_of("pre norm")
    free = engine.generate(PROMPTS, max_new_tokens=NEW, mode="full", eos_token_id=[]).tokens
    for at in (0, 3, 11):
        eos = sorted({int(free[0, at]), int(free[2, 2 * at])})
        out = lossless(engine, PROMPTS, eos=eos)
        assert_full(engine, PROMPTS, out, eos_token_id=eos)
        assert int(out.lengths.min()) < NEW


def test_slots_last_though_one_rows_drafts_hold_and_anothers_fail() -> None:
    engine = engine_of("pre norm")
    prompts = [[7] * 30, *random_prompts((5, 29, 13, 8, 21))]
    out = lossless(engine, prompts, 96)
    assert_full(engine, prompts, out, 96)


def test_drafts_that_cost_more_than_they_bring_are_not_made() -> None:
    out = lossless(engine_of("pre norm"), [[7] * 30], costs=DEAR)
    assert out.counts.drafted == 0
    assert out.counts.passes == NEW


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drafters": ()}, "needs a drafter"),
        ({"control": DraftControl.start(TEXT_ONLY * 2)}, r"control has rates of shape \(8,\), .* need \(4,\)"),
        ({"costs": TWIN}, r"passes \(3,\), drafts \(2,\), attention \(\); expected \(3,\), \(1,\) and \(\)"),
        ({"costs": costs_of(1.0, 1.0)}, "call measure_pass_costs with these drafters and this most_slots"),
    ],
    ids=["no drafters", "control", "drafters", "widths"],
)
def test_costs_and_rates_of_others_are_refused(changes: dict[str, Any], message: str) -> None:
    """Read with other indices, they would say something else in silence."""
    given = {"costs": FREE, "control": None, "drafters": TEXT_ONLY} | changes
    prompt, request = new_call([1, 2, 3], 4)
    with pytest.raises(TideError, match=message) as caught:
        generate_lossless(engine_of("pre norm").model, prompt, request, capacity=4, **given)
    assert "\n" not in str(caught.value)


def test_the_verifier_tells_whether_drafts_would_have_held() -> None:
    """Drafts cost too much here to be made; rows that copy themselves, and rows that do not, tell all the same."""
    engine = engine_of("pre norm")
    made = engine.generate([PROMPTS[0]], max_new_tokens=96, mode="full", eos_token_id=[]).tokens[0].tolist()
    for text in (made[-12:] * 4, made):
        out = lossless(engine, [text[:48]], 1, costs=DEAR)
        known, row = np.asarray(out.control.first), list(text[:48])
        out = lossless(engine, [row], 40, costs=DEAR)
        assert out.counts.drafted == 0
        held = told(row, out.tokens[0, :40].tolist())
        assert held, "there were matches"
        for number, hits in held.items():
            assert (out.control.first[number] > known[number]) == (np.mean(hits) > known[number]), (number, hits)


def told(row: list[int], new: list[int]) -> dict[int, list[int]]:
    """For each token but the first: whether the first n-gram draft was right, by its match's length."""
    held: dict[int, list[int]] = {}
    for made, token in enumerate(new[1:], start=1):
        text = row + new[:made]
        room = [0] * (len(row) + len(new) - len(text))  # one shape, so that one program serves all lengths
        tokens, matched = text_drafts(jnp.asarray([text + room]), jnp.asarray([0]), jnp.asarray([len(text)]), 1)
        if (length := int(matched[0])) >= 2:
            number = sum(length >= edge for edge in (3, 5, 8))
            held.setdefault(number, []).append(int(int(tokens[0, 0]) == token))
    return held


def test_text_drafts_continue_the_latest_longest_match() -> None:
    rows = [[1, 2, 3, 9, 2, 3, 5, 2, 3, 0, 0], [4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 6, 7, 6, 7, 6, 0, 0, 0, 0]]
    tokens, matched = text_drafts(jnp.asarray(rows), jnp.asarray([0, 0, 2]), jnp.asarray([9, 3, 7]), 4)
    assert matched.tolist() == [2, 2, 3]
    assert tokens.tolist() == [[5, 2, 3, 5], [4, 4, 4, 4], [7, 6, 7, 6]]
    _, matched = text_drafts(jnp.asarray([[1, 2, 3, 1, 0]]), jnp.asarray([1]), jnp.asarray([4]), 2)
    assert matched.tolist() == [0], "what stands before the row is not the row's"


def new_call(row: list[int], new: int) -> tuple[Prompt, Request]:
    """One row, greedy."""
    request = Request(make_sampling(), jax.random.key(0), jnp.full((1, 1), -1), jnp.int32(0), jnp.int32(new))
    return Prompt(jnp.asarray([row]), jnp.asarray([len(row)])), request


@pytest.mark.parametrize("most_slots", [1, 8])
def test_passes_one_by_one_outside_a_program(most_slots: int) -> None:
    """The state is donated though `begin_lossless` ran eagerly, and made for narrower passes than those that follow."""
    engine, (prompt, request) = engine_of("pre norm"), new_call([7] * 9, 12)
    control = DraftControl.start(TEXT_ONLY)
    state = begin_lossless(engine.model, prompt, request, control, capacity=16, most_slots=most_slots)
    advance = jax.jit(advance_lossless, donate_argnums=2)
    while not bool(state.done[0]):
        state = advance(engine.model, TEXT_ONLY, state, request, FREE)
    made = state.tokens[0, 9:21].tolist()
    assert made == engine.generate([[7] * 9], max_new_tokens=12, mode="full", eos_token_id=[]).tokens[0].tolist()
    held = np.asarray(state.cache.positions[0])
    assert held[held >= 0].tolist() == list(range(9 + 12 - 1))
    assert float(control.credit) == 6.0, "the caller's stays"


def test_an_abandoned_stream_keeps_what_it_learned() -> None:
    engine = TIDE(engine_of("pre norm").model)
    steps = engine.stream([[7] * 30], max_new_tokens=NEW, mode="lossless", draft="text", eos_token_id=[])
    for _ in range(9):
        next(steps)
    steps.close()
    kept, start = engine._learned._control[1, "text"], DraftControl.start(TEXT_ONLY)
    assert kept.first.tolist() != start.first.tolist()


def test_the_engine_measures_costs_and_says_what_drafts_came_to() -> None:
    engine = engine_of("pre norm")
    out = engine.generate(PROMPTS, max_new_tokens=NEW, mode="lossless", eos_token_id=[])
    full = engine.generate(PROMPTS, max_new_tokens=NEW, mode="full", eos_token_id=[])
    assert out.tokens.tolist() == full.tokens.tolist()
    assert out.exit_layers.tolist() == full.exit_layers.tolist()
    assert out.stats.drafts is not None
    assert out.stats.steps == out.stats.drafts.passes
    assert out.stats.depth == 1.0
    assert "lossless: " in out.stats.summary()
    assert full.stats.drafts is None


def test_streaming_and_without_routers() -> None:
    engine = TIDE(engine_of("pre norm").model)
    for prompts in (PROMPTS, PROMPTS[:1]):
        full = engine.generate(prompts, max_new_tokens=NEW, eos_token_id=[])
        steps = list(engine.stream(prompts, max_new_tokens=NEW, mode="lossless", eos_token_id=[]))
        assert np.stack([s.tokens for s in steps], axis=1).tolist() == full.tokens.tolist()
        assert steps[-1].drafts is not None
        assert sum(s.layers_executed for s in steps) >= steps[-1].drafts.passes

    class Streamer:
        def __init__(self) -> None:
            self.got: list[int] = []

        def put(self, tokens: np.ndarray) -> None:
            self.got += np.asarray(tokens).reshape(-1).tolist()

        def end(self) -> None:
            self.got.append(-1)

    streamer = Streamer()
    out = engine.generate(PROMPTS[:1], max_new_tokens=NEW, mode="lossless", eos_token_id=[], streamer=streamer)
    assert streamer.got == [*PROMPTS[0], *out.tokens[0].tolist(), -1]
    assert out.tokens.tolist() == full.tokens.tolist()


def test_lossless_scores_as_full_depth_and_has_no_drift() -> None:
    engine, monitor = engine_of("pre norm"), DriftMonitor(1.0)
    scored, full = engine(PROMPTS, mode="lossless", monitor=monitor), engine(PROMPTS, mode="full")
    np.testing.assert_array_equal(scored.logits, full.logits)
    engine.generate(PROMPTS, max_new_tokens=4, mode="lossless", monitor=monitor)
    assert monitor.report().tokens == 0


def test_half_precision_runs() -> None:
    engine = TIDE(tiny_model(tiny_config(num_layers=2), dtype=jnp.bfloat16))
    out = engine.generate(PROMPTS, max_new_tokens=NEW, mode="lossless", eos_token_id=[])
    assert out.lengths.tolist() == [NEW] * len(PROMPTS)


def test_costs_are_positive_and_bad_sizes_refused() -> None:
    engine = engine_of("pre norm")
    costs = measure_pass_costs(engine.model, batch=2)
    assert costs.passes.shape == (3,)
    assert bool(jnp.all(costs.passes > 0))
    assert costs.drafts.tolist() == [0.0], "copying costs nothing"
    assert 0.0 <= float(costs.attention) < float(costs.passes[0])
    wide = tiny_config(num_layers=2, num_heads=16, num_kv_heads=16, head_dim=64)
    assert float(measure_pass_costs(tiny_model(wide), batch=4).attention) > 0
    with pytest.raises(TideError, match="batch"):
        measure_pass_costs(engine.model, batch=0)
    with pytest.raises(TideError, match="lossless"):
        engine.generate(PROMPTS, mode="loss-less")

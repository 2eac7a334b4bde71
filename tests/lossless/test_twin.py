"""The 8-bit twin drafts: the tokens are full depth's whatever it drafts, and its keys and values leave no trace."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_speculate import ARCHITECTURES, NEW, PROMPTS, TWIN, assert_full, engine_of, lossless
from tiny_models import random_prompts, tiny_model

from tide_jax import TIDE, TideError
from tide_jax.functional import (
    TEXT_ONLY,
    DraftControl,
    Prompt,
    Request,
    TwinDrafter,
    advance_lossless,
    begin_lossless,
    init_cache,
    make_sampling,
    make_twin,
    prefill,
)
from tide_jax.generation.batch import bucket, pad_left
from tide_jax.lossless.decoding import default_draft
from tide_jax.model.decoder import from_parameters, parameters, stored_parameters
from tide_jax.model.memory import by_part
from tide_jax.testing import tiny_config


@functools.cache
def twin_of(engine: TIDE) -> TwinDrafter:
    return TwinDrafter(make_twin(engine.model))


def wrong_twin(engine: TIDE) -> TwinDrafter:
    """One of another model, whose drafts all but never hold."""
    other = {path: -value for path, value in parameters(engine.model).items()}
    return TwinDrafter(from_parameters(engine.model.config, other.items(), dtype=engine.model.dtype))


@pytest.mark.matrix
@pytest.mark.parametrize("name", [*ARCHITECTURES, "hybrid", "side by side"])
def test_architectures_make_the_tokens_of_full_depth(name: str) -> None:
    engine = engine_of(name)
    out = lossless(engine, PROMPTS, twin=twin_of(engine))
    assert_full(engine, PROMPTS, out)
    assert out.counts.accepted[1] > 0
    assert out.counts.passes < NEW, "a pass makes more than a token"


@pytest.mark.parametrize("name", ["pre norm", "hybrid", "side by side"])
def test_a_wrong_twin_changes_nothing_and_leaves_nothing_in_the_cache(name: str) -> None:
    """Each pass drafts seven tokens that fail; the cache is that of a pass over the text."""
    engine = engine_of(name)
    model, drafters = engine.model, (*TEXT_ONLY, wrong_twin(engine))
    lengths = jnp.asarray([len(p) for p in PROMPTS], jnp.int32)
    prompt = Prompt(jnp.asarray(pad_left(PROMPTS, bucket(max(map(len, PROMPTS))))), lengths)
    request = Request(
        make_sampling(), jax.random.key(0), jnp.full((4, 1), -1), pad=jnp.int32(0), max_new_tokens=jnp.int32(12)
    )
    always = DraftControl.start(drafters)._replace(credit=jnp.float32(1e6))
    state = begin_lossless(model, prompt, request, always, drafters, capacity=16)
    advance = jax.jit(advance_lossless)
    for _ in range(6):
        state = advance(model, drafters, state._replace(control=always), request, TWIN)
    assert state.counts.drafted[1] > 4 * 6
    assert state.counts.accepted[1] < 6
    for b, row in enumerate(PROMPTS):
        made = state.tokens[b, state.starts[b] : state.ends[b]].tolist()
        assert made[: len(row)] == row
        whole = Prompt(jnp.asarray([made[:-1]]), jnp.asarray([len(made) - 1]))
        expected = prefill(model, whole, init_cache(model.config, 1, len(made), model.dtype)).cache
        used = np.flatnonzero(np.asarray(state.cache.positions[b]) >= 0)
        assert np.asarray(state.cache.positions[b])[used].tolist() == list(range(len(made) - 1))
        for memory, fresh in zip(state.cache.layers, expected.layers, strict=True):
            compare = functools.partial(compare_rows, row=b, used=used)
            by_part(memory, fresh, slots=compare, state=functools.partial(compare_rows, row=b))


def compare_rows(found: Any, wanted: Any, *, row: int, used: Any = None) -> None:
    """A row of keys and values in slots that are used, or of a state, against the only row of another cache."""
    for kept, whole in zip(found, wanted, strict=True):
        filled = (kept[row], whole[0]) if used is None else (kept[row][:, used], whole[0][:, : len(used)])
        np.testing.assert_allclose(*filled, rtol=0, atol=2e-5)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "dials",
    [
        {"temperature": 1.2, "top_p": 0.7, "repetition_penalty": 1.3},
        {"temperature": 0.8},
        {"rules": {"no_repeat_ngram_size": 2, "suppress_tokens": list(range(3, 100))}},
    ],
    ids=lambda dials: next(iter(dials)),
)
def test_the_twin_draws_with_the_keys_and_rules_of_the_model(dials: dict[str, Any]) -> None:
    engine, rules = engine_of("pre norm"), dials.get("rules", {})
    options = {name: value for name, value in dials.items() if name != "rules"}
    for seed in (0, 1):
        out = lossless(engine, PROMPTS, key=seed, twin=twin_of(engine), **dials)
        assert_full(engine, PROMPTS, out, key=jax.random.key(seed), **options, **rules)
        assert int(out.counts.accepted[1]) > 0.6 * int(out.counts.drafted[1]), "drawn with other keys, few would agree"


def test_drafts_count_as_seen_for_the_penalty_on_repetition() -> None:
    """The penalty makes full depth avoid what it said before, so drafts that repeat a draft would all fail."""
    engine = engine_of("pre norm")
    out = lossless(engine, PROMPTS, twin=twin_of(engine), repetition_penalty=8.0)
    assert_full(engine, PROMPTS, out, repetition_penalty=8.0)
    assert int(out.counts.accepted[1]) > 0.8 * int(out.counts.drafted[1])


def test_too_little_memory_for_the_twin_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("tide_jax.lossless.decoding.make_twin", full)
    with pytest.raises(TideError, match=r"memory does not suffice for the 8-bit twin.* use draft='text'"):
        TIDE(engine_of("pre norm").model).generate(PROMPTS, mode="lossless", draft="int8")


def test_rows_end_at_their_end_of_sequence_token() -> None:
    engine = engine_of("pre norm")
    free = engine.generate(PROMPTS, max_new_tokens=NEW, mode="full", eos_token_id=[]).tokens
    for at in (3, 11):
        eos = sorted({int(free[0, at]), int(free[2, 2 * at]), 0})  # 0 is what stands in for drafts not made yet
        out = lossless(engine, PROMPTS, eos=eos, twin=twin_of(engine))
        assert_full(engine, PROMPTS, out, eos_token_id=eos)
        assert int(out.lengths.min()) < NEW
        assert out.counts.accepted[1] > 0


def test_the_engine_drafts_with_its_twin_and_says_so() -> None:
    engine = TIDE(engine_of("pre norm").model)
    engine._learned._costs[len(PROMPTS), "int8"] = TWIN  # measured ones would draft now this, now that
    full = engine.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[])
    options: dict[str, Any] = {"mode": "lossless", "draft": "int8", "max_new_tokens": NEW, "eos_token_id": []}
    out = engine.generate(PROMPTS, **options)
    assert out.tokens.tolist() == full.tokens.tolist()
    assert out.stats.drafts is not None
    twin = out.stats.drafts.by_drafter["int8 twin"]
    assert 0 < twin.accepted <= twin.drafted
    summary = out.stats.summary()
    assert f"int8 twin: {twin.accepted} of {twin.drafted} drafts accepted" in summary
    assert "a pass over 8 tokens 1.00, a draft of the int8 twin 0.01" in summary
    steps = list(engine.stream(PROMPTS, **options))
    assert np.stack([s.tokens for s in steps], axis=1).tolist() == full.tokens.tolist()
    assert steps[-1].drafts is not None
    assert steps[-1].drafts.by_drafter["int8 twin"].accepted > 0
    again = engine.generate(PROMPTS, **options | {"draft": "text"})
    assert again.tokens.tolist() == full.tokens.tolist()
    assert list(again.stats.drafts.by_drafter) == ["text"]


def test_costs_of_the_twin_are_measured() -> None:
    engine = TIDE(engine_of("pre norm").model)
    out = engine.generate(PROMPTS[:1], mode="lossless", draft="int8", max_new_tokens=8, eos_token_id=[])
    assert out.tokens.tolist() == engine.generate(PROMPTS[:1], max_new_tokens=8, eos_token_id=[]).tokens.tolist()
    costs = engine._learned._costs[1, "int8"]
    assert costs.drafts[0] == 0 < costs.drafts[1]


def test_the_twin_shares_what_stays_float_and_the_model_stays_as_it_is() -> None:
    model = tiny_model(tiny_config(num_layers=2))
    before = {p.path: np.asarray(p.value).copy() for p in stored_parameters(model)}
    twin = make_twin(model)
    assert (model.weights, twin.weights) == ("float", "int8")
    after = {p.path: p.value for p in stored_parameters(model)}
    for p in stored_parameters(twin):
        if p.path in after and p.value.dtype == jnp.float32:
            assert p.value.unsafe_buffer_pointer() == after[p.path].unsafe_buffer_pointer(), p.path
    for path, value in after.items():
        np.testing.assert_array_equal(value, before[path])
    small = sum(p.value.nbytes for p in stored_parameters(twin) if p.value.dtype == jnp.int8)
    assert small * 4 > 0.9 * sum(a.nbytes for a in before.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draft": "int8"}, "draft='int8' is for mode='lossless', and this call has mode=None"),
        ({"draft": "int8", "mode": "exit"}, "draft='int8' is for mode='lossless'"),
        ({"draft": "int4", "mode": "lossless"}, "draft='int4' is not known; choose 'text' or 'int8'"),
        ({"draft": ["int8"], "mode": "lossless"}, "is not known"),
    ],
)
def test_bad_drafts_are_refused_in_a_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TideError, match=message) as caught:
        engine_of("pre norm").generate(PROMPTS, **arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(TideError, match=message):
        engine_of("pre norm").stream(PROMPTS, **arguments)


def test_a_model_of_integers_has_no_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tide_jax.lossless.decoding._TWIN_PAYS_FROM", 1)
    model = tiny_model(tiny_config(num_layers=1))
    small = from_parameters(model.config, parameters(model).items(), dtype=model.dtype, weights="int8")
    with pytest.raises(TideError, match=r"8-bit integers already: .* use draft='text'"):
        TIDE(small).generate(PROMPTS, mode="lossless", draft="int8")
    assert (default_draft(model), default_draft(small)) == ("int8", "text")


def test_the_twin_drafts_by_default_in_large_models_and_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def drafters(engine: TIDE, prompts: Any, new: int) -> list[str]:
        out = engine.generate(prompts, mode="lossless", max_new_tokens=new, eos_token_id=[])
        assert out.stats.drafts is not None
        return list(out.stats.drafts.by_drafter)

    model = engine_of("pre norm").model
    assert drafters(TIDE(model), PROMPTS, 2) == ["text"], "a tiny model"
    monkeypatch.setattr("tide_jax.lossless.decoding._TWIN_PAYS_FROM", 1)
    engine = TIDE(model)
    assert drafters(engine, PROMPTS, 1) == ["text"], "one token needs no draft"
    assert drafters(engine, PROMPTS, 2) == ["text", "int8 twin"]
    assert drafters(engine, [PROMPTS[0]] * 9, 2) == ["text"]


def test_a_default_twin_that_does_not_fit_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("tide_jax.lossless.decoding._TWIN_PAYS_FROM", 1)
    monkeypatch.setattr("tide_jax.lossless.decoding.make_twin", full)
    engine = TIDE(engine_of("pre norm").model)
    for _ in range(2):
        out = engine.generate(PROMPTS, mode="lossless", max_new_tokens=4, eos_token_id=[])
        assert out.tokens.tolist() == engine.generate(PROMPTS, max_new_tokens=4, eos_token_id=[]).tokens.tolist()
    assert [record.levelname for record in caplog.records] == ["WARNING"], "said once"
    assert "memory does not suffice for the 8-bit twin" in caplog.text


def test_a_default_twin_is_not_tried_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Linux would promise the memory, and end the process."""
    monkeypatch.setattr("tide_jax.lossless.decoding._TWIN_PAYS_FROM", 1)
    monkeypatch.setattr("tide_jax.lossless.decoding.available_memory", lambda: 1000)
    out = TIDE(engine_of("pre norm").model).generate(PROMPTS, mode="lossless", max_new_tokens=4, eos_token_id=[])
    assert list(out.stats.drafts.by_drafter) == ["text"]
    assert "memory does not suffice for the 8-bit twin" in caplog.text


def overflowing_twin(engine: TIDE) -> TwinDrafter:
    """One whose states, keys and values overflow in the last layer; its drafts are arbitrary."""
    twin = make_twin(engine.model)
    scale = twin.layers[-1].attention.kv.scale
    scale[...] = scale[...] * jnp.float32(1e38) * 10.0
    return TwinDrafter(twin)


def test_what_overflows_in_the_twin_does_not_reach_the_model() -> None:
    """The model reads the slots behind its cache times zero, and infinity times zero is not a number."""
    engine = engine_of("pre norm")
    out = lossless(engine, PROMPTS, twin=overflowing_twin(engine))
    assert bool(jnp.all(out.finite))
    assert_full(engine, PROMPTS, out)
    assert out.counts.drafted[1] > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(dtype: str) -> None:
    """Near-ties make other tokens than full depth's; most drafts hold all the same."""
    engine = TIDE(tiny_model(tiny_config(num_layers=2), dtype=jnp.dtype(dtype)))
    out = lossless(engine, PROMPTS, twin=twin_of(engine))
    assert out.lengths.tolist() == [NEW] * len(PROMPTS)
    assert bool(jnp.all(out.finite))
    assert int(out.counts.accepted[1]) > 0.7 * int(out.counts.drafted[1])


@pytest.mark.matrix
@pytest.mark.parametrize("most_slots", [1, 2])
def test_passes_of_few_slots(most_slots: int) -> None:
    engine = engine_of("pre norm")
    costs = TWIN._replace(passes=TWIN.passes[:most_slots])
    out = lossless(engine, PROMPTS, costs=costs, most_slots=most_slots, twin=twin_of(engine))
    assert_full(engine, PROMPTS, out)
    assert (out.counts.accepted[1] > 0) == (most_slots > 1)


def test_stop_strings_and_lengths_with_the_twin() -> None:
    """Step by step: a row ends at its text, or with as many tokens as it may have."""
    engine, prompts = TIDE(engine_of("pre norm").model), PROMPTS[:3]

    class Letters:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(chr(0x4E00 + int(i)) for i in ids)

    engine._learned._costs[3, "int8"] = TWIN
    free = engine.generate(prompts, max_new_tokens=24, mode="full", eos_token_id=[]).tokens
    for options in (
        {"stop_strings": [Letters().decode(free[0, 5:7])], "tokenizer": Letters()},
        {"max_new_tokens": None, "max_length": 20},
    ):
        given = {"max_new_tokens": 24, "eos_token_id": []} | options
        full = engine.generate(prompts, mode="full", **given)
        out = engine.generate(prompts, mode="lossless", draft="int8", **given)
        assert out.tokens.tolist() == full.tokens.tolist()
        assert out.lengths.tolist() == full.lengths.tolist()
        assert out.lengths.min() < 24
        assert out.stats.drafts.by_drafter["int8 twin"].accepted > 0


def test_long_caches_are_read_in_blocks_by_the_twin_too() -> None:
    engine = engine_of("pre norm")
    prompts = random_prompts((300, 7))
    out = lossless(engine, prompts, 400, twin=twin_of(engine))
    assert_full(engine, prompts, out, 400)
    assert out.counts.accepted[1] > 300

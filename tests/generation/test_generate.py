"""Generation: what users pass and get back, ends of rows, streaming, and the pure functions below."""

from __future__ import annotations

import functools
import logging
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import BruteForce
from tiny_models import random_prompts, tiny_model, with_parameters

from tide_jax import TIDE, ExitConfig, TideError
from tide_jax.exits.exits import Exits
from tide_jax.functional import decode_step, init_cache, prefill
from tide_jax.generation.batch import pad_left
from tide_jax.generation.generate import Prompt, Request, begin
from tide_jax.generation.programs import Programs
from tide_jax.generation.sampling import make_sampling
from tide_jax.testing import ByteTokenizer, random_routers, tiny_config

PROMPTS = random_prompts((4, 7, 1))
NEW = 8
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "key": jax.random.key(5)}


@functools.cache
def engine() -> TIDE:
    """A small model that writes lower-case letters, and routers that let a good part of them leave early."""
    config = tiny_config(num_layers=3, max_positions=40, tie_embeddings=False, head_bias=True, pad_token_id=2)
    bias = np.full(config.vocab_size, -1e4, np.float32)
    bias[[ord(letter) + 3 for letter in "abcdefghijklmnopqrstuvwxyz "]] = 0.0
    model = with_parameters(tiny_model(config, seed=3), {"head.bias": bias})
    return TIDE(model, random_routers(config, interval=1), ExitConfig(exit_threshold=0.5, min_layers=0))


def same(found: Any, expected: Any) -> None:
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.exit_layers, expected.exit_layers)
    np.testing.assert_array_equal(found.lengths, expected.lengths)


# ------------------------------------------------------------------------------------------------------------- prompts


def padded(side: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as an array whose padding holds tokens that would matter if they were read, and its mask."""
    ids, mask = np.full((3, width), 200), np.zeros((3, width), int)
    for b, row in enumerate(PROMPTS):
        span = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[b, span], mask[b, span] = row, 1
    return ids, mask


@pytest.mark.matrix
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [7, 11])
def test_padding_on_either_side_changes_nothing(side: str, width: int) -> None:
    ids, mask = padded(side, width)
    expected = engine().generate(PROMPTS, max_new_tokens=NEW)
    same(engine().generate(ids, attention_mask=mask, max_new_tokens=NEW), expected)
    scored, expected_scores = engine()(ids, attention_mask=mask), engine()(PROMPTS)
    for b, row in enumerate(PROMPTS):
        real = np.flatnonzero(mask[b])
        np.testing.assert_allclose(scored.logits[b, real], expected_scores.logits[b, : len(row)], rtol=1e-4, atol=1e-5)
        assert scored.exit_layers[b, real].tolist() == expected_scores.exit_layers[b, : len(row)].tolist()
    assert (scored.exit_layers[mask == 0] == -1).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [list, tuple, np.asarray])
def test_padded_lists_and_masks_are_what_a_tokenizer_gives(side: str, kind: Any) -> None:
    ids, mask = padded(side, 9)
    expected = engine().generate(PROMPTS, max_new_tokens=NEW)
    lists = [kind(row.tolist()) for row in ids], [kind(row.tolist()) for row in mask]
    same(engine().generate(lists[0], attention_mask=lists[1], max_new_tokens=NEW), expected)
    same(engine().generate(lists[0], attention_mask=mask.astype(np.float32), max_new_tokens=NEW), expected)
    unequal = [kind(row) for row in PROMPTS], [kind([1] * len(row)) for row in PROMPTS]
    same(engine().generate(unequal[0], attention_mask=unequal[1], max_new_tokens=NEW), expected)


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["exit", "full", "lossless"])
def test_a_long_row_does_not_clip_its_neighbours(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    prompts = random_prompts((38, 5, 20))
    alone = engine().generate(prompts[1:2], max_new_tokens=25, mode=mode, eos_token_id=[])
    with caplog.at_level(logging.WARNING, logger="tide_jax"):
        together = engine().generate(prompts, max_new_tokens=25, mode=mode, eos_token_id=[])
    assert "clipped to 3 for the longest of 2 of the 3 prompts: the context holds 40 tokens" in caplog.text
    assert together.lengths.tolist() == [3, 25, 21], "the last token needs no position"
    assert together.tokens[1].tolist() == alone.tokens[0].tolist()
    assert together.stats.tokens == 49


@pytest.mark.parametrize("arguments", [SAMPLED, {"mode": "lossless"}], ids=["exit", "lossless"])
@pytest.mark.matrix
def test_rows_that_fill_up_a_batch_change_nothing(arguments: dict[str, Any]) -> None:
    """17 rows run as 18."""
    prompts = random_prompts(tuple(range(2, 19)), seed=4)
    end = int(free_tokens()[0, 2])
    fresh = engine().with_config()
    fresh.programs = Programs()
    out = fresh.generate(prompts, max_new_tokens=NEW, eos_token_id=[end, 300, 301], **arguments)
    assert out.tokens.shape[0] == out.exit_layers.shape[0] == len(out.lengths) == 17
    assert out.stats.tokens == int(out.lengths.sum()) == int((out.exit_layers >= 0).sum())
    few = fresh.generate(prompts[:3], max_new_tokens=NEW, eos_token_id=[end], **arguments)  # as they are
    for b, length in enumerate(few.lengths):  # each row draws from its own key
        assert out.lengths[b] == length
        assert out.tokens[b, :length].tolist() == few.tokens[b, :length].tolist()
    kept = len(fresh.programs)
    again = fresh.generate([*prompts, [3]], max_new_tokens=NEW, eos_token_id=[end, 300, 301, 302], **arguments)
    assert len(fresh.programs) == kept > 0
    assert again.stats.compile_time == 0.0
    if "mode" not in arguments:
        scored = fresh(prompts)
        assert scored.logits.shape[:2] == scored.exit_layers.shape == (17, 18)
        assert scored.stats.tokens == sum(map(len, prompts))


@pytest.mark.matrix
@pytest.mark.parametrize("kind", [list, np.asarray, jnp.asarray, lambda row: [row], lambda row: np.asarray([row])])
def test_one_prompt_in_any_shape(kind: Any) -> None:
    row = PROMPTS[1]
    same(
        engine().generate(kind(row), max_new_tokens=NEW, attention_mask=None),
        engine().generate([row], max_new_tokens=NEW),
    )


BAD_INPUT: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no rows": ([], {}, "no rows|is empty"),
    "an empty row": ([[3, 4], []], {}, "prompt 1 is empty"),
    "an empty masked row": (np.ones((2, 2), int), {"attention_mask": [[1, 1], [0, 0]]}, "prompt 1 is empty"),
    "text": ("hello", {}, "expected token ids"),
    "texts": (["hello", "you"], {}, "expected token ids"),
    "fractions": (np.ones((1, 3)), {}, "float64"),
    "fractions in a list": ([[1.5, 2.0]], {}, "float64"),
    "three axes": (np.ones((1, 2, 3), int), {}, "3 dimensions"),
    "an id too large": ([[3, 259]], {}, "token id 259"),
    "a negative id": ([[3], [-1, 2]], {}, "prompt 1 holds token id -1"),
    "longer than the context": ([[3] * 41], {}, "40"),
    "a mask of another shape": (np.ones((2, 3), int), {"attention_mask": np.ones((2, 4))}, "attention_mask has shape"),
    "a mask of other rows": ([[3], [4, 5]], {"attention_mask": np.ones((2, 2))}, r"rows of \[2, 2\] values, expected"),
    "a mask with a deeper list": ([[3], [4, 5]], {"attention_mask": np.ones((2, 2, 2))}, "more dimensions"),
    "a mask to add": (
        np.ones((1, 2), int),
        {"attention_mask": np.asarray([[-1e9, 0.0]])},
        r"attention_mask holds float64 values, -1000000000.0 among them; expected 1 for a token and 0 for padding",
    ),
    "a mask of infinities": (np.ones((1, 2), int), {"attention_mask": np.asarray([[-np.inf, 0.0]])}, "-inf among them"),
    "a mask of twos": (np.ones((1, 2), int), {"attention_mask": [[2, 1]]}, "2 among them"),
    "a mask of words": (np.ones((1, 2), int), {"attention_mask": [["yes", "no"]]}, "attention_mask holds <U3"),
    "an unknown mode": ([[3]], {"mode": "fast"}, "mode='fast'"),
    "no key": ([[3]], {"temperature": 0.7}, "key=jax.random.key"),
    "a negative temperature": ([[3]], {"temperature": -1.0}, "temperature=-1.0"),
    "top_p of nothing": ([[3]], {"top_p": 0.0}, "top_p=0.0"),
    "a negative top_k": ([[3]], {"top_k": -4}, "top_k=-4"),
    "no new tokens": ([[3]], {"max_new_tokens": 0}, "max_new_tokens=0"),
    "new tokens that are no number": ([[3]], {"max_new_tokens": "ten"}, "max_new_tokens='ten'"),
    "half a new token": ([[3]], {"max_new_tokens": 1.5}, "max_new_tokens=1.5"),
    "a padding that is no id": ([[3]], {"pad_token_id": "<pad>"}, "pad_token_id='<pad>'"),
    "a padding outside the vocabulary": ([[3]], {"pad_token_id": 259}, "pad_token_id=259 must be .* from 0 to 258"),
    "an end that is no id": ([[3]], {"eos_token_id": "</s>"}, "eos_token_id='</s>'"),
    "a ragged mask": ([[3, 4]], {"attention_mask": [[1], [1, 2]]}, "attention_mask|input_ids"),
    "ends for other rows": ([[3]], {"eos_token_id": [[1], [2]]}, "2 rows, expected 1"),
    "a streamer for two rows": ([[3], [4]], {"streamer": SimpleNamespace(put=len, end=dict)}, "at a time, got 2"),
    "no streamer": ([[3]], {"streamer": object()}, r"streamer is object, expected an object with put"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named_in_one_line(case: str) -> None:
    ids, arguments, expected = BAD_INPUT[case]
    with pytest.raises(TideError, match=expected) as caught:
        engine().generate(ids, **arguments)
    assert "\n" not in str(caught.value)


def test_an_error_comes_without_the_warning_about_the_context(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TideError, match="needs routers"):
        TIDE(engine().model).generate([[3]], max_new_tokens=1000, mode="exit")
    assert not caplog.records


def test_settings_that_do_not_exist() -> None:
    with pytest.raises(TideError, match=r"no field threshold; expected some of exit_threshold, min_layers"):
        engine().with_config(threshold=0.5)
    with pytest.raises(TideError, match=r"implementation='magic' is not known; choose None or one of .*reference"):
        TIDE(engine().model, implementation="magic")


def test_numbers_of_numpy_are_numbers() -> None:
    arguments = {"max_new_tokens": np.int64(3), "pad_token_id": np.int32(7), "temperature": np.float64(0.0)}
    same(engine().generate(PROMPTS, **arguments), engine().generate(PROMPTS, max_new_tokens=3, pad_token_id=7))


def test_prompt_lengths_for_other_rows() -> None:
    with pytest.raises(TideError, match="prompt_lengths has 1 values"):
        engine()(PROMPTS, prompt_lengths=[1])


def test_exits_need_routers() -> None:
    bare = TIDE(engine().model)
    for call in (bare, bare.generate):
        with pytest.raises(TideError, match="needs routers"):
            call(PROMPTS, mode="exit")


def test_routers_of_another_shape_are_refused() -> None:
    model = engine().model
    for config in (tiny_config(hidden_size=32, num_layers=3), tiny_config(num_layers=9)):
        with pytest.raises(TideError, match="hidden size 48 and 3 layers"):
            TIDE(model, random_routers(config, interval=1))
    with pytest.raises(TideError, match="min_layers=4 exceeds the model's 3 layers"):
        engine().with_config(min_layers=4)
    with pytest.raises(TideError, match="3 values, expected one or 2"):
        engine().with_config(exit_threshold=(0.5, 0.5, 0.5))


def test_tokens_beyond_the_context_are_clipped_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    prompt = random_prompts((36,))
    with caplog.at_level(logging.WARNING, logger="tide_jax"):
        out = engine().generate(prompt, max_new_tokens=12)
    assert out.tokens.shape == (1, 5), "the last token needs no position"
    assert "max_new_tokens=12 clipped to 5" in caplog.text
    caplog.clear()
    fits = engine().generate(prompt, max_new_tokens=5)
    assert not caplog.records
    same(fits, out)
    expected, _, _ = brute_force().generate(prompt[0], 5)
    assert out.tokens[0].tolist() == expected


def brute_force() -> BruteForce:
    return BruteForce(engine().model, engine().routers, engine().config.exit_threshold, 0)


# -------------------------------------------------------------------------------------------------------- ends of rows


def cut(row: list[int], ends: list[int]) -> list[int]:
    """The row up to its first end-of-sequence token, that one included."""
    return next((row[: i + 1] for i, token in enumerate(row) if token in ends), row)


def check_ends(ends_of_rows: list[list[int]], eos_token_id: Any, **arguments: Any) -> list[int]:
    """Rows must be those without an end, cut at theirs and padded; returns their lengths."""
    free = engine().generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[], **arguments)
    out = engine().generate(PROMPTS, max_new_tokens=NEW, eos_token_id=eos_token_id, pad_token_id=77, **arguments)
    expected = [cut(row.tolist(), ends) for row, ends in zip(free.tokens, ends_of_rows, strict=True)]
    assert out.lengths.tolist() == [len(row) for row in expected]
    assert out.tokens.shape[1] == max(len(row) for row in expected)
    for b, row in enumerate(expected):
        assert out.tokens[b].tolist() == row + [77] * (out.tokens.shape[1] - len(row))
        layers = free.exit_layers[b, : len(row)].tolist() + [-1] * (out.tokens.shape[1] - len(row))
        assert out.exit_layers[b].tolist() == layers
    assert out.stats.tokens == sum(len(row) for row in expected)
    return out.lengths.tolist()


def free_tokens(**arguments: Any) -> np.ndarray:
    return engine().generate(PROMPTS, max_new_tokens=NEW, eos_token_id=[], **arguments).tokens


def first_fresh(row: np.ndarray, start: int) -> int:
    """The first token from `start` on that the row does not hold before."""
    return next(int(token) for i, token in enumerate(row) if i >= start and token not in row[:i])


@pytest.mark.parametrize("arguments", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_each_row_ends_by_itself(arguments: dict[str, Any]) -> None:
    tokens = free_tokens(**arguments)
    end = first_fresh(tokens[0], 1)
    lengths = check_ends([[end]] * 3, end, **arguments)
    assert 1 < lengths[0] < NEW


def test_several_ends_for_all_rows() -> None:
    tokens = free_tokens(**SAMPLED)
    ends = [first_fresh(tokens[0], 2), first_fresh(tokens[1], 4)]
    lengths = check_ends([ends] * 3, ends, **SAMPLED)
    assert len(set(lengths)) > 1


def test_ends_of_each_row() -> None:
    tokens = free_tokens(**SAMPLED)
    ends = [[first_fresh(tokens[0], 1)], [first_fresh(tokens[1], 3), 258], []]
    lengths = check_ends(ends, ends, **SAMPLED)
    assert lengths[2] == NEW
    assert len(set(lengths)) == 3


def test_a_row_may_end_with_its_first_token() -> None:
    end = int(free_tokens()[1, 0])
    assert check_ends([[258], [end], [258]], [[258], [end], [258]])[1] == 1
    assert check_ends([[int(t)] for t in free_tokens()[:, 0]], free_tokens()[:, :1].tolist()) == [1, 1, 1]


def test_the_models_own_ends_are_the_default() -> None:
    config = tiny_config(num_layers=1)
    model = tiny_model(config)
    end = first_fresh(TIDE(model).generate(PROMPTS, max_new_tokens=NEW).tokens[0], 1)
    named = TIDE(model).generate(PROMPTS, max_new_tokens=NEW, eos_token_id=end, pad_token_id=5)
    assert named.lengths[0] < NEW
    own = tiny_model(tiny_config(num_layers=1, eos_token_ids=(258, end), pad_token_id=5))
    same(TIDE(own).generate(PROMPTS, max_new_tokens=NEW), named)


def test_sampling_depends_on_its_key_alone() -> None:
    first = free_tokens(**SAMPLED)
    np.testing.assert_array_equal(free_tokens(**SAMPLED), first)
    assert not np.array_equal(free_tokens(**(SAMPLED | {"key": jax.random.key(6)})), first)
    assert not np.array_equal(free_tokens(), first)


def test_repetition_penalty_counts_prompt_and_new_tokens() -> None:
    letters = [[ord(c) + 3 for c in "abcdefghijklm"], [ord(c) + 3 for c in "nop"], [200]]
    out = engine().generate(letters, max_new_tokens=10, repetition_penalty=1e6, eos_token_id=[])
    for prompt, row in zip(letters, out.tokens.tolist(), strict=True):
        assert len({*prompt, *row}) == len(prompt) + len(row), "no token twice: 27 letters are enough"


def test_padding_does_not_count_as_seen() -> None:
    model = engine().model
    prompt = Prompt(jnp.asarray(pad_left([np.asarray(p) for p in PROMPTS], 9)), jnp.asarray([4, 7, 1], jnp.int32))
    request = Request(make_sampling(), jax.random.key(0), jnp.full((3, 1), -1), jnp.int32(0), jnp.int32(4))
    state = jax.jit(begin, static_argnames="capacity")(model, prompt, request, None, capacity=4)
    for b, row in enumerate(PROMPTS):
        assert np.flatnonzero(state.seen[b]).tolist() == sorted({*row, int(state.last[b])})


# ----------------------------------------------------------------------------------------------------------- streaming


class Recorder:
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.given: list[np.ndarray] = []
        self.ended = 0

    def put(self, value: np.ndarray) -> None:
        self.given.append(np.asarray(value))

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("arguments", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_streamer_gets_the_tokens_of_a_whole_generation(arguments: dict[str, Any]) -> None:
    prompt = [PROMPTS[1]]
    whole = engine().generate(prompt, max_new_tokens=NEW, **arguments)
    end = first_fresh(whole.tokens[0], 2)
    for eos in ([], end):
        recorder = Recorder()
        whole = engine().generate(prompt, max_new_tokens=NEW, eos_token_id=eos, **arguments)
        streamed = engine().generate(prompt, max_new_tokens=NEW, eos_token_id=eos, streamer=recorder, **arguments)
        same(streamed, whole)
        assert recorder.given[0].tolist() == prompt
        assert [given.tolist() for given in recorder.given[1:]] == whole.tokens.T.tolist()
        assert recorder.ended == 1
        assert streamed.stats.layers_executed == whole.stats.layers_executed


def test_transformers_text_streamer() -> None:
    from transformers import TextStreamer

    pieces: list[str] = []

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)

    tokenizer = ByteTokenizer()
    streamer = Pieces(tokenizer, skip_prompt=True)
    prompt = tokenizer("once upon")["input_ids"]
    out = engine().generate(prompt, max_new_tokens=16, streamer=streamer, **SAMPLED)
    assert "".join(pieces) == tokenizer.decode(out.tokens[0])
    assert len(pieces) > 1, "it came in pieces"


@pytest.mark.parametrize("arguments", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_streaming_a_batch_gives_what_generate_gives(arguments: dict[str, Any]) -> None:
    end = first_fresh(free_tokens(**arguments)[0], 1)
    arguments = arguments | {"max_new_tokens": NEW, "eos_token_id": [[end], [], [end]], "pad_token_id": 9}
    whole = engine().generate(PROMPTS, **arguments)
    steps = list(engine().stream(PROMPTS, **arguments))
    assert [step.tokens.tolist() for step in steps] == whole.tokens.T.tolist()
    assert [step.exit_layers.tolist() for step in steps] == whole.exit_layers.T.tolist()
    assert sum(step.layers_executed for step in steps) == whole.stats.layers_executed


# ------------------------------------------------------------------------------------------------------ pure functions


def test_prefill_and_decode_step_under_the_users_own_jit() -> None:
    model, routers = engine().model, engine().routers
    exits = Exits.uniform(routers, 0.5)
    prompt = Prompt(jnp.asarray(pad_left([np.asarray(p) for p in PROMPTS], 9)), jnp.asarray([4, 7, 1], jnp.int32))
    step = jax.jit(decode_step, donate_argnames="cache")
    out = jax.jit(prefill)(model, prompt, init_cache(model.config, 3, 20, model.dtype), exits)
    rows, positions = [list(p) for p in PROMPTS], prompt.lengths
    active = jnp.asarray([True, True, True])
    for _ in range(4):
        tokens = jnp.argmax(out.logits, axis=-1).astype(jnp.int32)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
        cache = out.cache
        out = step(model, cache, tokens, positions, active, exits)
        assert all(a.is_deleted() for a in jax.tree.leaves(cache.layers)), "the cache was donated, not copied"
        positions = positions + 1
        for b, row in enumerate(rows):
            walked = brute_force().walk(row, len(PROMPTS[b]))
            assert int(out.exit_layers[b]) == walked.exit_layers[-1]
            np.testing.assert_allclose(out.logits[b], walked.logits[-1], atol=3e-5, rtol=1e-5)


def test_an_inactive_row_neither_runs_nor_enters_the_cache() -> None:
    model = engine().model
    prompt = Prompt(jnp.asarray(random_prompts((5, 5)), jnp.int32), jnp.asarray([5, 5], jnp.int32))
    step = jax.jit(decode_step)
    before = jax.jit(prefill)(model, prompt, init_cache(model.config, 2, 8, model.dtype))
    tokens, positions = jnp.asarray([7, 8], jnp.int32), jnp.asarray([5, 5], jnp.int32)
    out = step(model, before.cache, tokens, positions, jnp.asarray([True, False]))
    assert out.exit_layers.tolist() == [2, -1]
    assert out.cache.positions[:, 5].tolist() == [5, -1]
    assert int(out.cache.length) == 6
    assert int(step(model, before.cache, tokens, positions, jnp.asarray([False, False])).layers_executed) == 0


def test_bfloat16_generates() -> None:
    config = tiny_config(num_layers=2)
    model = tiny_model(config, dtype=jnp.bfloat16)
    half = TIDE(model, random_routers(config, interval=1, affine=True), ExitConfig(exit_threshold=0.4, min_layers=0))
    out = half.generate(PROMPTS, max_new_tokens=4, eos_token_id=[])
    assert out.tokens.shape == (3, 4)
    assert half.model.dtype == jnp.bfloat16
    rows = [prompt + tokens for prompt, tokens in zip(PROMPTS, out.tokens.tolist(), strict=True)]
    scored = half(rows, prompt_lengths=[len(prompt) for prompt in PROMPTS])
    assert scored.logits.dtype == jnp.float32
    assert np.isfinite(scored.logits).all()
    # bfloat16 keeps 8 bits; the exact walk is the yardstick.
    walked = BruteForce(model, half.routers, 0.4).walk(rows[1], len(PROMPTS[1]))
    agreeing = np.asarray(walked.exit_layers) == scored.exit_layers[1, : len(rows[1])]
    assert agreeing.mean() > 0.7
    np.testing.assert_allclose(scored.logits[1, 0], walked.logits[0], atol=0.25)

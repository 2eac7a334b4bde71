"""Limits of a row beside its end-of-sequence tokens: stop strings, and `max_length`."""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import numpy as np
import pytest

import tide_jax
from tide_jax.generation.outputs import GenerateOutput
from tide_jax.testing import ByteTokenizer, random_routers, tiny_config, tiny_decoder

NEW = 30
PROMPTS = [[3, 100, 200, 30], [70, 80], [9] * 20]
DECODE = ByteTokenizer().decode
PENALTY = {"repetition_penalty": 1.3}  # without one, tiny models repeat themselves


@functools.cache
def engine() -> tide_jax.TIDE:
    model = tiny_decoder(tiny_config(num_layers=2, vocab_size=259, max_positions=64))
    routers = random_routers(model.config, interval=1)
    return tide_jax.TIDE(model, routers, tide_jax.ExitConfig(exit_threshold=0.5, min_layers=1))


@functools.cache
def whole(mode: str) -> GenerateOutput:
    """Each prompt's text without stop strings."""
    return engine().generate(PROMPTS, mode=mode, max_new_tokens=NEW, eos_token_id=[], **PENALTY)


def check_cut(out: GenerateOutput, full: GenerateOutput, stops: list[str]) -> None:
    """Each row is the full one up to the token that completes a stop string."""
    for b, row in enumerate(out.new_tokens):
        n = len(row)
        assert row.tolist() == full.tokens[b, :n].tolist()
        assert out.exit_layers[b].tolist() == [*full.exit_layers[b, :n], *[-1] * (out.tokens.shape[1] - n)]
        assert n == NEW or any(stop in DECODE(row.tolist()) for stop in stops)
        assert not any(stop in DECODE(row[:-1].tolist()) for stop in stops)


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["exit", "full", "lossless"])
def test_rows_end_at_their_stop_strings(mode: str) -> None:
    full = whole(mode)
    texts = [DECODE(row.tolist()) for row in full.tokens]
    stops = [texts[1][6:9], texts[0][12:14]]
    arguments = {"tokenizer": ByteTokenizer(), "max_new_tokens": NEW, "eos_token_id": [], **PENALTY}
    out = engine().generate(PROMPTS, mode=mode, stop_strings=stops, **arguments)
    check_cut(out, full, stops)
    assert out.lengths[1] < NEW
    assert out.lengths[0] < NEW
    assert out.stats.tokens == out.lengths.sum()
    # One of them alone, streamed: the others go on to the end.
    steps = list(engine().stream(PROMPTS, mode=mode, stop_strings=stops[0], **arguments))
    streamed = [[int(s.tokens[b]) for s in steps if s.exit_layers[b] >= 0] for b in range(3)]
    alone = engine().generate(PROMPTS, mode=mode, stop_strings=stops[0], **arguments)
    assert streamed == [row.tolist() for row in alone.new_tokens]
    check_cut(alone, full, stops[:1])


def test_no_step_runs_after_the_last_stop_string() -> None:
    full = whole("full")
    stop = DECODE(full.tokens[1].tolist())[6:9]
    out = engine().generate(
        PROMPTS[1],
        mode="full",
        max_new_tokens=NEW,
        eos_token_id=[],
        stop_strings=[stop],
        tokenizer=ByteTokenizer(),
        **PENALTY,
    )
    assert out.stats.steps == out.lengths[0] == out.tokens.shape[1] < NEW
    assert out.stats.layers_executed == 2 * out.stats.steps


@pytest.mark.parametrize("mode", ["exit", "lossless"])
@pytest.mark.matrix
def test_max_length_counts_the_prompt_of_each_row(mode: str) -> None:
    out = engine().generate(PROMPTS, mode=mode, max_length=24, eos_token_id=[], **PENALTY)
    assert [len(row) for row in out.sequences] == [24, 24, 24]
    assert out.lengths.tolist() == [20, 22, 4]
    for row, full in zip(out.new_tokens, whole(mode).tokens, strict=True):
        assert row.tolist() == full[: len(row)].tolist()
    forced = engine().generate(PROMPTS, mode=mode, max_length=24, eos_token_id=[], forced_eos_token_id=7, **PENALTY)
    assert [row[-1] for row in forced.sequences] == [7, 7, 7]
    assert engine().generate(PROMPTS, mode=mode, max_length=24, max_new_tokens=3).tokens.shape[1] <= 3


def test_sequences_hold_prompts_and_no_padding() -> None:
    out = engine().generate(np.asarray([[0, 0, 5], [4, 5, 6]]), attention_mask=[[0, 0, 1], [1, 1, 1]], max_new_tokens=6)
    assert [row.tolist() for row in out.sequences] == [
        [*prompt, *row[:length]]
        for prompt, row, length in zip([[5], [4, 5, 6]], out.tokens.tolist(), out.lengths, strict=True)
    ]


def test_a_generation_config_sets_them_too(caplog: pytest.LogCaptureFixture) -> None:
    stop = DECODE(whole("full").tokens[1].tolist())[6:9]
    arguments: dict[str, Any] = {"mode": "full", "eos_token_id": [], "tokenizer": ByteTokenizer(), **PENALTY}
    config = {"max_length": 25, "stop_strings": [stop]}
    with caplog.at_level(logging.WARNING):
        found = engine().generate(PROMPTS, generation_config=config, **arguments)
    wanted = engine().generate(PROMPTS, max_length=25, stop_strings=[stop], **arguments)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    assert not caplog.records
    assert found.lengths[1] < 23


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"stop_strings": ["a"]}, "stop_strings needs tokenizer="),
        ({"stop_strings": 7, "tokenizer": ByteTokenizer()}, "stop_strings='7' must be a string"),
        ({"stop_strings": ["a", ""], "tokenizer": ByteTokenizer()}, "must be a string with text"),
        ({"stop_strings": ["a"], "tokenizer": object()}, "stop_strings needs tokenizer="),
        ({"max_length": 0}, "max_length=0"),
        ({"max_length": 2.5}, "max_length=2.5"),
        ({"max_length": 20}, "a prompt has 20 tokens and max_length=20 counts them"),
    ],
)
def test_other_values_are_refused(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(tide_jax.TideError, match=expected):
        engine().generate(PROMPTS, **arguments)
    with pytest.raises(tide_jax.TideError, match=expected):
        engine().stream(PROMPTS, **arguments)


def test_a_length_beyond_the_context_is_clipped(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        out = engine().generate([[5] * 60], max_length=80, eos_token_id=[])
    assert len(out.sequences[0]) == 65
    assert "max_length=80 clipped to 65: the context holds 64 tokens" in caplog.text


def test_sampled_rows_stop_too() -> None:
    arguments: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": NEW, "eos_token_id": []}
    full = engine().generate(PROMPTS, key=jax.random.key(3), **arguments)
    stop = DECODE(full.tokens[2].tolist())[5:7]
    arguments |= {"stop_strings": stop, "tokenizer": ByteTokenizer()}
    check_cut(engine().generate(PROMPTS, key=jax.random.key(3), **arguments), full, [stop])

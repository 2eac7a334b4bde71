"""Rules on logits against transformers' processors, over random rows and random rules."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tide_jax import TideError
from tide_jax.generation.logit_rules import RowText, apply_rules, make_rules
from tide_jax.model.generation_settings import GenerationSettings

EXAMPLES = int(os.environ.get("TIDE_EXAMPLES", "300"))
VOCAB, WIDTH, NEW, EOS = 13, 24, 9, [2, 5]
apply = jax.jit(apply_rules)


def random_settings(rng: np.random.Generator) -> dict[str, Any]:
    """Every rule alone and with others, with values that matter for rows of a few dozen tokens."""

    def ids(most: int) -> list[int]:
        return rng.integers(0, VOCAB, rng.integers(1, most)).tolist()

    drawn = {
        "no_repeat_ngram_size": int(rng.integers(0, 5)),
        "bad_words_ids": [ids(5) for _ in range(rng.integers(1, 30))],
        "min_length": int(rng.integers(0, 20)),
        "min_new_tokens": int(rng.integers(0, NEW)),
        "forced_bos_token_id": int(rng.integers(VOCAB)),
        "forced_eos_token_id": ids(3),
        "suppress_tokens": ids(6),
        "begin_suppress_tokens": ids(6),
    }
    share = rng.choice([0.2, 0.5, 0.9])
    return {name: value for name, value in drawn.items() if rng.random() < share}


def by_transformers(logits: np.ndarray, row: list[int], made: int, settings: dict[str, Any]) -> np.ndarray:
    """One row's logits after transformers' processors, in the order of its `generate`."""
    import torch
    import transformers as t

    prompt, forced = len(row) - made, settings.get("forced_bos_token_id")
    begin = prompt if prompt > 1 or forced is None else prompt + 1
    settings = dict(settings)
    if "min_new_tokens" in settings:
        settings.pop("min_length", None)
    processors = {
        "no_repeat_ngram_size": lambda size: t.NoRepeatNGramLogitsProcessor(size) if size else None,
        "bad_words_ids": lambda words: t.NoBadWordsLogitsProcessor(words, EOS),
        "min_length": lambda length: t.MinLengthLogitsProcessor(length, EOS),
        "min_new_tokens": lambda count: t.MinNewTokensLengthLogitsProcessor(prompt, count, EOS),
        "forced_bos_token_id": t.ForcedBOSTokenLogitsProcessor,
        "forced_eos_token_id": lambda ids: t.ForcedEOSTokenLogitsProcessor(prompt + NEW, ids),
        "suppress_tokens": t.SuppressTokensLogitsProcessor,
        "begin_suppress_tokens": lambda ids: t.SuppressTokensAtBeginLogitsProcessor(ids, begin),
    }
    scores = torch.tensor(logits)[None]
    for name, make in processors.items():
        if name in settings and (processor := make(settings[name])) is not None:
            scores = processor(torch.tensor([row]), scores)
    return scores[0].numpy()


def test_rules_are_transformers_processors() -> None:
    pytest.importorskip("torch")
    rng, changed = np.random.default_rng(0), 0
    for _ in range(EXAMPLES):
        settings = random_settings(rng)
        made = rng.integers(0, NEW, 6)
        lengths = made + rng.integers(1, 12, 6)
        ends = np.minimum(lengths + rng.integers(0, 9, 6), WIDTH)
        tokens = rng.integers(0, rng.choice([3, VOCAB]), (6, WIDTH))
        logits = rng.normal(size=(6, VOCAB)).astype(np.float32)
        rows = [tokens[b, ends[b] - lengths[b] : ends[b]].tolist() for b in range(6)]
        wanted = [by_transformers(*of, settings) for of in zip(logits, rows, made.tolist(), strict=True)]
        rules = make_rules(GenerationSettings(**settings), VOCAB)
        found = logits
        if rules is not None:
            eos = np.asarray([[*EOS, -1]] * 6)
            made, lengths, eos, tokens, ends = (jnp.asarray(a, jnp.int32) for a in (made, lengths, eos, tokens, ends))
            text = RowText(made, lengths, made == NEW - 1, eos, tokens, ends)
            found = np.asarray(apply(jnp.asarray(logits), rules, text))
        np.testing.assert_array_equal(found, np.stack(wanted), err_msg=str(settings))
        changed += not np.array_equal(found, logits)
    assert changed > EXAMPLES / 2


def test_settings_that_forbid_nothing_are_no_rules() -> None:
    off = {
        "no_repeat_ngram_size": 0,
        "bad_words_ids": [],
        "min_length": 0,
        "min_new_tokens": 0,
        "forced_bos_token_id": -1,
        "forced_eos_token_id": [],
        "suppress_tokens": [],
        "begin_suppress_tokens": [-1],
        "temperature": 0.5,
    }
    assert make_rules(GenerationSettings(), VOCAB) is None
    assert make_rules(GenerationSettings(**off), VOCAB) is None


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"forced_bos_token_id": VOCAB}, "forced_bos_token_id=.* is outside the vocabulary of 0"),
        ({"forced_eos_token_id": [2, VOCAB]}, "forced_eos_token_id=.* is outside the vocabulary of 0"),
        ({"suppress_tokens": list(range(VOCAB + 3))}, "suppress_tokens holds all .* tokens, and leaves none"),
        ({"begin_suppress_tokens": list(range(VOCAB))}, "begin_suppress_tokens holds all .* tokens"),
    ],
)
def test_rules_that_leave_no_token_are_refused(settings: dict[str, Any], expected: str) -> None:
    """The likeliest of tokens that all have minus infinity is number 0, which no one asked for."""
    with pytest.raises(TideError, match=expected):
        make_rules(GenerationSettings(**settings), VOCAB)
    allowed = {name: value[1:] if isinstance(value, list) else value - 1 for name, value in settings.items()}
    if "forced_eos_token_id" not in settings:
        assert make_rules(GenerationSettings(**allowed), VOCAB) is not None


def test_rows_end_by_ids_of_their_own() -> None:
    rules = make_rules(GenerationSettings(min_new_tokens=3, bad_words_ids=((4,), (6,))), VOCAB)
    eos = jnp.asarray([[4, -1], [-1, -1], [7, 8]], jnp.int32)
    made = jnp.asarray([0, 0, 3], jnp.int32)
    text = RowText(made, made + 2, jnp.zeros(3, bool), eos, None, None)
    found = np.isinf(np.asarray(apply(jnp.zeros((3, VOCAB)), rules, text)))
    assert [np.flatnonzero(row).tolist() for row in found] == [[4, 6], [4, 6], [4, 6]]
    later = np.isinf(np.asarray(apply(jnp.zeros((3, VOCAB)), rules, text._replace(made=made + 3))))
    assert [np.flatnonzero(row).tolist() for row in later] == [[6], [4, 6], [4, 6]]

"""Rules that forbid or force tokens, as pure functions on logits: minimum lengths, bad words, repeated n-grams.

They apply in transformers' order, after the repetition penalty and before the sampling filters. Their values are
traced. Compiled in are only whether there are `SequenceRules`, and the bucketed size of the list of bad words. A
generation without rules passes None, and its program contains no code for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tide_jax.errors import TideError
from tide_jax.generation.batch import bucket
from tide_jax.model.generation_settings import GenerationSettings

_NO_TOKEN = -1


class SequenceRules(NamedTuple):
    """Rules that depend on the row's tokens.

    Attributes:
      ngram_size: n-grams of this size may occur only once in a row; 0 turns the rule off. int32 scalar.
      words: forbidden sequences of at least two tokens each, padded with -1 in front. int32 [W, L].
    """

    ngram_size: Int[Array, ""]
    words: Int[Array, "W L"]


class LogitRules(NamedTuple):
    """Forbidden and forced tokens.

    Attributes:
      min_length, min_new_tokens: least tokens of a row, with and without its prompt, before it may end; int32 scalars.
      forced_first: forced first new token after a prompt of one token; -1 for none. int32 scalar.
      forced_last: tokens of which one is forced as a row's last token; all False for none. bool [V].
      bad: bad words of a single token; end-of-sequence tokens are exempt. bool [V].
      suppressed, suppressed_first: tokens forbidden always, and as first new token. bool [V].
      sequences: rules that depend on the row's tokens; None if there are none.
    """

    min_length: Int[Array, ""]
    min_new_tokens: Int[Array, ""]
    forced_first: Int[Array, ""]
    forced_last: Bool[Array, " V"]
    bad: Bool[Array, " V"]
    suppressed: Bool[Array, " V"]
    suppressed_first: Bool[Array, " V"]
    sequences: SequenceRules | None


class RowText(NamedTuple):
    """The rows' text before the next token, as input of the rules.

    Attributes:
      made: new tokens of each row so far, int32 [N].
      length: tokens of each row so far, prompt included, int32 [N].
      last: rows whose next token is the last they may have, bool [N].
      eos: end-of-sequence ids of each row, padded with -1, int32 [N, E].
      tokens: the text of row n ends before column ``ends[n]``. int32 [N, S]; None if no rule reads it.
      ends: int32 [N]; None if no rule reads it.
    """

    made: Int[Array, " N"]
    length: Int[Array, " N"]
    last: Bool[Array, " N"]
    eos: Int[Array, "N E"]
    tokens: Int[Array, "N S"] | None
    ends: Int[Array, " N"] | None


def make_rules(settings: GenerationSettings, vocab_size: int) -> LogitRules | None:
    """Builds the rules from generation settings; None if the settings have no rules.

    Forbidden ids outside the vocabulary are ignored.

    Raises:
      TideError: a token outside the vocabulary is forced, or every token is suppressed.
    """
    _check_choice(settings, vocab_size)
    # Bad words of one token are a mask; longer ones have to be compared with the row's text.
    words = settings.bad_words_ids or ()
    single = [word[0] for word in words if len(word) == 1]
    several = [word for word in words if len(word) > 1]
    ngram_size = settings.no_repeat_ngram_size or 0
    # As in transformers, `min_new_tokens` overrides `min_length`, even with 0.
    min_length = (settings.min_length or 0) if settings.min_new_tokens is None else 0
    forced_first = _NO_TOKEN if settings.forced_bos_token_id is None else settings.forced_bos_token_id

    def mask(ids: Sequence[int] | None) -> Array:
        out = np.zeros((vocab_size,), bool)
        out[[i for i in ids or () if i < vocab_size]] = True
        return jnp.asarray(out)

    rules = LogitRules(
        min_length=jnp.int32(min_length),
        min_new_tokens=jnp.int32(settings.min_new_tokens or 0),
        forced_first=jnp.int32(forced_first),
        forced_last=mask(settings.forced_eos_token_id),
        bad=mask(single),
        suppressed=mask(settings.suppress_tokens),
        suppressed_first=mask(settings.begin_suppress_tokens),
        sequences=SequenceRules(jnp.int32(ngram_size), _table(several, vocab_size)) if several or ngram_size else None,
    )
    lists = settings.forced_eos_token_id, settings.suppress_tokens, settings.begin_suppress_tokens, words
    numbers = min_length, settings.min_new_tokens, ngram_size
    return rules if any(lists) or any(numbers) or forced_first >= 0 else None


def _check_choice(settings: GenerationSettings, vocab_size: int) -> None:
    """Raises TideError for rules that leave no token: if all logits are minus infinity, argmax returns token 0."""
    first = settings.forced_bos_token_id
    forced = {
        "forced_bos_token_id": () if first is None else (first,),
        "forced_eos_token_id": settings.forced_eos_token_id or (),
    }
    for name, ids in forced.items():
        for token in ids:
            if token >= vocab_size:
                raise TideError(f"{name}={token} is outside the vocabulary of 0..{vocab_size - 1}; force another token")
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        if len({token for token in getattr(settings, name) or () if token < vocab_size}) == vocab_size:
            raise TideError(f"{name} holds all {vocab_size} tokens, and leaves none to choose; take some out")


def _table(words: Sequence[Sequence[int]], vocab_size: int) -> Array:
    """Right-aligned words; unused rows of the table forbid a token that does not exist."""
    longest = max((len(word) for word in words), default=2)
    table = np.full((bucket(len(words), 8), bucket(longest, 4)), _NO_TOKEN, np.int32)
    table[:, -1] = vocab_size
    for row, word in zip(table, words, strict=False):
        row[len(row) - len(word) :] = word
    return jnp.asarray(table)


def rule_on(
    rules: LogitRules | None, text: Callable[[], RowText]
) -> Callable[[Float[Array, "N V"]], Float[Array, "N V"]] | None:
    """The rules as a function of logits; None without rules. Only with rules is `text` called."""
    return None if rules is None else lambda logits: apply_rules(logits, rules, text())


def apply_rules(logits: Float[Array, "N V"], rules: LogitRules, text: RowText) -> Float[Array, "N V"]:
    """Sets the logits of forbidden tokens to minus infinity, applying rules in transformers' order."""
    # Bad words, repeated n-grams, and ends of rows that are too short.
    vocabulary = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
    ends = _mark_ids(text.eos, logits.shape[-1])
    banned = rules.bad[None] & ~ends
    if rules.sequences is not None:
        banned = banned | _ngram_completions(rules.sequences.ngram_size, text, logits.shape[-1])
        banned = banned | _bad_word_completions(rules.sequences.words, text, logits.shape[-1])
    early = (text.length < rules.min_length) | (text.made < rules.min_new_tokens)
    banned = banned | (early[:, None] & ends)
    logits = jnp.where(banned, -jnp.inf, logits)
    # A forced token overrides the rules above; a suppressed token stays forbidden even if forced.
    after_one = (rules.forced_first >= 0) & (text.length == 1)
    logits = _force_tokens(logits, after_one, vocabulary == rules.forced_first)
    last = jnp.any(rules.forced_last) & text.last
    logits = _force_tokens(logits, last, rules.forced_last[None])
    # If the first new token is forced, `suppressed_first` applies to the second.
    begin = jnp.where((rules.forced_first >= 0) & (text.length - text.made == 1), jnp.int32(1), jnp.int32(0))
    suppressed = rules.suppressed[None] | ((text.made == begin)[:, None] & rules.suppressed_first[None])
    return jnp.where(suppressed, -jnp.inf, logits)


def _force_tokens(
    logits: Float[Array, "N V"], rows: Bool[Array, " N"], chosen: Bool[Array, "1 V"]
) -> Float[Array, "N V"]:
    return jnp.where(rows[:, None], jnp.where(chosen, 0.0, -jnp.inf), logits)


def _mark_ids(ids: Int[Array, "N E"], vocab_size: int) -> Bool[Array, "N V"]:
    """One-hot mask of each row's ids; -1 sets nothing."""
    rows = jnp.arange(ids.shape[0])[:, None]
    outside = jnp.int32(vocab_size)
    return jnp.zeros((ids.shape[0], vocab_size), bool).at[rows, jnp.where(ids < 0, outside, ids)].set(True, mode="drop")


def _ngram_completions(size: Int[Array, ""], text: RowText, vocab_size: int) -> Bool[Array, "N V"]:
    """Tokens that would complete an n-gram that already occurs in the row."""
    assert text.tokens is not None
    assert text.ends is not None
    tokens, ends = text.tokens, text.ends[:, None]
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    first = ends - text.length[:, None]
    # Candidates: places with n - 1 tokens of the row before them. Keep those whose n - 1 tokens are the newest ones.
    counts = (size > 0) & (places < ends) & (places - (size - 1) >= first)

    def compare(back: Array, same: Array) -> Array:
        earlier = jnp.take_along_axis(tokens, jnp.maximum(places - back, 0), axis=1)
        newest = jnp.take_along_axis(tokens, jnp.maximum(ends - back, 0), axis=1, mode="clip")
        return same & (earlier == newest)

    same = lax.fori_loop(jnp.int32(1), jnp.maximum(size, jnp.int32(1)), compare, counts)
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab_size), bool).at[rows, tokens].max(same, mode="drop")


def _bad_word_completions(words: Int[Array, "W L"], text: RowText, vocab_size: int) -> Bool[Array, "N V"]:
    """Tokens that would complete a forbidden word: its other tokens are the row's newest ones."""
    assert text.tokens is not None
    assert text.ends is not None
    # The row's newest tokens, with a token that matches nothing before the row's start.
    back = jnp.arange(words.shape[1] - 1, 0, -1, dtype=jnp.int32)[None]
    newest = jnp.take_along_axis(text.tokens, jnp.maximum(text.ends[:, None] - back, 0), axis=1, mode="clip")
    newest = jnp.where(back <= text.length[:, None], newest, jnp.int32(-2))
    before = words[None, :, :-1]
    complete = jnp.all((before == _NO_TOKEN) | (before == newest[:, None]), axis=2)
    banned = jnp.zeros((newest.shape[0], vocab_size), bool)
    return banned.at[:, words[:, -1]].max(complete, mode="drop")

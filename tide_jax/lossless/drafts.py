"""Drafts from the text itself: what followed the last time that its newest tokens stood there.

A drafter is a function of the rows so far that returns `Drafts`. It says how far to trust each row's drafts, as a small
number: `tide_jax.lossless.control` learns for each number apart how often drafts hold.

Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding); here over the whole row, with the
longest match rather than a match of one length.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

LONGEST_MATCH = 8
"""Tokens compared at the most: longer matches are no better a reason to trust a draft."""


class Drafts(NamedTuple):
    """Guesses of the next tokens of each row.

    Attributes:
      tokens: the guesses.
      matched: tokens before them that agree with what they were copied from, 0 to `LONGEST_MATCH`; 0: no guess.
    """

    tokens: Int[Array, "B K"]
    matched: Int[Array, " B"]


def text_drafts(tokens: Int[Array, "B S"], start: Int[Array, " B"], end: Int[Array, " B"], count: int) -> Drafts:
    """`count` guesses for each row, from the latest of its longest matches.

    A copy that reaches the end of the row starts over, so what repeats goes on repeating.

    Args:
      tokens: rows of tokens; row b's are ``tokens[b, start[b]:end[b]]``, at least one.
    """
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    # Compare the newest tokens with those before every place, one step further back at a time.
    matched, agree = jnp.zeros(tokens.shape, jnp.int32), jnp.ones(tokens.shape, bool)
    for back in range(1, LONGEST_MATCH + 1):
        newest = jnp.take_along_axis(tokens, jnp.maximum(end - back, 0)[:, None], axis=1)
        earlier = jnp.pad(tokens, ((0, 0), (back, 0)))[:, : tokens.shape[1]]
        agree &= (earlier == newest) & (places - back >= start[:, None]) & ((end - back)[:, None] >= start[:, None])
        matched += agree.astype(jnp.int32)
    matched = jnp.where(places < end[:, None], matched, 0)
    # Of the longest matches, copy from the latest.
    source = jnp.argmax(matched * tokens.shape[1] + places, axis=1).astype(jnp.int32)
    best = jnp.take_along_axis(matched, source[:, None], axis=1)
    period = jnp.maximum(end - source, 1)[:, None]
    copied = source[:, None] + jnp.arange(count, dtype=jnp.int32)[None] % period
    return Drafts(jnp.take_along_axis(tokens, copied, axis=1, mode="clip"), best[:, 0])

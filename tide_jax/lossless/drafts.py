"""Drafts copied from the row itself: the tokens that followed an earlier occurrence of its newest tokens.

A drafter is a function from the rows so far to `Drafts`. With the drafts it returns a small number for each row, its
confidence in them: `tide_jax.lossless.control` learns an acceptance rate for each value.

This is prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding), but over the whole row and
with the longest match instead of a match of fixed length.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

LONGEST_MATCH = 8
"""Longest match that is compared: longer matches do not raise the acceptance rate."""


class Drafts(NamedTuple):
    """Draft tokens for each row.

    Attributes:
      tokens: K drafts of each row.
      matched: length of the match that the drafts continue, 0 to `LONGEST_MATCH`; 0: no drafts.
    """

    tokens: Int[Array, "B K"]
    matched: Int[Array, " B"]


def text_drafts(tokens: Int[Array, "B S"], start: Int[Array, " B"], end: Int[Array, " B"], count: int) -> Drafts:
    """Drafts `count` tokens for each row from its longest match, the latest if there are several.

    A copy that reaches the end of the row starts over at the match, so that a repeating text goes on repeating.

    Args:
      tokens: token ids; row b is ``tokens[b, start[b]:end[b]]``, at least one token.
      start: first column of each row.
      end: column behind each row's newest token.
      count: drafts for each row.
    """
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    # For every place, count how many tokens before it equal the row's newest ones, going back one token at a time.
    matched, agree = jnp.zeros(tokens.shape, jnp.int32), jnp.ones(tokens.shape, bool)
    for back in range(1, LONGEST_MATCH + 1):
        newest = jnp.take_along_axis(tokens, jnp.maximum(end - back, 0)[:, None], axis=1)
        earlier = jnp.pad(tokens, ((0, 0), (back, 0)))[:, : tokens.shape[1]]
        agree &= (earlier == newest) & (places - back >= start[:, None]) & ((end - back)[:, None] >= start[:, None])
        matched += agree.astype(jnp.int32)
    matched = jnp.where(places < end[:, None], matched, 0)
    # Copy from the latest of the longest matches.
    source = jnp.argmax(matched * tokens.shape[1] + places, axis=1).astype(jnp.int32)
    best = jnp.take_along_axis(matched, source[:, None], axis=1)
    period = jnp.maximum(end - source, 1)[:, None]
    copied = source[:, None] + jnp.arange(count, dtype=jnp.int32)[None] % period
    return Drafts(jnp.take_along_axis(tokens, copied, axis=1, mode="clip"), best[:, 0])

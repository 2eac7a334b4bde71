"""Drafters: who proposes the next tokens of each row. One of them copies from the row's own text.

A drafter looks at every row before each pass and says how confident it is. `tide_jax.lossless.control` learns how often
the drafts of each confidence are accepted, and chooses a drafter. Only then does that one draft. The full model
verifies the drafts (`tide_jax.lossless.verify`), so a drafter may be wrong, and must only be fast.

To add a drafter, write a NamedTuple with the members of `Drafter`; `tide_jax.lossless.decoding` has the list.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tide_jax.generation.generate import Request
from tide_jax.model.cache import KVCache
from tide_jax.model.decoder import Decoder

LONGEST_MATCH = 8
"""Longest match that is compared: longer matches do not raise the acceptance rate."""
_MATCH_EDGES = (3, 5, 8)
"""Acceptance is learned separately for matches of 2, 3 to 4, 5 to 7, and 8 or more tokens."""
_SHORTEST_MATCH = 2


class DraftedRows(NamedTuple):
    """Rows of a batch, drafts included.

    Attributes:
      tokens: row b is ``tokens[b, starts[b]:ends[b]]``.
      starts, ends: int32 [B].
      width: column of the first new token, int32 scalar.
      seen: tokens that occur in each row before its drafts.
    """

    tokens: Int[Array, "B S"]
    starts: Int[Array, " B"]
    ends: Int[Array, " B"]
    width: Int[Array, ""]
    seen: Bool[Array, "B V"]


class Drafts(NamedTuple):
    """Draft tokens for each row.

    Attributes:
      tokens: K drafts of each row.
      confidence: index into the drafter's `rates`, or -1: no drafts.
    """

    tokens: Int[Array, "B K"]
    confidence: Int[Array, " B"]


@runtime_checkable
class Drafter(Protocol):
    """Proposes tokens: a pytree.

    Attributes:
      name: one word, for reports.
      rates: for each confidence, prior estimates of `tide_jax.lossless.control.DraftControl`: how often the first draft
        is accepted, and each later one.
      model: the model that runs once for each draft; None if drafts cost nothing.
    """

    @property
    def name(self) -> str: ...

    @property
    def rates(self) -> tuple[tuple[float, float], ...]: ...

    @property
    def model(self) -> Decoder | None: ...

    def look(self, rows: DraftedRows, most: int) -> Drafts:
        """The confidence in each row's drafts, and `most` drafts of each row if they cost nothing."""
        ...

    def draft(
        self, found: Drafts, rows: DraftedRows, cache: KVCache, request: Request, most: Int[Array, ""]
    ) -> tuple[Drafts, KVCache]:
        """Up to `most` drafts of each row, none behind an end-of-sequence draft; the others are arbitrary.

        Args:
          found: what `look` returned.
          rows: the rows, without drafts.
          cache: keys and values of all tokens but the newest. The drafter may write behind them.
          request: sampling settings, key and rules; at temperature 0, the likeliest token is drafted.
          most: 0 if another drafter was chosen.
        """
        ...


class TextDrafter(NamedTuple):
    """Copies the tokens that followed an earlier occurrence of the row's newest tokens.

    This is prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding), but over the whole row
    and with the longest match instead of a match of fixed length. The confidence grows with the match.
    """

    @property
    def name(self) -> str:
        return "text"

    @property
    def rates(self) -> tuple[tuple[float, float], ...]:
        return (0.4, 0.2), (0.5, 0.5), (0.7, 0.7), (0.85, 0.88)

    @property
    def model(self) -> None:
        return None

    def look(self, rows: DraftedRows, most: int) -> Drafts:
        tokens, matched = text_drafts(rows.tokens, rows.starts, rows.ends, most)
        edges = jnp.asarray(_MATCH_EDGES, jnp.int32)[None]
        confidence = jnp.sum(matched[:, None] >= edges, axis=1, dtype=jnp.int32)
        return Drafts(tokens, jnp.where(matched >= _SHORTEST_MATCH, confidence, -1))

    def draft(
        self, found: Drafts, rows: DraftedRows, cache: KVCache, request: Request, most: Int[Array, ""]
    ) -> tuple[Drafts, KVCache]:
        return found, cache


def text_drafts(
    tokens: Int[Array, "B S"], start: Int[Array, " B"], end: Int[Array, " B"], count: int
) -> tuple[Int[Array, "B K"], Int[Array, " B"]]:
    """Drafts `count` tokens for each row from its longest match, the latest if there are several.

    A copy that reaches the end of the row starts over at the match, so that a repeating text goes on repeating.

    Args:
      tokens: token ids; row b is ``tokens[b, start[b]:end[b]]``, at least one token.
      start: first column of each row.
      end: column behind each row's newest token.
      count: drafts for each row.

    Returns:
      The drafts, and the length of the match that they continue, 0 to `LONGEST_MATCH`.
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
    return jnp.take_along_axis(tokens, copied, axis=1, mode="clip"), best[:, 0]

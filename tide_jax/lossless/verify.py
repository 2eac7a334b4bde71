"""Which drafts hold: the full model's answer at every slot that has run all layers, and the cache without the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tide_jax.exits.recompute import pass_number, pass_widths
from tide_jax.generation.finite import finite_rows
from tide_jax.generation.generate import Request
from tide_jax.generation.logit_rules import RowText, rule_on
from tide_jax.generation.sampling import row_keys, sample_rows
from tide_jax.model.cache import KVCache, newest_positions
from tide_jax.model.decoder import Decoder


class Drawn(NamedTuple):
    """Rows of tokens, drafts included.

    Attributes:
      tokens: row b's are ``tokens[b, starts[b]:ends[b]]``.
      starts, ends: int32 [B].
      width: column of the first new token, int32 scalar.
      seen: the tokens of each row before its drafts.
    """

    tokens: Int[Array, "B S"]
    starts: Int[Array, " B"]
    ends: Int[Array, " B"]
    width: Int[Array, ""]
    seen: Bool[Array, "B V"]


class Verified(NamedTuple):
    """Rows with nothing but tokens of the full model.

    Attributes:
      tokens, ends: as in `Drawn`.
      corrected: rows whose last token is the full model's answer rather than a draft.
      finite: rows whose answers come from numbers, bool [B].
      cache: drafts that do not hold are out of it, and nothing waits.
    """

    tokens: Int[Array, "B S"]
    ends: Int[Array, " B"]
    corrected: Bool[Array, " B"]
    finite: Bool[Array, " B"]
    cache: KVCache

    @property
    def queue_length(self) -> int:
        """Q, slots of the cache's queue."""
        assert self.cache.pending is not None
        return self.cache.pending.queue_length


def draw(
    logits: Float[Array, "B T V"],
    drawn: Drawn,
    columns: Int[Array, "B T"],
    request: Request,
    seen: Bool[Array, "B T V"],
) -> Int[Array, "B T"]:
    """Draws the tokens of the given columns of their rows, with the keys that full depth draws them with."""
    batch, size, vocabulary = logits.shape
    index = columns - drawn.width

    def keys() -> Array:
        by_index = jax.vmap(jax.vmap(lambda n: jax.random.fold_in(request.key, n)))(index)
        return jax.vmap(lambda row, keys: jax.vmap(lambda k: row_keys(k, row[None])[0])(keys))(
            jnp.arange(batch, dtype=jnp.int32), by_index
        ).reshape(-1)

    rule = rule_on(request.rules, request.max_new_tokens, lambda: row_text(drawn, columns, request))
    flat = sample_rows(keys, logits.reshape(-1, vocabulary), request.sampling, seen.reshape(-1, vocabulary), rule)
    return flat.reshape(batch, size)


def row_text(drawn: Drawn, columns: Int[Array, "B T"], request: Request) -> RowText:
    """The rows as rules read them, one for each column: what stands before it, drafts included."""
    size = columns.shape[1]
    return RowText(
        made=(columns - drawn.width).reshape(-1),
        length=(columns - drawn.starts[:, None]).reshape(-1),
        eos=jnp.repeat(request.eos, size, axis=0),
        tokens=jnp.repeat(drawn.tokens, size, axis=0) if request.reads_rows else None,
        ends=columns.reshape(-1) if request.reads_rows else None,
    )


def verified(model: Decoder, drawn: Drawn, cache: KVCache, first: Int[Array, ""], request: Request) -> Verified:
    """Holds drafts against the full model's answers.

    Args:
      drawn: the rows; the inputs of slots from `first` on, and drafts behind them.
      cache: all slots have run every layer; the newest ones' last states are in its `pending`.
      first: the first slot whose answer is not known yet.
    """
    pending = cache.pending
    assert pending is not None
    queue = pending.queue_length
    begin = cache.length - queue
    positions = newest_positions(cache, queue)
    checked = ((begin + jnp.arange(queue, dtype=jnp.int32)) >= first)[None] & (positions >= 0)
    columns = jnp.where(checked, positions + 1 + drawn.starts[:, None], 0)  # of the answers
    answers = _answers(model, drawn, pending.states, checked, columns, cache.length - first, request)
    drafts = jnp.take_along_axis(drawn.tokens, columns, axis=1)
    wrong = checked & ((columns >= drawn.ends[:, None]) | (answers != drafts))
    corrected, at = jnp.any(wrong, axis=1), jnp.argmax(wrong, axis=1).astype(jnp.int32)[:, None]
    column = jnp.take_along_axis(columns, at, axis=1)[:, 0]
    answer = jnp.take_along_axis(answers, at, axis=1)[:, 0]
    rows = jnp.arange(drawn.ends.shape[0])
    kept = ~checked | ~corrected[:, None] | (jnp.arange(queue, dtype=jnp.int32)[None] <= at)
    positions = jnp.where(kept, positions, -1)
    filled = jnp.max(jnp.where(positions >= 0, jnp.arange(1, queue + 1, dtype=jnp.int32)[None], 0))
    length = jnp.maximum(first, begin + filled)
    return Verified(
        tokens=drawn.tokens.at[rows, column].set(jnp.where(corrected, answer, drawn.tokens[rows, column])),
        ends=jnp.where(corrected, column + 1, drawn.ends),
        corrected=corrected,
        finite=finite_rows(pending.states, checked),
        cache=cache._replace(
            positions=lax.dynamic_update_slice(cache.positions, positions, (jnp.int32(0), begin)),
            length=length,
            pending=pending._replace(ran=jnp.broadcast_to(length, pending.ran.shape)),
        ),
    )


def _answers(
    model: Decoder,
    drawn: Drawn,
    states: Float[Array, "B Q D"],
    checked: Bool[Array, "B Q"],
    columns: Int[Array, "B Q"],
    needed: Int[Array, ""],
    request: Request,
) -> Int[Array, "B Q"]:
    """What the full model draws at each slot; of as few slots as a compiled width allows."""
    queue = states.shape[1]

    def of_last(width: int) -> Callable[[], Array]:
        def run() -> Array:
            logits = model.logits(model.final_norm(states[:, -width:].astype(model.dtype)))
            seen = _seen(drawn, checked[:, -width:], columns[:, -width:], request)
            found = draw(logits, drawn, columns[:, -width:], request, seen)
            return jnp.pad(found, ((0, 0), (queue - width, 0)))

        return run

    return lax.switch(pass_number(needed, queue), [of_last(w) for w in pass_widths(queue)])


def _seen(
    drawn: Drawn, checked: Bool[Array, "B W"], columns: Int[Array, "B W"], request: Request
) -> Bool[Array, "B W V"]:
    """Tokens in the row before each answer, its drafts included."""
    shape = (*checked.shape, drawn.seen.shape[-1])

    def with_drafts() -> Array:
        inputs = jnp.take_along_axis(drawn.tokens, jnp.maximum(columns - 1, 0), axis=1)
        own = (jnp.arange(shape[-1], dtype=jnp.int32)[None, None] == inputs[:, :, None]) & checked[:, :, None]
        return drawn.seen[:, None] | (jnp.cumsum(own, axis=1) > 0)

    plain = jnp.broadcast_to(drawn.seen[:, None], shape)
    return lax.cond(request.sampling.repetition_penalty == 1.0, lambda: plain, with_drafts)

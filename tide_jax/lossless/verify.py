"""One pass of the full model over the newest token of each row and its drafts, and which of the drafts hold.

The answer at every slot is drawn with the key that full depth draws it with, and a draft holds if it is that answer. So
greedy or not, tokens are those of ``mode="full"`` with the same key, up to rounding, and need no rule of rejection:
speculative decoding (Leviathan et al. 2023, arXiv:2211.17192) with drafter and verifier coupled by common random
numbers (Daliri et al. 2024, arXiv:2408.07978).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from tide_jax.exits.depth import run_depth
from tide_jax.exits.queue import pass_number, pass_widths
from tide_jax.generation.finite import finite_rows
from tide_jax.generation.generate import Request
from tide_jax.generation.logit_rules import RowText, rule_on
from tide_jax.generation.sampling import row_keys, sample_rows
from tide_jax.model.attention.span import KeyValue
from tide_jax.model.cache import KVCache
from tide_jax.model.decoder import Decoder


class Rows(NamedTuple):
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


class Answers(NamedTuple):
    """What the full model says at the slots of one pass.

    Attributes:
      tokens: drawn at each slot.
      finite: rows whose answers come from numbers.
      new: key and value rows of every layer, ``[L, B, KV, Q, channels]``.
    """

    tokens: Int[Array, "B Q"]
    finite: Bool[Array, " B"]
    new: KeyValue


class Verified(NamedTuple):
    """Rows with nothing but tokens of the full model.

    Attributes:
      tokens, ends: as in `Rows`.
      corrected: rows whose last token is the full model's answer rather than a draft.
      cache: with the slots whose inputs hold.
    """

    tokens: Int[Array, "B S"]
    ends: Int[Array, " B"]
    corrected: Bool[Array, " B"]
    cache: KVCache


def answer(
    model: Decoder,
    rows: Rows,
    inputs: Int[Array, "B Q"],
    positions: Int[Array, "B Q"],
    count: Int[Array, ""],
    cache: KVCache,
    request: Request,
) -> Answers:
    """Runs the full model over the new slots, as few of them as a compiled width allows.

    Args:
      inputs: tokens of the slots.
      positions: their positions in the rows, -1 where a row has none.
      count: leading slots that some row has.
    """
    most = inputs.shape[1]

    def of_first(width: int) -> Answers:
        tokens, places = inputs[:, :width], positions[:, :width]
        out = run_depth(model, tokens, places, cache)
        columns = jnp.where(places >= 0, places + 1 + rows.starts[:, None], 0)
        drawn = draw(model, out.states, rows, columns, _seen(rows, tokens, places >= 0, request), request)
        return Answers(
            tokens=jnp.pad(drawn, ((0, 0), (0, most - width))),
            finite=finite_rows(out.states, places >= 0),
            new=KeyValue(*(_padded(a, most) for a in out.new)),
        )

    return lax.switch(pass_number(count, most), [lambda w=w: of_first(w) for w in pass_widths(most)])


def verify_drafts(rows: Rows, answers: Answers, positions: Int[Array, "B Q"], cache: KVCache) -> Verified:
    """Keeps the drafts that match the full model's tokens, and its answer behind them.

    Args:
      rows: with the drafts.
      positions: of the pass's slots, -1 where a row has none.
      cache: before the pass.
    """
    # A slot's answer is right if the row has that very token there; what is behind the first that is not falls.
    ran, slots = positions >= 0, jnp.arange(positions.shape[1], dtype=jnp.int32)[None]
    columns = jnp.where(ran, positions + 1 + rows.starts[:, None], 0)
    drafts = jnp.take_along_axis(rows.tokens, columns, axis=1)
    wrong = ran & ((columns >= rows.ends[:, None]) | (answers.tokens != drafts))
    corrected, at = jnp.any(wrong, axis=1), jnp.argmax(wrong, axis=1).astype(jnp.int32)[:, None]
    column, correct = (jnp.take_along_axis(a, at, axis=1)[:, 0] for a in (columns, answers.tokens))
    # The cache keeps the slots whose inputs hold. Rows share slots: one that keeps fewer leaves some empty.
    kept = ran & (~corrected[:, None] | (slots <= at))
    used = jnp.max(jnp.where(kept, slots + 1, 0))
    grown = cache.append(answers.new, jnp.where(kept, positions, -1))
    index = jnp.arange(rows.ends.shape[0])
    return Verified(
        tokens=rows.tokens.at[index, column].set(jnp.where(corrected, correct, rows.tokens[index, column])),
        ends=jnp.where(corrected, column + 1, rows.ends),
        corrected=corrected,
        cache=grown._replace(length=cache.length + used),
    )


def draw(
    model: Decoder,
    states: Array,
    rows: Rows,
    columns: Int[Array, "B T"],
    seen: Bool[Array, "B T V"],
    request: Request,
) -> Int[Array, "B T"]:
    """Draws the tokens of the given columns of their rows, with the keys that full depth draws them with.

    Args:
      states: final-normed states before them, [B, T, D].
      seen: tokens before each, for the repetition penalty.
    """
    logits, index = model.logits(states), columns - rows.width
    batch, size, vocabulary = logits.shape

    def keys() -> Array:
        by_index = jax.vmap(jax.vmap(lambda n: jax.random.fold_in(request.key, n)))(index)
        return jax.vmap(lambda row, keys: jax.vmap(lambda k: row_keys(k, row[None])[0])(keys))(
            jnp.arange(batch, dtype=jnp.int32), by_index
        ).reshape(-1)

    rule = rule_on(request.rules, request.max_new_tokens, lambda: row_text(rows, columns, request))
    flat = sample_rows(keys, logits.reshape(-1, vocabulary), request.sampling, seen.reshape(-1, vocabulary), rule)
    return flat.reshape(batch, size)


def row_text(rows: Rows, columns: Int[Array, "B T"], request: Request) -> RowText:
    """The rows as rules read them, one for each column: what stands before it, drafts included."""
    size = columns.shape[1]
    return RowText(
        made=(columns - rows.width).reshape(-1),
        length=(columns - rows.starts[:, None]).reshape(-1),
        eos=jnp.repeat(request.eos, size, axis=0),
        tokens=jnp.repeat(rows.tokens, size, axis=0) if request.reads_rows else None,
        ends=columns.reshape(-1) if request.reads_rows else None,
    )


def _seen(rows: Rows, inputs: Int[Array, "B W"], ran: Bool[Array, "B W"], request: Request) -> Bool[Array, "B W V"]:
    """Tokens in the row before each answer, its drafts included."""
    shape = (*inputs.shape, rows.seen.shape[-1])

    def with_drafts() -> Array:
        own = (jnp.arange(shape[-1], dtype=jnp.int32)[None, None] == inputs[:, :, None]) & ran[:, :, None]
        return rows.seen[:, None] | (jnp.cumsum(own, axis=1) > 0)

    plain = jnp.broadcast_to(rows.seen[:, None], shape)
    return lax.cond(request.sampling.repetition_penalty == 1.0, lambda: plain, with_drafts)


def _padded(rows: Array, most: int) -> Array:
    """Key or value rows behind which there is nothing, up to `most` slots."""
    return jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, most - rows.shape[3]), (0, 0)))

"""Runs the full model over the newest token of each row and its drafts, and accepts the drafts that match its tokens.

The full model's token at each slot is drawn with the same random key as at full depth, and a draft is accepted if it is
that token. So the tokens equal those of ``mode="full"`` with the same key, up to rounding, greedy or not, and no
rejection sampling is needed. This is speculative decoding (Leviathan et al. 2023, arXiv:2211.17192) with drafter and
verifier coupled by common random numbers (Daliri et al. 2024, arXiv:2408.07978).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from tide_jax.exits.depth import run_depth
from tide_jax.generation.generate import Request
from tide_jax.generation.logit_rules import RowText, rule_on
from tide_jax.generation.sampling import row_keys, sample_rows
from tide_jax.lossless.control import verify_index, verify_widths
from tide_jax.lossless.drafts import DraftedRows
from tide_jax.model.cache import KVCache, only_slots, place_rows
from tide_jax.model.decoder import Decoder
from tide_jax.model.memory import Rows


class Answers(NamedTuple):
    """Output of the full model at the slots of one pass.

    Attributes:
      tokens: next token drawn at each slot.
      finite: slots whose states are finite.
      new: what each layer keeps of the tokens.
    """

    tokens: Int[Array, "B Q"]
    finite: Bool[Array, "B Q"]
    new: tuple[Rows, ...]


class Verification(NamedTuple):
    """Rows after verification: every token is the full model's.

    Attributes:
      tokens, ends: as in `DraftedRows`.
      finite: rows whose states are finite, up to the newest token.
      cache: the cache with the slots of accepted inputs.
    """

    tokens: Int[Array, "B S"]
    ends: Int[Array, " B"]
    finite: Bool[Array, " B"]
    cache: KVCache


def run_full_model(
    model: Decoder,
    rows: DraftedRows,
    inputs: Int[Array, "B Q"],
    positions: Int[Array, "B Q"],
    used: Int[Array, ""],
    cache: KVCache,
    request: Request,
) -> Answers:
    """Runs the full model over the slots of a pass, in the smallest compiled width, and draws a token at each.

    Args:
      model: the decoder.
      rows: the rows, drafts included.
      inputs: tokens of the slots.
      positions: positions of these tokens in their rows, -1 if a row does not use the slot.
      used: leading slots that at least one row uses.
      cache: the tokens before the slots.
      request: sampling settings, key and rules.
    """
    most = inputs.shape[1]

    def of_first(width: int) -> Answers:
        tokens, places = inputs[:, :width], positions[:, :width]
        out = run_depth(model, tokens, places, cache)
        columns = jnp.where(places >= 0, places + 1 + rows.starts[:, None], 0)
        drawn = draw(model, out.states, rows, columns, _seen_before(rows, tokens, places >= 0, request), request)
        return Answers(
            tokens=jnp.pad(drawn, ((0, 0), (0, most - width))),
            finite=jnp.pad(jnp.all(jnp.isfinite(out.states), axis=2), ((0, 0), (0, most - width))),
            new=jax.tree.map(lambda a: place_rows(a, most, 0), out.new),
        )

    return lax.switch(verify_index(used, most), [lambda w=w: of_first(w) for w in verify_widths(most)])


def verify_drafts(
    model: Decoder, rows: DraftedRows, answers: Answers, positions: Int[Array, "B Q"], cache: KVCache
) -> Verification:
    """Accepts drafts that match the full model's tokens and rolls the cache back past the first mismatch.

    Behind its accepted drafts, each running row gets one token of the full model.

    Args:
      model: the decoder.
      rows: the rows, drafts included.
      answers: the full model's output at the slots.
      positions: positions of the slots, -1 if a row does not use the slot.
      cache: the cache before the pass.
    """
    # Compare each slot's token with the draft behind it. The last slot has none, which counts as a mismatch, so every
    # row that ran has one.
    ran, slots = positions >= 0, jnp.arange(positions.shape[1], dtype=jnp.int32)[None]
    columns = jnp.where(ran, positions + 1 + rows.starts[:, None], 0)
    drafts = jnp.take_along_axis(rows.tokens, columns, axis=1)
    wrong = ran & ((columns >= rows.ends[:, None]) | (answers.tokens != drafts))
    running, at = jnp.any(ran, axis=1), jnp.argmax(wrong, axis=1).astype(jnp.int32)[:, None]
    # At the first mismatch, take the full model's token; later drafts are dropped.
    column, correct = (jnp.take_along_axis(a, at, axis=1)[:, 0] for a in (columns, answers.tokens))
    # The cache keeps the slots of accepted inputs. Rows share slots: a row that keeps fewer leaves some empty.
    kept = ran & (slots <= at)
    used = jnp.max(jnp.where(kept, slots + 1, 0))
    # Rejected drafts leave zeros: attention multiplies what it masks by zero, and zero times infinity is not a number.
    new = only_slots(answers.new, kept)
    grown = cache.append(new, jnp.where(kept, positions, -1), model.layers)
    index = jnp.arange(rows.ends.shape[0])
    return Verification(
        tokens=rows.tokens.at[index, column].set(jnp.where(running, correct, rows.tokens[index, column])),
        ends=jnp.where(running, column + 1, rows.ends),
        finite=jnp.all(answers.finite | ~kept, axis=1),
        cache=grown._replace(length=cache.length + used),
    )


def draw(
    model: Decoder,
    states: Array,
    rows: DraftedRows,
    columns: Int[Array, "B T"],
    seen: Bool[Array, "B T V"],
    request: Request,
) -> Int[Array, "B T"]:
    """Draws the tokens for the given columns, with the same random keys as full depth.

    Args:
      model: the decoder.
      states: final-normed states of the tokens before these columns, [B, T, D].
      rows: the rows, drafts included.
      columns: columns of `rows.tokens` to draw.
      seen: tokens that occur before each column, for the repetition penalty.
      request: sampling settings, key and rules.
    """
    logits, index = model.logits(states), columns - rows.width
    batch, size, vocabulary = logits.shape

    # As in plain decoding: fold the index of the new token into the key, then the row.
    def keys() -> Array:
        by_index = jax.vmap(jax.vmap(lambda n: jax.random.fold_in(request.key, n)))(index)
        return jax.vmap(lambda row, keys: jax.vmap(lambda k: row_keys(k, row[None])[0])(keys))(
            jnp.arange(batch, dtype=jnp.int32), by_index
        ).reshape(-1)

    rule = rule_on(request.rules, lambda: row_text(rows, columns, request))
    flat = sample_rows(keys, logits.reshape(-1, vocabulary), request.sampling, seen.reshape(-1, vocabulary), rule)
    return flat.reshape(batch, size)


def row_text(rows: DraftedRows, columns: Int[Array, "B T"], request: Request) -> RowText:
    """Input of the logit rules, one entry for each column: the row's tokens before it, drafts included."""
    size = columns.shape[1]
    made, length = (columns - rows.width).reshape(-1), (columns - rows.starts[:, None]).reshape(-1)
    return RowText(
        made=made,
        length=length,
        last=request.before_last(made, length),
        eos=jnp.repeat(request.eos, size, axis=0),
        tokens=jnp.repeat(rows.tokens, size, axis=0) if request.reads_rows else None,
        ends=columns.reshape(-1) if request.reads_rows else None,
    )


def _seen_before(
    rows: DraftedRows, inputs: Int[Array, "B W"], ran: Bool[Array, "B W"], request: Request
) -> Bool[Array, "B W V"]:
    """Tokens that occur in the row before each drawn token, drafts included."""
    shape = (*inputs.shape, rows.seen.shape[-1])

    def with_drafts() -> Array:
        own = (jnp.arange(shape[-1], dtype=jnp.int32)[None, None] == inputs[:, :, None]) & ran[:, :, None]
        return rows.seen[:, None] | (jnp.cumsum(own, axis=1) > 0)

    plain = jnp.broadcast_to(rows.seen[:, None], shape)
    return lax.cond(request.sampling.repetition_penalty == 1.0, lambda: plain, with_drafts)

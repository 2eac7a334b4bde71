"""The decoding loop of ``mode="lossless"``: the text gives drafts, the full model verifies several in one pass.

    while a row has not ended:
        draft the tokens that follow the newest one of each row      tide_jax.lossless.drafts
        choose how many drafts are worth verifying, or none          tide_jax.lossless.control
        run the full model over the newest token and its drafts      tide_jax.lossless.verify
        keep the accepted drafts, and the model's token behind them
        update the acceptance rates

A pass over several tokens reads the weights once, so accepted drafts cost almost nothing. Every token is the full
model's own.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from tide_jax.exits.queue import init_cache, pass_number
from tide_jax.generation.generate import Prompt, Request, prefill
from tide_jax.generation.logit_rules import rule_on
from tide_jax.generation.sampling import sample
from tide_jax.lossless.control import MOST_DRAFTS, DraftControl, PassCosts, Round, choose_drafts, step_seconds, update
from tide_jax.lossless.drafts import Drafts, text_drafts
from tide_jax.lossless.verify import DraftedRows, row_text, run_full_model, verify_drafts
from tide_jax.model.cache import KVCache
from tide_jax.model.decoder import Decoder

MOST_SLOTS = MOST_DRAFTS + 1
"""Most tokens of a row in one pass, the newest included."""


class DraftCounts(NamedTuple):
    """Counters of a lossless generation, int32 scalars; drafts are counted over all rows.

    Attributes:
      passes: passes of the full model, prefill included.
      drafted, accepted: drafts verified, and drafts accepted.
    """

    passes: Int[Array, ""]
    drafted: Int[Array, ""]
    accepted: Int[Array, ""]


class LosslessState(NamedTuple):
    """State of a running lossless generation.

    Attributes:
      tokens: prompt and new tokens; row b is ``tokens[b, starts[b]:ends[b]]``, with drafts behind it.
      width: column of the first new token, int32 scalar.
      starts, ends: first column of each row, and the column behind its newest token, int32 [B].
      done: rows that have ended.
      finite: rows whose logits were finite so far.
      seen: tokens that occur in each row, for the repetition penalty.
      cache: keys and values of all tokens but the newest.
      control: learned acceptance rates.
      counts: counters so far.
    """

    tokens: Int[Array, "B S"]
    width: Int[Array, ""]
    starts: Int[Array, " B"]
    ends: Int[Array, " B"]
    done: Bool[Array, " B"]
    finite: Bool[Array, " B"]
    seen: Bool[Array, "B V"]
    cache: KVCache
    control: DraftControl
    counts: DraftCounts


class LosslessGenerated(NamedTuple):
    """A finished lossless generation of static capacity N.

    Attributes:
      tokens: new tokens, int32 [B, N]; entries past a row's length are padding.
      lengths: new tokens of each row, its end-of-sequence token included, int32 [B].
      counts: passes and drafts.
      control: learned acceptance rates, for the next generation.
      finite: as in `tide_jax.generation.generate.Generated`.
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, " B"]
    counts: DraftCounts
    control: DraftControl
    finite: Bool[Array, " B"]


def begin_lossless(
    model: Decoder,
    prompt: Prompt,
    request: Request,
    control: DraftControl,
    *,
    capacity: int,
    most_slots: int = MOST_SLOTS,
) -> LosslessState:
    """Runs the prompt and draws the first token; arguments as in `generate_lossless`."""
    batch, width = prompt.tokens.shape
    # Rows share slots: a row with rejected drafts leaves slots empty that other rows use. So a batch gets twice the
    # slots. A pass writes all its slots, including those behind the newest token.
    slots = capacity * min(batch, 2) + 2 * most_slots
    step = prefill(model, prompt, init_cache(model.config, batch, width + slots, model.dtype))
    seen = prompt.seen(model.config.vocab_size)
    starts, ends = jnp.int32(width) - prompt.lengths, jnp.full((batch,), width, jnp.int32)
    # Draw the first token, and make room behind it for new tokens and drafts.
    rows = DraftedRows(prompt.tokens, starts, ends, jnp.int32(width), seen)
    rule = rule_on(request.rules, lambda: row_text(rows, ends[:, None], request))
    drawn = sample(jax.random.fold_in(request.key, 0), step.logits, request.sampling, seen, rule)
    room = jnp.broadcast_to(request.pad, (batch, capacity + most_slots - 1))
    tokens = jnp.concatenate([prompt.tokens, drawn[:, None], room], axis=1)
    limit, zero = _limit(model, jnp.int32(width), starts, request), jnp.int32(0)
    return LosslessState(
        tokens=tokens,
        width=jnp.int32(width),
        starts=starts,
        ends=ends + 1,
        done=_has_ended(tokens, ends + 1, request) | (ends + 1 >= limit) | (prompt.lengths == 0),
        finite=step.finite,
        seen=seen.at[jnp.arange(batch), drawn].set(True),
        cache=step.cache,
        control=control,
        counts=DraftCounts(jnp.int32(1), zero, zero),
    )


def advance_lossless(
    model: Decoder,
    state: LosslessState,
    request: Request,
    costs: PassCosts,
    *,
    most_slots: int = MOST_SLOTS,
) -> LosslessState:
    """Runs one pass: adds one token and the accepted drafts to each row. Donate `state`."""
    # Draft, run the full model over the drafts, and keep those it confirms.
    new = _lay_out(model, state, request, costs, most_slots)
    rows = DraftedRows(new.row_tokens, state.starts, state.ends + new.drafted, state.width, state.seen)
    answers = run_full_model(model, rows, new.tokens, new.positions, new.count, state.cache, request)
    found = verify_drafts(rows, answers, new.positions, state.cache)
    gained = jnp.where(state.done, 0, found.ends - state.ends)
    accepted = jnp.maximum(gained - 1, 0)  # the last token is the model's own
    # Without drafts, the model's token shows whether the first draft would have been accepted.
    guess, first = (jnp.take_along_axis(t, state.ends[:, None], axis=1)[:, 0] for t in (new.row_tokens, found.tokens))
    # Report the outcome to the control.
    running = jnp.maximum(jnp.sum(~state.done, dtype=jnp.int32), 1).astype(jnp.float32)
    seconds = step_seconds(costs, model.config.num_layers)
    done = Round(
        matched=new.matched,
        drafted=new.drafted,
        accepted=jnp.where(new.drafted > 0, accepted, (guess == first).astype(jnp.int32)),
        tokens=jnp.sum(gained.astype(jnp.float32)) / running,
        seconds=seconds[pass_number(new.count, most_slots)],
    )
    limit = _limit(model, state.width, state.starts, request)
    return state._replace(
        tokens=found.tokens,
        ends=found.ends,
        done=state.done | _has_ended(found.tokens, found.ends, request) | (found.ends >= limit),
        finite=state.finite & (state.done | answers.finite),
        seen=_add_seen(state, found.tokens, found.ends, most_slots),
        cache=found.cache,
        control=update(state.control, costs, model.config.num_layers, done),
        counts=DraftCounts(
            passes=state.counts.passes + 1,
            drafted=state.counts.drafted + jnp.sum(new.drafted, dtype=jnp.int32),
            accepted=state.counts.accepted + jnp.sum(accepted, dtype=jnp.int32),
        ),
    )


def generate_lossless(
    model: Decoder,
    prompt: Prompt,
    request: Request,
    costs: PassCosts,
    control: DraftControl | None = None,
    *,
    capacity: int,
    most_slots: int = MOST_SLOTS,
) -> LosslessGenerated:
    """Generates the same tokens as full depth, verifying several drafts in a pass.

    Args:
      model: the decoder.
      prompt: left-padded prompts.
      request: sampling settings, end-of-sequence ids, number of new tokens.
      costs: measured seconds of a pass (`tide_jax.lossless.costs`).
      control: acceptance rates learned by earlier generations; None starts from the prior.
      capacity: static upper bound of `request.max_new_tokens`.
      most_slots: most tokens of a row in one pass, the newest included.
    """
    control = DraftControl.start() if control is None else control
    state = begin_lossless(model, prompt, request, control, capacity=capacity, most_slots=most_slots)
    state = lax.while_loop(
        lambda s: ~jnp.all(s.done) & jnp.all(s.finite),
        lambda s: advance_lossless(model, s, request, costs, most_slots=most_slots),
        state,
    )
    # Cut the new tokens out of the rows.
    width, lengths = prompt.tokens.shape[1], state.ends - state.width
    made = jnp.arange(capacity, dtype=jnp.int32)[None] < lengths[:, None]
    tokens = jnp.where(made, state.tokens[:, width : width + capacity], request.pad)
    return LosslessGenerated(tokens, lengths, state.counts, state.control, state.finite)


class _NewSlots(NamedTuple):
    """Input of one pass: the newest token of each row, and its drafts.

    Attributes:
      row_tokens: `LosslessState.tokens` with the drafts written behind each row's end.
      tokens, positions: token ids and positions of the slots; position -1 if a row does not use the slot.
      count: leading slots that at least one row uses.
      drafted: drafts of each row in this pass.
      matched: length of each row's match, whether its drafts are verified or not; 0 if there is nothing to draft.
    """

    row_tokens: Int[Array, "B S"]
    tokens: Int[Array, "B Q"]
    positions: Int[Array, "B Q"]
    count: Int[Array, ""]
    drafted: Int[Array, " B"]
    matched: Int[Array, " B"]


def _lay_out(model: Decoder, state: LosslessState, request: Request, costs: PassCosts, most_slots: int) -> _NewSlots:
    """Drafts, chooses how many drafts to verify, and lays out the slots of the pass."""
    limit, running = _limit(model, state.width, state.starts, request), ~state.done
    found = text_drafts(state.tokens, state.starts, state.ends, most_slots - 1)
    chosen = choose_drafts(state.control, costs, model.config.num_layers, found.matched, running, most=most_slots - 1)
    # Rejected drafts waste slots. Draft only if enough slots remain to finish all rows with one token a pass.
    needed = jnp.max(jnp.where(state.done, 0, limit - state.ends))
    spare = jnp.int32(state.cache.capacity) - state.cache.length - needed - (most_slots - 1)
    usable = jnp.where(running, _usable(found, state.ends, limit, request), 0)
    drafted = jnp.minimum(usable, jnp.where(spare >= chosen, chosen, 0))
    # Each row's slots: its newest token, then its drafts.
    slots = jnp.arange(most_slots, dtype=jnp.int32)[None]
    columns, index = state.ends[:, None] + slots, jnp.arange(state.ends.shape[0])[:, None]
    row_tokens = state.tokens.at[index, columns[:, :-1]].set(found.tokens, mode="drop")
    there = running[:, None] & (slots <= drafted[:, None])
    return _NewSlots(
        row_tokens=row_tokens,
        tokens=jnp.take_along_axis(row_tokens, columns - 1, axis=1, mode="clip"),
        positions=jnp.where(there, columns - 1 - state.starts[:, None], -1),
        count=1 + jnp.max(drafted),
        drafted=drafted,
        matched=jnp.where(usable > 0, found.matched, 0),
    )


def _limit(model: Decoder, width: Int[Array, ""], starts: Int[Array, " B"], request: Request) -> Int[Array, " B"]:
    """Column at which each row ends at the latest: after `max_new_tokens`, or with as many tokens as it may have."""
    return jnp.minimum(width + request.max_new_tokens, starts + request.most_tokens(model.config.context_length))


def _usable(found: Drafts, ends: Int[Array, " B"], limit: Int[Array, " B"], request: Request) -> Int[Array, " B"]:
    """Number of drafts worth verifying: those before an end-of-sequence draft, and before the row's last token."""
    ends_row = jnp.any(found.tokens[:, :, None] == request.eos[:, None, :], axis=2)
    before_end = jnp.sum(jnp.cumsum(ends_row, axis=1) == 0, axis=1, dtype=jnp.int32)
    return jnp.where(found.matched > 0, jnp.clip(limit - ends - 1, 0, before_end), 0)


def _has_ended(tokens: Int[Array, "B S"], ends: Int[Array, " B"], request: Request) -> Bool[Array, " B"]:
    last = jnp.take_along_axis(tokens, ends[:, None] - 1, axis=1)
    return jnp.any(last == request.eos, axis=1)


def _add_seen(
    state: LosslessState, tokens: Int[Array, "B S"], ends: Int[Array, " B"], most_slots: int
) -> Bool[Array, "B V"]:
    """`state.seen` with the new tokens, up to `ends`."""
    index = jnp.arange(ends.shape[0])[:, None]
    columns = state.ends[:, None] + jnp.arange(most_slots, dtype=jnp.int32)[None]
    fresh = jnp.take_along_axis(tokens, columns, axis=1, mode="clip")
    return state.seen.at[index, fresh].max(columns < ends[:, None])

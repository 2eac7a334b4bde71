"""``mode="lossless"``: the text drafts, the full model verifies several drafts in one pass; its tokens are its own.

    while a row has not ended:
        guess what follows the newest token of each row     tide_jax.lossless.drafts
        choose how many guesses are worth a pass, or none   tide_jax.lossless.control
        run the full model over the token and its drafts    tide_jax.lossless.verify
        keep the drafts that hold, and the answer behind them
        note how the drafts fared

A pass over several tokens reads the weights once, so drafts that hold are nearly free.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from tide_jax.exits.queue import pass_number
from tide_jax.generation.generate import Prompt, Request, prefill
from tide_jax.generation.logit_rules import rule_on
from tide_jax.generation.sampling import sample
from tide_jax.lossless.control import MOST_DRAFTS, DraftControl, PassCosts, Round, choose_drafts, step_seconds, update
from tide_jax.lossless.drafts import Drafts, text_drafts
from tide_jax.lossless.verify import Rows, answer, row_text, verify_drafts
from tide_jax.model.cache import KVCache, init_cache
from tide_jax.model.decoder import Decoder

MOST_SLOTS = MOST_DRAFTS + 1
"""Tokens of a row that one pass verifies at the most, the newest included."""


class DraftCounts(NamedTuple):
    """What a lossless generation did, int32 scalars; drafts are counted over all rows.

    Attributes:
      passes: passes of the full model, prefill included.
      drafted, accepted: drafts verified, and those that held.
    """

    passes: Int[Array, ""]
    drafted: Int[Array, ""]
    accepted: Int[Array, ""]


class LosslessState(NamedTuple):
    """State of a running lossless generation.

    Attributes:
      tokens: rows of prompt and new tokens; row b's are ``tokens[b, starts[b]:ends[b]]``, guesses behind them.
      width: column of the first new token, int32 scalar.
      starts, ends: int32 [B].
      done: rows that have ended.
      finite: rows whose logits were numbers so far.
      seen: tokens of each row, for the repetition penalty.
      cache: keys and values of all tokens but the newest.
      control: what is known of drafts.
      counts: what was done so far.
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
      tokens: int32 [B, N]; entries past a row's length are padding.
      lengths: tokens of each row, its end-of-sequence token included, int32 [B].
      counts: passes and drafts.
      control: what was learned, for the next generation.
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
    """Prefills and draws the first token; arguments as in `generate_lossless`."""
    batch, width = prompt.tokens.shape
    # Rows share slots, and a row whose drafts fail leaves some empty where others' hold.
    # A pass writes all its slots, those behind the newest token, too.
    slots = capacity * min(batch, 2) + 2 * most_slots
    step = prefill(model, prompt, init_cache(model.config, batch, width + slots, model.dtype))
    seen = prompt.seen(model.config.vocab_size)
    starts, ends = jnp.int32(width) - prompt.lengths, jnp.full((batch,), width, jnp.int32)
    rows = Rows(prompt.tokens, starts, ends, jnp.int32(width), seen)
    rule = rule_on(request.rules, request.max_new_tokens, lambda: row_text(rows, ends[:, None], request))
    drawn = sample(jax.random.fold_in(request.key, 0), step.logits, request.sampling, seen, rule)
    room = jnp.broadcast_to(request.pad, (batch, capacity + most_slots - 1))
    tokens = jnp.concatenate([prompt.tokens, drawn[:, None], room], axis=1)
    limit, zero = _limit(model, jnp.int32(width), starts, request), jnp.int32(0)
    return LosslessState(
        tokens=tokens,
        width=jnp.int32(width),
        starts=starts,
        ends=ends + 1,
        done=_ended(tokens, ends + 1, request) | (ends + 1 >= limit) | (prompt.lengths == 0),
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
    """One pass: a token more of each row, and the drafts that hold. Donate `state`."""
    new = _lay_out(model, state, request, costs, most_slots)
    rows = Rows(new.row_tokens, state.starts, state.ends + new.drafted, state.width, state.seen)
    answers = answer(model, rows, new.tokens, new.positions, new.count, state.cache, request)
    found = verify_drafts(rows, answers, new.positions, state.cache)
    gained = jnp.where(state.done, 0, found.ends - state.ends)
    accepted = jnp.where(found.corrected, gained - 1, gained)
    # Where nothing was drafted, the answer tells whether the first draft would have held.
    guess, first = (jnp.take_along_axis(t, state.ends[:, None], axis=1)[:, 0] for t in (new.row_tokens, found.tokens))
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
        done=state.done | _ended(found.tokens, found.ends, request) | (found.ends >= limit),
        finite=state.finite & (state.done | answers.finite),
        seen=_with_new(state, found.tokens, found.ends, most_slots),
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
    """A whole generation whose tokens are those of full depth.

    Args:
      prompt: left-padded prompts.
      request: sampling dials, end-of-sequence ids, number of new tokens.
      costs: what passes cost (`tide_jax.measure_pass_costs`).
      control: what earlier generations have learned; None for nothing.
      capacity: static upper bound of `request.max_new_tokens`.
      most_slots: tokens of a row that one pass verifies at the most, the newest included.
    """
    control = DraftControl.start() if control is None else control
    state = begin_lossless(model, prompt, request, control, capacity=capacity, most_slots=most_slots)
    state = lax.while_loop(
        lambda s: ~jnp.all(s.done) & jnp.all(s.finite),
        lambda s: advance_lossless(model, s, request, costs, most_slots=most_slots),
        state,
    )
    width, lengths = prompt.tokens.shape[1], state.ends - state.width
    made = jnp.arange(capacity, dtype=jnp.int32)[None] < lengths[:, None]
    tokens = jnp.where(made, state.tokens[:, width : width + capacity], request.pad)
    return LosslessGenerated(tokens, lengths, state.counts, state.control, state.finite)


class _NewSlots(NamedTuple):
    """The slots of one pass: the newest token of each row, and its drafts.

    Attributes:
      row_tokens: `LosslessState.tokens` with the guesses behind each row's end.
      tokens, positions: of the slots; -1 where a row has none.
      count: leading slots that some row has.
      drafted: drafts of each row.
      matched: length of each row's match, drafted from or not; 0 where there is nothing to draft.
    """

    row_tokens: Int[Array, "B S"]
    tokens: Int[Array, "B Q"]
    positions: Int[Array, "B Q"]
    count: Int[Array, ""]
    drafted: Int[Array, " B"]
    matched: Int[Array, " B"]


def _lay_out(model: Decoder, state: LosslessState, request: Request, costs: PassCosts, most_slots: int) -> _NewSlots:
    """Guesses, chooses how many of the guesses to verify, and lays out the pass."""
    limit, running = _limit(model, state.width, state.starts, request), ~state.done
    found = text_drafts(state.tokens, state.starts, state.ends, most_slots - 1)
    chosen = choose_drafts(state.control, costs, model.config.num_layers, found.matched, running, most=most_slots - 1)
    # Drafts that fail leave slots empty: a pass of one token for each row has to fit to the end.
    needed = jnp.max(jnp.where(state.done, 0, limit - state.ends))
    spare = jnp.int32(state.cache.capacity) - state.cache.length - needed - (most_slots - 1)
    usable = jnp.where(running, _usable(found, state.ends, limit, request), 0)
    drafted = jnp.minimum(usable, jnp.where(spare >= chosen, chosen, 0))
    # Lay the newest token and its drafts side by side.
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
    """End of each row's room: for as many new tokens as asked for, or where the context ends. The last token is not
    run, and needs no position."""
    return jnp.minimum(width + request.max_new_tokens, starts + 1 + jnp.int32(min(model.config.context_length, 2**30)))


def _usable(found: Drafts, ends: Int[Array, " B"], limit: Int[Array, " B"], request: Request) -> Int[Array, " B"]:
    """Drafts before an end-of-sequence token and before the last token, which needs no draft behind it."""
    ends_row = jnp.any(found.tokens[:, :, None] == request.eos[:, None, :], axis=2)
    before_end = jnp.sum(jnp.cumsum(ends_row, axis=1) == 0, axis=1, dtype=jnp.int32)
    return jnp.where(found.matched > 0, jnp.clip(limit - ends - 1, 0, before_end), 0)


def _ended(tokens: Int[Array, "B S"], ends: Int[Array, " B"], request: Request) -> Bool[Array, " B"]:
    last = jnp.take_along_axis(tokens, ends[:, None] - 1, axis=1)
    return jnp.any(last == request.eos, axis=1)


def _with_new(
    state: LosslessState, tokens: Int[Array, "B S"], ends: Int[Array, " B"], most_slots: int
) -> Bool[Array, "B V"]:
    """`state.seen` with the tokens up to the given ends."""
    index = jnp.arange(ends.shape[0])[:, None]
    columns = state.ends[:, None] + jnp.arange(most_slots, dtype=jnp.int32)[None]
    fresh = jnp.take_along_axis(tokens, columns, axis=1, mode="clip")
    return state.seen.at[index, fresh].max(columns < ends[:, None])

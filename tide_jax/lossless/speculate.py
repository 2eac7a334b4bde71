"""The decoding loop of ``mode="lossless"``: drafters propose tokens, the full model verifies several in one pass.

    while a row has not ended:
        let each drafter look at the rows                            tide_jax.lossless.drafts
        choose who drafts, and how many tokens, or no drafts         tide_jax.lossless.control
        draft                                                        tide_jax.lossless.drafts, .twin
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

from tide_jax.exits.queue import init_cache
from tide_jax.generation.generate import Prompt, Request, prefill
from tide_jax.generation.logit_rules import rule_on
from tide_jax.generation.sampling import sample
from tide_jax.lossless.control import (
    MOST_DRAFTS,
    DraftControl,
    PassCosts,
    Plan,
    Round,
    check_sizes,
    choose_drafts,
    steps_of,
    update,
)
from tide_jax.lossless.drafts import DraftedRows, Drafter, Drafts, TextDrafter
from tide_jax.lossless.verify import row_text, run_full_model, verify_drafts
from tide_jax.model.cache import KVCache
from tide_jax.model.decoder import Decoder

MOST_SLOTS = MOST_DRAFTS + 1
"""Most tokens of a row in one pass, the newest included."""
TEXT_ONLY: tuple[Drafter, ...] = (TextDrafter(),)


class DraftCounts(NamedTuple):
    """Counters of a lossless generation, int32; drafts and tokens are counted over all rows.

    Attributes:
      passes: passes of the full model, prefill included.
      chosen: passes with drafts, by drafter.
      drafted, accepted: drafts verified, and drafts accepted, by drafter.
    """

    passes: Int[Array, ""]
    chosen: Int[Array, " D"]
    drafted: Int[Array, " D"]
    accepted: Int[Array, " D"]


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

    @property
    def rows(self) -> DraftedRows:
        """The rows, without drafts."""
        return DraftedRows(self.tokens, self.starts, self.ends, self.width, self.seen)


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
    drafters: tuple[Drafter, ...] = TEXT_ONLY,
    *,
    capacity: int,
    most_slots: int = MOST_SLOTS,
) -> LosslessState:
    """Runs the prompt and draws the first token; arguments and errors as in `generate_lossless`.

    There is room for passes of `most_slots` or `MOST_SLOTS` slots, whichever is more.
    """
    check_sizes(drafters, control, most_slots=most_slots)
    batch, width = prompt.tokens.shape
    # Rows share slots: a row with rejected drafts leaves slots empty that other rows use. So a batch gets half as many
    # again; more would cost every pass, which reads them. A pass writes all its slots, drafts or not.
    widest = max(most_slots, MOST_SLOTS)
    slots = (capacity if batch == 1 else capacity + capacity // 2) + 2 * widest
    step = prefill(model, prompt, init_cache(model.config, batch, width + slots, model.dtype))
    seen = prompt.seen(model.config.vocab_size)
    starts, ends = jnp.int32(width) - prompt.lengths, jnp.full((batch,), width, jnp.int32)
    # Draw the first token, and make room behind it for new tokens and drafts.
    rows = DraftedRows(prompt.tokens, starts, ends, jnp.int32(width), seen)
    rule = rule_on(request.rules, lambda: row_text(rows, ends[:, None], request))
    drawn = sample(jax.random.fold_in(request.key, 0), step.logits, request.sampling, seen, rule)
    room = jnp.broadcast_to(request.pad, (batch, capacity + widest - 1))
    tokens = jnp.concatenate([prompt.tokens, drawn[:, None], room], axis=1)
    limit = _limit(model, jnp.int32(width), starts, request)
    return LosslessState(
        tokens=tokens,
        width=jnp.int32(width),
        starts=starts,
        ends=ends + 1,
        done=_has_ended(tokens, ends + 1, request) | (ends + 1 >= limit) | (prompt.lengths == 0),
        finite=step.finite,
        seen=seen.at[jnp.arange(batch), drawn].set(True),
        cache=step.cache,
        control=jax.tree.map(jnp.array, control),  # a copy, for the state is donated
        counts=DraftCounts(jnp.int32(1), *(jnp.zeros((len(drafters),), jnp.int32) for _ in range(3))),
    )


def advance_lossless(
    model: Decoder,
    drafters: tuple[Drafter, ...],
    state: LosslessState,
    request: Request,
    costs: PassCosts,
    *,
    most_slots: int = MOST_SLOTS,
) -> LosslessState:
    """Runs one pass: adds one token and the accepted drafts to each row. Donate `state`.

    `most_slots` is at most that of `begin_lossless`, or `MOST_SLOTS` if that is more.
    """
    check_sizes(drafters, state.control, costs, most_slots=most_slots)
    # Draft, run the full model over the drafts, and keep those it confirms.
    drafted = _draft(model, drafters, state, request, costs, most_slots)
    slots = _lay_out(state, drafted, most_slots)
    answers = run_full_model(model, slots.rows, slots.tokens, slots.positions, slots.used, drafted.cache, request)
    found = verify_drafts(model, slots.rows, answers, slots.positions, drafted.cache)
    gained = jnp.where(state.done, 0, found.ends - state.ends)
    accepted = jnp.maximum(gained - 1, 0)  # the last token is the model's own
    # Report the outcome to the control: the model's token shows, too, whose first draft would have been accepted.
    running = jnp.maximum(jnp.sum(~state.done, dtype=jnp.int32), 1).astype(jnp.float32)
    first = jnp.take_along_axis(found.tokens, state.ends[:, None], axis=1)[:, 0]
    done = Round(
        plan=drafted.plan,
        confidence=drafted.confidence,
        right=drafted.guesses == first[None],
        drafted=drafted.made,
        accepted=accepted,
        tokens=jnp.sum(gained.astype(jnp.float32)) / running,
        steps=steps_of(costs, drafters, drafted.plan, slots.used, state.cache.length, most_slots=most_slots),
    )
    limit = _limit(model, state.width, state.starts, request)
    return state._replace(
        tokens=found.tokens,
        ends=found.ends,
        done=state.done | _has_ended(found.tokens, found.ends, request) | (found.ends >= limit),
        finite=state.finite & (state.done | found.finite),
        seen=_add_seen(state, found.tokens, found.ends, most_slots),
        cache=found.cache,
        control=update(state.control, drafters, done),
        counts=_count(state.counts, drafted.plan, drafted.made, accepted),
    )


def generate_lossless(
    model: Decoder,
    prompt: Prompt,
    request: Request,
    costs: PassCosts,
    control: DraftControl | None = None,
    drafters: tuple[Drafter, ...] = TEXT_ONLY,
    *,
    capacity: int,
    most_slots: int = MOST_SLOTS,
) -> LosslessGenerated:
    """Generates the same tokens as full depth, verifying several drafts in a pass.

    Args:
      model: the decoder.
      prompt: left-padded prompts.
      request: sampling settings, end-of-sequence ids, number of new tokens.
      costs: measured seconds of passes and drafts (`tide_jax.lossless.costs`).
      control: acceptance rates learned by earlier generations with these drafters; None starts from the prior.
      drafters: who may draft; in each pass one of them does, or none.
      capacity: static upper bound of `request.max_new_tokens`.
      most_slots: most tokens of a row in one pass, the newest included.

    Raises:
      TideError: no drafters, or the sizes of `costs` or `control` are not those of the drafters and `most_slots`.
    """
    control = DraftControl.start(drafters) if control is None else control
    state = begin_lossless(model, prompt, request, control, drafters, capacity=capacity, most_slots=most_slots)
    state = lax.while_loop(
        lambda s: ~jnp.all(s.done) & jnp.all(s.finite),
        lambda s: advance_lossless(model, drafters, s, request, costs, most_slots=most_slots),
        state,
    )
    # Cut the new tokens out of the rows.
    width, lengths = prompt.tokens.shape[1], state.ends - state.width
    made = jnp.arange(capacity, dtype=jnp.int32)[None] < lengths[:, None]
    tokens = jnp.where(made, state.tokens[:, width : width + capacity], request.pad)
    return LosslessGenerated(tokens, lengths, state.counts, state.control, state.finite)


class _Drafted(NamedTuple):
    """What drafters propose for one pass.

    Attributes:
      tokens: drafts of each row.
      made: leading ones of them that are worth verifying.
      plan: who drafted, and how many tokens at most.
      confidence, guesses: of each drafter, in each row's drafts, verified or not; the first drafts.
      cache: keys and values of all tokens but the newest.
    """

    tokens: Int[Array, "B K"]
    made: Int[Array, " B"]
    plan: Plan
    confidence: Int[Array, "D B"]
    guesses: Int[Array, "D B"]
    cache: KVCache


def _draft(
    model: Decoder,
    drafters: tuple[Drafter, ...],
    state: LosslessState,
    request: Request,
    costs: PassCosts,
    most_slots: int,
) -> _Drafted:
    """Lets each drafter look at the rows, chooses one of them, and lets it draft."""
    limit, running, rows = _limit(model, state.width, state.starts, request), ~state.done, state.rows
    room = jnp.where(running, jnp.maximum(limit - state.ends - 1, 0), 0)  # the last token of a row needs no draft
    looks = [drafter.look(rows, max(1, most_slots - 1)) for drafter in drafters]
    looks = [
        found._replace(confidence=jnp.where(running & _worth(drafter, found, room, request), found.confidence, -1))
        for drafter, found in zip(drafters, looks, strict=True)
    ]
    confidence, filled = jnp.stack([found.confidence for found in looks]), state.cache.length
    plan = choose_drafts(state.control, costs, drafters, confidence, running, filled, most_slots=most_slots)
    # Rejected drafts waste slots. Draft only if enough slots remain to finish all rows with one token a pass.
    needed = jnp.max(jnp.where(running, room + 1, 0))
    spare = jnp.int32(state.cache.capacity) - filled - needed - (most_slots - 1)
    plan = plan._replace(drafts=jnp.where(spare >= plan.drafts, jnp.minimum(plan.drafts, jnp.max(room)), 0))
    # Let the chosen drafter draft.
    cache, tokens, usable = state.cache, looks[0].tokens, jnp.zeros_like(room)
    for index, (drafter, found) in enumerate(zip(drafters, looks, strict=True)):
        most = jnp.where(plan.drafter == index, plan.drafts, 0)
        drafts, cache = drafter.draft(found, rows, cache, request, most)
        tokens = jnp.where(most > 0, drafts.tokens, tokens)
        usable = jnp.where(most > 0, _usable(drafts, room, request), usable)
    made = jnp.minimum(usable, plan.drafts)
    return _Drafted(tokens, made, plan, confidence, jnp.stack([found.tokens[:, 0] for found in looks]), cache)


class _Slots(NamedTuple):
    """Input of one pass: the newest token of each row, and its drafts.

    Attributes:
      rows: the rows, drafts included.
      tokens, positions: token ids and positions of the slots; position -1 if a row does not use the slot.
      used: leading slots that at least one row uses.
    """

    rows: DraftedRows
    tokens: Int[Array, "B Q"]
    positions: Int[Array, "B Q"]
    used: Int[Array, ""]


def _lay_out(state: LosslessState, drafted: _Drafted, most_slots: int) -> _Slots:
    """Writes the drafts behind the rows, and gives each row's newest token and drafts their slots."""
    slots = jnp.arange(most_slots, dtype=jnp.int32)[None]
    columns, index = state.ends[:, None] + slots, jnp.arange(state.ends.shape[0])[:, None]
    tokens = state.tokens.at[index, columns[:, :-1]].set(drafted.tokens[:, : most_slots - 1], mode="drop")
    there = ~state.done[:, None] & (slots <= drafted.made[:, None])
    return _Slots(
        rows=state.rows._replace(tokens=tokens, ends=state.ends + drafted.made),
        tokens=jnp.take_along_axis(tokens, columns - 1, axis=1, mode="clip"),
        positions=jnp.where(there, columns - 1 - state.starts[:, None], -1),
        used=1 + jnp.max(drafted.made),
    )


def _limit(model: Decoder, width: Int[Array, ""], starts: Int[Array, " B"], request: Request) -> Int[Array, " B"]:
    """Column at which each row ends at the latest: after `max_new_tokens`, or with as many tokens as it may have."""
    return jnp.minimum(width + request.max_new_tokens, starts + request.most_tokens(model.config.context_length))


def _worth(drafter: Drafter, found: Drafts, room: Int[Array, " B"], request: Request) -> Bool[Array, " B"]:
    """Rows in which a draft is worth verifying, as far as is known before drafting."""
    return room > 0 if drafter.model is not None else _usable(found, room, request) > 0


def _usable(found: Drafts, room: Int[Array, " B"], request: Request) -> Int[Array, " B"]:
    """Number of drafts worth verifying: those before an end-of-sequence draft, and before the row's last token."""
    ends_row = jnp.any(found.tokens[:, :, None] == request.eos[:, None, :], axis=2)
    before_end = jnp.sum(jnp.cumsum(ends_row, axis=1) == 0, axis=1, dtype=jnp.int32)
    return jnp.where(found.confidence >= 0, jnp.minimum(room, before_end), 0)


def _count(counts: DraftCounts, plan: Plan, drafted: Int[Array, " B"], accepted: Int[Array, " B"]) -> DraftCounts:
    """The counters after a pass; drafts count for the drafter that made them."""
    chosen = jnp.arange(len(counts.chosen), dtype=jnp.int32) == plan.drafter
    made, kept = jnp.sum(drafted, dtype=jnp.int32), jnp.sum(accepted, dtype=jnp.int32)
    return DraftCounts(
        passes=counts.passes + 1,
        chosen=counts.chosen + jnp.where(chosen & (made > 0), 1, 0),
        drafted=counts.drafted + jnp.where(chosen, made, 0),
        accepted=counts.accepted + jnp.where(chosen, kept, 0),
    )


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

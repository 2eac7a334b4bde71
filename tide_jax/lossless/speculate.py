"""``mode="lossless"``: drafts that the full model verifies, several in one pass, so that its tokens are its own.

Drafts come from tokens that leave early (the router decides how far to draft: a token that it does not let go runs on,
and takes all that wait for their deep layers with it) and from the row's own text (`tide_jax.lossless.ngram_drafts`).
Both are slots of the queue of `tide_jax.exits.recompute`, and one pass over the layers that they have yet to run
verifies them: shallow layers run once. `tide_jax.lossless.draft_control` chooses, "no drafts" included.

The answer of every verified slot is drawn with the key that full depth draws it with, and a draft holds if it is that
answer. So greedy or not, tokens are those of ``mode="full"`` with the same key, up to rounding, and need no rule of
rejection: speculative decoding (Leviathan et al. 2023, arXiv:2211.17192) with drafter and verifier coupled by common
random numbers (Daliri et al. 2024, arXiv:2408.07978). Exits draw their drafts with the same keys, too, which makes the
two agree as often as their distributions do. Verifying the drafts of an early exit with the layers that it skipped
follows LayerSkip (Elhoushi et al. 2024, arXiv:2404.16710).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tide_jax.config import layer_groups
from tide_jax.exits.early_exit import DepthOutput
from tide_jax.exits.recompute import pass_number, recompute_step
from tide_jax.generation.generate import Exits, Prompt, Request, prefill
from tide_jax.generation.logit_rules import rule_on
from tide_jax.generation.sampling import sample
from tide_jax.lossless.draft_control import DraftControl, PassCosts, Round, learned, plan
from tide_jax.lossless.ngram_drafts import NgramDrafts, ngram_drafts
from tide_jax.lossless.verify import Drawn, draw, row_text, verified
from tide_jax.model.cache import QUEUE_LENGTH, KVCache, init_cache
from tide_jax.model.decoder import Decoder


class DraftCounts(NamedTuple):
    """What a lossless generation did, int32 scalars; drafts are counted over all rows.

    Attributes:
      passes: passes over some or all layers, prefill included.
      layers_executed: layers of these passes.
      ngram_drafted, ngram_accepted: drafts copied from the rows' own text.
      exit_drafted, exit_accepted: drafts of tokens that left early.
    """

    passes: Int[Array, ""]
    layers_executed: Int[Array, ""]
    ngram_drafted: Int[Array, ""]
    ngram_accepted: Int[Array, ""]
    exit_drafted: Int[Array, ""]
    exit_accepted: Int[Array, ""]


class LosslessState(NamedTuple):
    """State of a running lossless generation.

    Attributes:
      tokens: rows of prompt and new tokens; row b's are ``tokens[b, starts[b]:ends[b]]``, drafts included.
      width: column of the first new token, int32 scalar.
      starts, ends: int32 [B].
      verified: end of what the full model has answered, int32 [B]; what follows is drafts.
      done: rows that have ended.
      finite: rows whose logits were numbers so far.
      seen: verified tokens and prompt of each row, for the repetition penalty.
      cache: keys and values; its `pending` holds drafts that have left.
      control: what is known of drafts.
      seconds: what passes since the last verification cost, by the measured costs.
      counts: what was done so far.
    """

    tokens: Int[Array, "B S"]
    width: Int[Array, ""]
    starts: Int[Array, " B"]
    ends: Int[Array, " B"]
    verified: Int[Array, " B"]
    done: Bool[Array, " B"]
    finite: Bool[Array, " B"]
    seen: Bool[Array, "B V"]
    cache: KVCache
    control: DraftControl
    seconds: Float[Array, ""]
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
    exits: Exits | None,
    control: DraftControl,
    *,
    capacity: int,
    queue_length: int = QUEUE_LENGTH,
    implementation: str | None = None,
) -> LosslessState:
    """Prefills and draws the first token; arguments as in `generate_lossless`."""
    batch, width = prompt.tokens.shape
    groups = 1 if exits is None else len(exits.routers.checkpoints) + 1
    # Rows share slots, and a row whose drafts fail leaves some empty where others' hold.
    slots = capacity * min(batch, 2) + queue_length
    cache = init_cache(
        model.config, batch, width + slots, model.dtype, pending_groups=groups, queue_length=queue_length
    )
    step = prefill(model, prompt, cache, None, implementation=implementation)
    seen = prompt.seen(model.config.vocab_size)
    starts, ends = jnp.int32(width) - prompt.lengths, jnp.full((batch,), width, jnp.int32)
    rows = Drawn(prompt.tokens, starts, ends, jnp.int32(width), seen)
    rule = rule_on(request.rules, request.max_new_tokens, lambda: row_text(rows, ends[:, None], request))
    drawn = sample(jax.random.fold_in(request.key, 0), step.logits, request.sampling, seen, rule)
    room = jnp.broadcast_to(request.pad, (batch, capacity + queue_length - 1))
    tokens = jnp.concatenate([prompt.tokens, drawn[:, None], room], axis=1)
    limit, zero = _limit(model, jnp.int32(width), starts, request), jnp.int32(0)
    return LosslessState(
        tokens=tokens,
        width=jnp.int32(width),
        starts=starts,
        ends=ends + 1,
        verified=ends + 1,
        done=_ended(tokens, ends + 1, request) | (ends + 1 >= limit) | (prompt.lengths == 0),
        finite=step.finite,
        seen=seen.at[jnp.arange(batch), drawn].set(True),
        cache=step.cache,
        control=control,
        seconds=jnp.float32(0.0),
        counts=DraftCounts(jnp.int32(1), jnp.int32(model.config.num_layers), zero, zero, zero, zero),
    )


def advance_lossless(
    model: Decoder,
    state: LosslessState,
    request: Request,
    exits: Exits | None,
    costs: PassCosts,
    *,
    implementation: str | None = None,
) -> LosslessState:
    """One pass: a token more, a draft more, or several drafts verified. Donate `state`."""
    batch = _inputs(model, state, request, exits, costs)
    before = state.cache.pending
    assert before is not None
    out, cache = recompute_step(
        model,
        batch.tokens,
        batch.positions,
        state.cache,
        None if exits is None else exits.routers,
        None if exits is None else exits.gate,
        count=batch.count,
        may_exit=batch.may_exit,
        finish=batch.finish,
        implementation=implementation,
    )
    assert cache.pending is not None
    groups = layer_groups(model.config.num_layers, () if exits is None else exits.routers.checkpoints)
    spent = _pass_seconds(costs, groups, cache.length - before.ran, out.layers_executed, before.queue_length)
    counts = state.counts._replace(
        passes=state.counts.passes + 1, layers_executed=state.counts.layers_executed + out.layers_executed
    )
    state = state._replace(tokens=batch.row_tokens, cache=cache, seconds=state.seconds + spent, counts=counts)
    return lax.cond(
        cache.pending.ran[-1] == cache.length,
        lambda: _verify(model, state, batch, before.ran[-1], request, costs),
        lambda: _draft(model, state, out, request, costs),
    )


def generate_lossless(
    model: Decoder,
    prompt: Prompt,
    request: Request,
    exits: Exits | None,
    costs: PassCosts,
    control: DraftControl | None = None,
    *,
    capacity: int,
    queue_length: int = QUEUE_LENGTH,
    implementation: str | None = None,
) -> LosslessGenerated:
    """A whole generation whose tokens are those of full depth.

    Args:
      prompt: left-padded prompts.
      request: sampling dials, end-of-sequence ids, number of new tokens.
      exits: routers and dials for early-exit drafts; None drafts from the text alone.
      costs: what passes cost (`tide_jax.measure_pass_costs`).
      control: what earlier generations have learned; None for nothing.
      capacity: static upper bound of `request.max_new_tokens`.
      queue_length: slots verified in one pass at the most.
    """
    control = DraftControl.start() if control is None else control
    state = begin_lossless(
        model,
        prompt,
        request,
        exits,
        control,
        capacity=capacity,
        queue_length=queue_length,
        implementation=implementation,
    )
    state = lax.while_loop(
        lambda s: ~jnp.all(s.done) & jnp.all(s.finite),
        lambda s: advance_lossless(model, s, request, exits, costs, implementation=implementation),
        state,
    )
    width, lengths = prompt.tokens.shape[1], state.ends - state.width
    made = jnp.arange(capacity, dtype=jnp.int32)[None] < lengths[:, None]
    tokens = jnp.where(made, state.tokens[:, width : width + capacity], request.pad)
    return LosslessGenerated(tokens, lengths, state.counts, state.control, state.finite)


class _Inputs(NamedTuple):
    """One pass's tokens.

    Attributes:
      row_tokens: `LosslessState.tokens` with the n-gram drafts behind each row's end.
      tokens, positions: the queue's worth of new slots; `count` of them are there.
      drafted: n-gram drafts of each row.
      matched: length of each row's match, drafted from or not; 0 where there is nothing to draft.
      may_exit, finish: as `recompute_step` takes them.
    """

    row_tokens: Int[Array, "B S"]
    tokens: Int[Array, "B Q"]
    positions: Int[Array, "B Q"]
    count: Int[Array, ""]
    drafted: Int[Array, " B"]
    matched: Int[Array, " B"]
    may_exit: Bool[Array, ""]
    finish: Bool[Array, ""]


def _inputs(model: Decoder, state: LosslessState, request: Request, exits: Exits | None, costs: PassCosts) -> _Inputs:
    """Chooses how to go on, and lays out the new slots."""
    pending, limit = state.cache.pending, _limit(model, state.width, state.starts, request)
    assert pending is not None
    queue = pending.queue_length
    found = ngram_drafts(state.tokens, state.starts, state.ends, queue - 1)
    # A row that has drafted its end can't go on before that is verified.
    waits_to_end = ~state.done & (_ended(state.tokens, state.ends, request) | (state.ends >= limit))
    running = ~state.done & ~waits_to_end
    choice = plan(
        state.control,
        costs,
        model.config.num_layers,
        found.matched,
        running,
        most=queue - 1,
        waiting=state.cache.length > pending.ran[-1],
    )
    spare = _spare_slots(state, limit)
    usable = jnp.where(running, _usable(found, state.ends, limit, request), 0)
    drafted = jnp.minimum(usable, jnp.where(spare >= choice.drafts, choice.drafts, 0))
    columns = state.ends[:, None] + jnp.arange(queue, dtype=jnp.int32)[None]
    rows = jnp.arange(state.ends.shape[0])[:, None]
    row_tokens = state.tokens.at[rows, columns[:, :-1]].set(found.tokens, mode="drop")
    there = running[:, None] & (jnp.arange(queue, dtype=jnp.int32)[None] <= drafted[:, None])
    count = 1 + jnp.max(drafted)
    return _Inputs(
        row_tokens=row_tokens,
        tokens=jnp.take_along_axis(row_tokens, columns - 1, axis=1, mode="clip"),
        positions=jnp.where(there, columns - 1 - state.starts[:, None], -1),
        count=count,
        drafted=drafted,
        matched=jnp.where(usable > 0, found.matched, 0),
        may_exit=choice.exits & (spare >= 1) & (count == 1) & (exits is not None),
        finish=(count > 1) | jnp.any(waits_to_end),
    )


def _limit(model: Decoder, width: Int[Array, ""], starts: Int[Array, " B"], request: Request) -> Int[Array, " B"]:
    """End of each row's room: for as many new tokens as asked for, or where the context ends. The last token is not
    run, and needs no position."""
    return jnp.minimum(width + request.max_new_tokens, starts + 1 + jnp.int32(min(model.config.context_length, 2**30)))


def _spare_slots(state: LosslessState, limit: Int[Array, " B"]) -> Int[Array, ""]:
    """Slots that may be given to drafts that fail: a pass that verifies one token of each row has to fit to the end."""
    needed = jnp.max(jnp.where(state.done, 0, limit - state.verified))
    return jnp.int32(state.cache.capacity) - state.cache.length - needed


def _usable(found: NgramDrafts, ends: Int[Array, " B"], limit: Int[Array, " B"], request: Request) -> Int[Array, " B"]:
    """Drafts before an end-of-sequence token and before the last token, which needs no draft behind it."""
    ends_row = jnp.any(found.tokens[:, :, None] == request.eos[:, None, :], axis=2)
    before_end = jnp.sum(jnp.cumsum(ends_row, axis=1) == 0, axis=1, dtype=jnp.int32)
    return jnp.where(found.matched > 0, jnp.clip(limit - ends - 1, 0, before_end), 0)


def _ended(tokens: Int[Array, "B S"], ends: Int[Array, " B"], request: Request) -> Bool[Array, " B"]:
    last = jnp.take_along_axis(tokens, ends[:, None] - 1, axis=1)
    return jnp.any(last == request.eos, axis=1)


def _pass_seconds(
    costs: PassCosts,
    groups: tuple[range, ...],
    needed: Int[Array, " groups"],
    executed: Int[Array, ""],
    queue_length: int,
) -> Float[Array, ""]:
    """What the layers of one pass cost; `needed`: slots of each group."""
    layers = jnp.asarray([len(g) for g in groups], jnp.float32)
    ran = jnp.asarray([g.stop for g in groups], jnp.int32) <= executed
    return jnp.sum(jnp.where(ran, layers * costs.layer[pass_number(needed, queue_length)], 0.0))


def _seen(state: LosslessState, tokens: Int[Array, "B S"], ends: Int[Array, " B"]) -> Bool[Array, "B V"]:
    """`state.seen` with the tokens between what was verified before and the given ends."""
    assert state.cache.pending is not None
    rows = jnp.arange(ends.shape[0])[:, None]
    columns = state.verified[:, None] + jnp.arange(state.cache.pending.queue_length, dtype=jnp.int32)[None]
    fresh = jnp.take_along_axis(tokens, columns, axis=1, mode="clip")
    return state.seen.at[rows, fresh].max(columns < ends[:, None])


def _draft(model: Decoder, state: LosslessState, out: DepthOutput, request: Request, costs: PassCosts) -> LosslessState:
    """Every running row's newest token has left: its answer is the next draft."""
    logits = model.logits(out.states)
    rows, running = jnp.arange(state.ends.shape[0]), ~state.done
    seen = _seen(state, state.tokens, state.ends)
    so_far = Drawn(state.tokens, state.starts, state.ends, state.width, seen)
    drawn = draw(logits, so_far, state.ends[:, None], request, seen[:, None])[:, 0]
    kept = jnp.take_along_axis(state.tokens, state.ends[:, None], axis=1)[:, 0]
    number = jnp.sum(running, dtype=jnp.int32)
    return state._replace(
        tokens=state.tokens.at[rows, state.ends].set(jnp.where(running, drawn, kept)),
        ends=state.ends + running.astype(jnp.int32),
        seconds=state.seconds + costs.head[0] + costs.leaving,
        counts=state.counts._replace(exit_drafted=state.counts.exit_drafted + number),
    )


def _verify(
    model: Decoder,
    state: LosslessState,
    batch: _Inputs,
    first: Int[Array, ""],
    request: Request,
    costs: PassCosts,
) -> LosslessState:
    """All slots from `first` on have run every layer: keeps what the full model would have drawn."""
    ends = state.ends + batch.drafted
    drawn = Drawn(state.tokens, state.starts, ends, state.width, state.seen)
    found = verified(model, drawn, state.cache, first, request)
    running = ~state.done
    gained = jnp.where(running, found.ends - state.verified, 0)
    accepted = jnp.where(found.corrected, gained - 1, gained)
    by_exits = jnp.any(state.ends > state.verified)
    guess, answer = (jnp.take_along_axis(t, state.ends[:, None], axis=1)[:, 0] for t in (state.tokens, found.tokens))
    seconds = state.seconds + costs.head[pass_number(state.cache.length - first, found.queue_length)]
    done = Round(
        matched=jnp.where(by_exits, 0, batch.matched),
        drafted=batch.drafted,
        accepted=jnp.where(batch.drafted > 0, accepted, (guess == answer).astype(jnp.int32)),
        exits=by_exits,
        tokens=jnp.sum(gained.astype(jnp.float32)) / jnp.maximum(jnp.sum(running.astype(jnp.float32)), 1.0),
        seconds=seconds,
    )
    counts, total = state.counts, jnp.sum(accepted, dtype=jnp.int32)
    limit = _limit(model, state.width, state.starts, request)
    return state._replace(
        tokens=found.tokens,
        ends=found.ends,
        verified=found.ends,
        finite=state.finite & (state.done | found.finite),
        done=state.done | _ended(found.tokens, found.ends, request) | (found.ends >= limit),
        seen=_seen(state, found.tokens, found.ends),
        cache=found.cache,
        control=learned(state.control, costs, model.config.num_layers, done),
        seconds=jnp.float32(0.0),
        counts=counts._replace(
            ngram_drafted=counts.ngram_drafted + jnp.sum(batch.drafted, dtype=jnp.int32),
            ngram_accepted=counts.ngram_accepted + jnp.where(by_exits, 0, total),
            exit_accepted=counts.exit_accepted + jnp.where(by_exits, total, 0),
        ),
    )

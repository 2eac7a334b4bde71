"""Generation as pure functions: prefill, one decode step, and a whole generation inside one jit.

All functions take and return pytrees. Shapes are static (callers bucket them, see `tide_jax.generation.batch`).
Thresholds, sampling settings, end-of-sequence ids and the number of new tokens are traced, so changing them never
recompiles. If you jit `decode_step` yourself, donate the cache: ``jax.jit(decode_step, donate_argnames="cache")``.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tide_jax.exits.deferred_fill import deferred_step
from tide_jax.exits.depth import DepthOutput, run_depth, run_whole
from tide_jax.exits.exits import Exits
from tide_jax.exits.queue import AnyCache, QueuedCache, check_cache, init_cache, keys_and_values
from tide_jax.exits.recompute import recompute_step
from tide_jax.generation.finite import finite_rows
from tide_jax.generation.logit_rules import LogitRules, RowText, rule_on
from tide_jax.generation.sampling import Sampling, sample
from tide_jax.model.cache import KVCache
from tide_jax.model.decoder import Decoder

PREFILL_CHUNK = 512
"""Prompt tokens in one pass of prefill."""


class StepOutput(NamedTuple):
    """Result of `prefill` or `decode_step`.

    Attributes:
      logits: logits of the next token, float32 [B, V].
      cache: the cache with the step's tokens appended.
      exit_layers: index of the last layer each row's token ran, int32 [B]; -1 for inactive rows.
      layers_executed: layers the device ran, int32 scalar: the depth of the deepest row.
      finite: rows without NaN or infinity in their logits, bool [B]; True for inactive rows. A decode step checks the
        output head's input instead, which is much smaller.
    """

    logits: Float[Array, "B V"]
    cache: AnyCache
    exit_layers: Int[Array, " B"]
    layers_executed: Int[Array, ""]
    finite: Bool[Array, " B"]


class Prompt(NamedTuple):
    """Left-padded prompts: row b is ``tokens[b, P - lengths[b]:]``.

    A row of length 0 is batch padding; it counts as ended from the start.
    """

    tokens: Int[Array, "B P"]
    lengths: Int[Array, " B"]

    @property
    def positions(self) -> Int[Array, "B P"]:
        """Position of each token in its row, -1 for padding."""
        width = self.tokens.shape[1]
        slots = jnp.arange(width, dtype=jnp.int32)[None, :]
        return jnp.maximum(slots - (jnp.int32(width) - self.lengths)[:, None], -1)

    def seen(self, vocab_size: int) -> Bool[Array, "B V"]:
        """Which tokens of the vocabulary occur in each row."""
        batch = self.tokens.shape[0]
        return jnp.zeros((batch, vocab_size), bool).at[jnp.arange(batch)[:, None], self.tokens].max(self.positions >= 0)


class Request(NamedTuple):
    """Traced settings of one generation.

    Attributes:
      sampling: sampling settings.
      key: random key; unused by greedy decoding.
      eos: end-of-sequence ids of each row, int32 [B, E], padded with -1.
      pad: id written after a row has ended, int32 scalar.
      max_new_tokens: int32 scalar, at most the static capacity.
      rules: rules that forbid or force tokens; None for none.
      max_length: most tokens of a row, prompt included, int32 scalar; None for the context. The last token does not
        run, so a row may have one token more than the context.
    """

    sampling: Sampling
    key: PRNGKeyArray
    eos: Int[Array, "B E"]
    pad: Int[Array, ""]
    max_new_tokens: Int[Array, ""]
    rules: LogitRules | None = None
    max_length: Int[Array, ""] | None = None

    def most_tokens(self, context: int) -> Int[Array, ""]:
        """Most tokens of a row, prompt included, with a context of `context` tokens."""
        most = jnp.int32(min(context, 2**30) + 1)
        return most if self.max_length is None else jnp.minimum(most, self.max_length)

    def before_last(self, made: Int[Array, " N"], length: Int[Array, " N"]) -> Bool[Array, " N"]:
        """Whether the next token of a row is the last that `max_new_tokens` and `max_length` allow.

        Args:
          made, length: tokens of each row so far, without and with its prompt.
        """
        last = made == self.max_new_tokens - 1
        return last if self.max_length is None else last | (length == self.max_length - 1)

    @property
    def reads_rows(self) -> bool:
        """Whether a rule needs the tokens of the rows."""
        return self.rules is not None and self.rules.sequences is not None


class GenerationState(NamedTuple):
    """State of a running generation.

    Attributes:
      step: tokens generated so far, int32 scalar.
      last: the newest token of each row, int32 [B].
      positions: position of the newest token in its row, int32 [B].
      done: rows that have ended, bool [B].
      finite: rows whose logits were finite so far, bool [B].
      seen: tokens that occur in each row, bool [B, V].
      exit_layers: index of the last layer run for the newest token, int32 [B]; -1 for rows that had ended before.
      layers_executed: layers that the newest step ran, int32 scalar.
      cache: all tokens before the newest.
      text: the rows so far, right-aligned; None if no rule reads them.
    """

    step: Int[Array, ""]
    last: Int[Array, " B"]
    positions: Int[Array, " B"]
    done: Bool[Array, " B"]
    finite: Bool[Array, " B"]
    seen: Bool[Array, "B V"]
    exit_layers: Int[Array, " B"]
    layers_executed: Int[Array, ""]
    cache: AnyCache
    text: Int[Array, "B S"] | None = None


class Generated(NamedTuple):
    """A finished generation of static capacity N; entries past a row's length are padding.

    Attributes:
      tokens: int32 [B, N].
      lengths: tokens generated in each row, its end-of-sequence token included, int32 [B].
      exit_layers: index of the last layer each token ran, int32 [B, N], -1 past the end.
      layers_executed: layers the device ran for each step, int32 [N].
      steps: number of steps, int32 scalar.
      finite: rows whose logits were finite throughout, bool [B]. Generation stops when one is False, and that row's
        tokens are meaningless.
    """

    tokens: Int[Array, "B N"]
    lengths: Int[Array, " B"]
    exit_layers: Int[Array, "B N"]
    layers_executed: Int[Array, " N"]
    steps: Int[Array, ""]
    finite: Bool[Array, " B"]


def prefill(model: Decoder, prompt: Prompt, cache: AnyCache, exits: Exits | None = None) -> StepOutput:
    """Runs the prompts and fills an empty cache; the output is that of the last prompt token of each row.

    Prompts longer than `PREFILL_CHUNK` tokens run in chunks of that size, which bounds the memory of attention scores.
    """
    positions, width = prompt.positions, prompt.tokens.shape[1]
    exits = exits if exits is not None and exits.prompt else None
    # Rotary frequencies that depend on the length need the whole prompt in one chunk.
    chunk = width if model.config.length_changes_rope else min(width, PREFILL_CHUNK)

    def run(start: Int[Array, ""] | int, size: int, earlier: AnyCache | None) -> StepOutput:
        def cut(a: Array) -> Array:
            return lax.dynamic_slice_in_dim(a, start, size, axis=1)

        tokens, places = cut(prompt.tokens), cut(positions)
        seen = None if earlier is None else keys_and_values(earlier)
        out = _run(model, tokens, places, seen, exits)
        grown = (cache if earlier is None else earlier).append(out.new, places, model.layers)
        finite = jnp.ones(prompt.lengths.shape, bool)  # replaced below by a check of the last logits
        return StepOutput(out.states[:, -1], grown, out.exit_layers[:, -1], out.layers_executed, finite)

    def more(i: Int[Array, ""], step: StepOutput) -> StepOutput:
        after = run(first + i * chunk, chunk, step.cache)
        return after._replace(layers_executed=jnp.maximum(step.layers_executed, after.layers_executed))

    # The first chunk takes the remainder, so that all others have one size and share a loop body.
    first = width % chunk or chunk
    step = run(0, first, None)  # its `logits` are still states: only the last ones go through the output head
    if first < width:
        step = lax.fori_loop(0, (width - first) // chunk, more, step)
    logits = model.logits(step.logits[:, None])[:, 0]
    return step._replace(logits=logits, finite=finite_rows(logits) | (prompt.lengths == 0))


def _run(
    model: Decoder,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: KVCache | None,
    exits: Exits | None,
) -> DepthOutput:
    """A pass whose tokens all enter the cache."""
    if exits is None and model.config.recurrent_types:
        return run_whole(model, tokens, positions, cache)
    return run_depth(model, tokens, positions, cache, exits)


def decode_step(
    model: Decoder,
    cache: AnyCache,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    active: Bool[Array, " B"],
    exits: Exits | None = None,
) -> StepOutput:
    """Decodes one token of each active row; inactive rows add no depth and do not enter the cache.

    Args:
      model: the decoder.
      cache: earlier tokens.
      tokens: the newest token of each row, int32.
      positions: position of each token in its row.
      active: rows to run.
      exits: routers and thresholds; None runs every layer.

    Raises:
      TideError: the cache was made for other exits: its queue does not fit, is missing, or is not needed.
    """
    positions = jnp.where(active, positions, -1)[:, None]
    check_cache(cache, exits)
    if exits is not None and isinstance(cache, QueuedCache):
        step = deferred_step if exits.projects_later else recompute_step
        out, cache = step(model, tokens[:, None], positions, cache, exits)
    else:
        kv = keys_and_values(cache)
        newest = tokens[:, None]
        out = (
            run_whole(model, newest, positions, kv) if exits is None else run_depth(model, newest, positions, kv, exits)
        )
        cache = kv.append(out.new, positions, model.layers)
    logits, finite = model.logits(out.states)[:, 0], finite_rows(out.states) | ~active
    return StepOutput(logits, cache, out.exit_layers[:, 0], out.layers_executed, finite)


def begin(
    model: Decoder,
    prompt: Prompt,
    request: Request,
    exits: Exits | None,
    *,
    capacity: int,
) -> GenerationState:
    """Runs the prompts and draws the first token; `capacity` is the cache's room for new tokens."""
    batch, width = prompt.tokens.shape
    cache = init_cache(model.config, batch, width + capacity, model.dtype, exits=exits)
    step = prefill(model, prompt, cache, exits)
    state = GenerationState(
        step=jnp.int32(0),
        last=jnp.zeros((batch,), jnp.int32),
        positions=prompt.lengths - 1,
        done=prompt.lengths == 0,
        finite=jnp.ones((batch,), bool),
        seen=prompt.seen(model.config.vocab_size),
        exit_layers=jnp.full((batch,), -1, jnp.int32),
        layers_executed=jnp.int32(0),
        cache=step.cache,
        text=jnp.pad(prompt.tokens, ((0, 0), (capacity, 0))) if request.reads_rows else None,
    )
    return _accept(state, step, request, model.config.context_length)


def advance(
    model: Decoder,
    state: GenerationState,
    request: Request,
    exits: Exits | None,
) -> GenerationState:
    """Runs one decode step and draws the next tokens. Donate `state`."""
    step = decode_step(model, state.cache, state.last, state.positions, ~state.done, exits)
    return _accept(state, step, request, model.config.context_length)


def generate_tokens(
    model: Decoder,
    prompt: Prompt,
    request: Request,
    exits: Exits | None = None,
    *,
    capacity: int,
) -> Generated:
    """Generates tokens: prefill, then a `lax.while_loop` of decode steps until every row has ended.

    Args:
      model: the decoder.
      prompt: left-padded prompts.
      request: sampling settings, end-of-sequence ids, number of new tokens.
      exits: routers and thresholds; None runs every layer.
      capacity: static upper bound of `request.max_new_tokens`.
    """
    batch = prompt.tokens.shape[0]
    state = begin(model, prompt, request, exits, capacity=capacity)
    empty = Generated(
        tokens=jnp.broadcast_to(request.pad, (batch, capacity)),
        lengths=jnp.zeros((batch,), jnp.int32),
        exit_layers=jnp.full((batch, capacity), -1, jnp.int32),
        layers_executed=jnp.zeros((capacity,), jnp.int32),
        steps=jnp.int32(0),
        finite=state.finite,
    )

    def body(carry: tuple[GenerationState, Generated]) -> tuple[GenerationState, Generated]:
        state, out = carry
        state = advance(model, state, request, exits)
        return state, _record(out, state)

    def unfinished(carry: tuple[GenerationState, Generated]) -> Array:
        state, _ = carry
        return (state.step < request.max_new_tokens) & ~jnp.all(state.done) & jnp.all(state.finite)

    _, out = lax.while_loop(unfinished, body, (state, _record(empty, state)))
    return out


def _accept(state: GenerationState, step: StepOutput, request: Request, context: int) -> GenerationState:
    """Draws the next token of every row that has not ended.

    A row ends when its tokens fill the `context` or reach `Request.max_length`.
    """
    rule = rule_on(request.rules, lambda: _row_text(state, request))
    drawn = sample(jax.random.fold_in(request.key, state.step), step.logits, request.sampling, state.seen, rule)
    last = jnp.where(state.done, request.pad, drawn)
    ended = jnp.any(last[:, None] == request.eos, axis=1) | (state.positions + 2 >= request.most_tokens(context))
    rows = jnp.arange(last.shape[0])
    return GenerationState(
        step=state.step + 1,
        last=last,
        positions=state.positions + 1,
        done=state.done | ended,
        finite=state.finite & (state.done | step.finite),
        seen=state.seen.at[rows, last].max(~state.done),
        exit_layers=jnp.where(state.done, -1, step.exit_layers),
        layers_executed=step.layers_executed,
        cache=step.cache,
        text=None if state.text is None else jnp.concatenate([state.text[:, 1:], last[:, None]], axis=1),
    )


def _row_text(state: GenerationState, request: Request) -> RowText:
    """Input of the logit rules for drawing the next token."""
    batch = state.last.shape[0]
    made, length = jnp.broadcast_to(state.step, (batch,)), state.positions + 1
    return RowText(
        made=made,
        length=length,
        last=request.before_last(made, length),
        eos=request.eos,
        tokens=state.text,
        ends=None if state.text is None else jnp.full((batch,), state.text.shape[1], jnp.int32),
    )


def _record(out: Generated, state: GenerationState) -> Generated:
    """Writes the newest tokens into column ``state.step - 1``."""
    column = state.step - 1
    produced = state.exit_layers >= 0
    zero = jnp.int32(0)
    return Generated(
        tokens=lax.dynamic_update_slice(out.tokens, state.last[:, None], (zero, column)),
        lengths=out.lengths + produced.astype(jnp.int32),
        exit_layers=lax.dynamic_update_slice(out.exit_layers, state.exit_layers[:, None], (zero, column)),
        layers_executed=lax.dynamic_update_slice(out.layers_executed, state.layers_executed[None], (column,)),
        steps=state.step,
        finite=state.finite,
    )

"""The walk over layer groups: the loop that runs each token as deep as it needs.

A group is the layers between two exit points. One step of a model, of however many tokens, is this walk:

    while a group is left, and a token still needs it:
        take the slots that run the group
        run its layers; tokens that have exited keep their exit state, or run on
        let the router score the newest tokens: those above the threshold exit
    fill the cache rows of the groups that nobody ran: now, later, or never

What differs between strategies is in `Walk`'s fields:

    strategy                 slots              that run a group         exited tokens
    scoring, prompts         the new tokens     all                      keep their exit state
    "propagate"              one token a row    all                      keep their exit state
    "recompute"              the newest Q       the newest and waiting   run on, together with a later token
    every row of all layers  the new tokens     all                      run on at once

Two rules make a group that is not run free (measured, docs/architecture.md):

* each group is a branch of a `lax.switch` over weights of its own: a dynamic slice out of stacked weights would copy
  them at every step;
* the cache is only read inside the loop. Layers return their new key and value rows, and the caller writes the cache
  once.

Deciding per token with a learned router follows TIDE (2026).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tide_jax.exits.cache_fill import fill_rows
from tide_jax.exits.gate import Gating, TokenState, finish_group
from tide_jax.exits.queue import Queue, pass_number, pass_widths
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.attention.grouped import AttentionContext
from tide_jax.model.attention.span import KeyValue
from tide_jax.model.cache import KVCache
from tide_jax.model.decoder import Decoder

Contexts = tuple[AttentionContext, ...]
Branch = Callable[[TokenState], tuple[TokenState, KeyValue]]
"""What running a group does: the new state, and the group's key and value rows as `GroupRows.stack` gives them."""


class Loop(NamedTuple):
    """State of the loop.

    Attributes:
      group: the next group, int32 scalar.
      state: the step's tokens.
      rows: key and value rows so far, ``[groups, longest group, B, KV, S, channels]``.
    """

    group: Int[Array, ""]
    state: TokenState
    rows: KeyValue


class GroupRows(NamedTuple):
    """Key and value rows by group, padded to the longest: all branches of a switch return the same shape."""

    groups: tuple[range, ...]

    def empty(self, config: DecoderConfig, x: Float[Array, "B S D"]) -> KeyValue:
        """Zeros for every layer, in the dtype of `x`."""
        heads, key_channels, value_channels = config.cache_shape
        shape = (len(self.groups), self._longest, x.shape[0], heads, x.shape[1])
        return KeyValue(jnp.zeros((*shape, key_channels), x.dtype), jnp.zeros((*shape, value_channels), x.dtype))

    def stack(self, rows: Sequence[KeyValue], slots: int) -> KeyValue:
        """The rows of one group's layers as one array: those of the last of so many slots."""

        def stack(arrays: list[Array]) -> Array:
            return _behind_zeros(jnp.stack(arrays + [jnp.zeros_like(arrays[0])] * (self._longest - len(arrays))), slots)

        return KeyValue(stack([r.keys for r in rows]), stack([r.values for r in rows]))

    def by_layer(self, rows: KeyValue) -> KeyValue:
        """``[groups, longest group, ...]`` -> ``[layers, ...]``."""

        def flatten(a: Array) -> Array:
            if all(len(group) == self._longest for group in self.groups):
                return a.reshape(a.shape[0] * a.shape[1], *a.shape[2:])  # without a copy
            return jnp.concatenate([a[g, : len(group)] for g, group in enumerate(self.groups)])

        return KeyValue(flatten(rows.keys), flatten(rows.values))

    def layers_before(self, group: Int[Array, ""]) -> Int[Array, ""]:
        """Layers in the groups before one."""
        return jnp.asarray([0, *(g.stop for g in self.groups)], jnp.int32)[group]

    @property
    def _longest(self) -> int:
        return max(len(group) for group in self.groups)


class Walk(NamedTuple):
    """One step's walk.

    Attributes:
      model: whose layers run.
      groups: the layers of each group.
      gating: who may exit; None: nobody.
      cache: earlier tokens, None where there are none.
      positions: of the step's S slots, -1 where there is no token.
      runs_on: exited tokens run on, for their keys and values.
      queue: where tokens before the newest wait for layers; None where all slots are new tokens.
    """

    model: Decoder
    groups: tuple[range, ...]
    gating: Gating | None
    cache: KVCache | None
    positions: Int[Array, "B S"]
    runs_on: bool = False
    queue: Queue | None = None

    @property
    def rows(self) -> GroupRows:
        """The layout of the walk's key and value rows."""
        return GroupRows(self.groups)

    def start(self, state: TokenState) -> Loop:
        """Before the first group."""
        return Loop(jnp.int32(0), state, self.rows.empty(self.model.config, state.x))

    def run(self, loop: Loop, more: Callable[[Loop], Bool[Array, ""]]) -> Loop:
        """Runs group after group while `more` holds."""
        widths, count = self._widths, len(self.groups)
        newest = self.positions if self.queue is None else self.positions[:, -1:]
        contexts = self.model.contexts(newest, self.cache)
        branches = [self.branch(g, width, contexts) for width in widths for g in range(count)]

        def number(s: Loop) -> Int[Array, ""]:
            if self.queue is None:
                return s.group
            return s.group + count * pass_number(self.queue.waiting(s.group), widths[-1])

        return run_groups(more, branches, loop, choose=number)

    @property
    def _widths(self) -> tuple[int, ...]:
        """Slots that a group is compiled for."""
        slots = self.positions.shape[1]
        return (slots,) if self.queue is None else pass_widths(slots)

    def branch(self, g: int, width: int, contexts: Contexts) -> Branch:
        """Runs group `g` over the newest `width` slots, then decides who exits.

        Args:
          contexts: with the newest tokens asking.
        """

        def run(state: TokenState) -> tuple[TokenState, KeyValue]:
            # Take the slots. Of a queue's, only those run that wait for the group, and see what it has run before.
            before, waits, seen = state.x[:, -width:], None, contexts
            x = before
            if self.queue is not None and width > 1:
                waits = self.queue.waits(g)[:, -width:]
                seen = self.model.contexts(jnp.where(waits, self.positions[:, -width:], -1), self.queue.complete(g))
                # Slots that do not wait are masked, but what is no number would not be.
                x = jnp.where(waits[:, :, None], before, jnp.zeros_like(before))
            # Run the layers. An exited token keeps its exit state, so that its rows are those of state propagation
            # even while other tokens run the layer.
            rows, active = [], state.active[:, :, None]
            everyone = self.gating is None or self.runs_on or active.size == 1  # a lone token is active
            for i in self.groups[g]:
                reads = x if everyone else jnp.where(active, x, self.exit_input(i, state))
                y, new = self.model.layers[i](reads, seen, None if self.cache is None else self.cache.layer(i))
                x = y if everyone else jnp.where(active, y, x)
                rows.append(new)
            # Put them back, and decide.
            x = x if waits is None else jnp.where(waits[:, :, None], x, before)
            ahead = state.x.shape[1] - width
            state = state._replace(x=jnp.concatenate([state.x[:, :ahead], x], axis=1) if ahead else x)
            state = finish_group(self.model, self.groups, g, state, self.gating)
            return state, self.rows.stack(rows, self.positions.shape[1])

        return run

    def fill(self, loop: Loop, contexts: Contexts, wanted: Bool[Array, "B S"] | Callable[[int], Array]) -> Loop:
        """Projects the rows of the groups that are left from the exit states: CALM's state propagation (Schuster et al.
        2022, arXiv:2207.07061, section 3.3), from the exit state as translated to each layer.

        Args:
          contexts: with the true positions of the slots.
          wanted: slots whose rows are wanted, or a function of the group that says so.
        """
        count = len(self.groups)
        of = wanted if callable(wanted) else lambda _: wanted
        return run_groups(lambda s: s.group < count, [self._projection(g, contexts, of(g)) for g in range(count)], loop)

    def _projection(self, g: int, contexts: Contexts, wanted: Bool[Array, "B S"]) -> Branch:
        implementation = None if self.gating is None else self.gating.implementation

        def project(state: TokenState) -> tuple[TokenState, KeyValue]:
            rows = []
            for i in self.groups[g]:
                x = self.exit_input(i, state)
                rows.append(fill_rows(self.model.layers[i], x, contexts, wanted, implementation=implementation))
            return state, self.rows.stack(rows, state.x.shape[1])

        return project

    def exit_input(self, layer: int, state: TokenState) -> Float[Array, "B S D"]:
        """Input of a layer for tokens that have exited: their exit state, translated to the layer."""
        if self.gating is None:
            return state.x
        return self.gating.translated(self.model, layer, state.x, state.code, state.exit_layers)


def run_groups(
    more: Callable[[Loop], Bool[Array, ""]],
    branches: Sequence[Branch],
    loop: Loop,
    *,
    choose: Callable[[Loop], Int[Array, ""]] = lambda s: s.group,
) -> Loop:
    """Runs group after group while `more` holds.

    Args:
      branches: what `choose` chooses from, by number.
      choose: the branch that runs ``loop.group``; by default there is one for each group.
    """

    def body(s: Loop) -> Loop:
        state, rows = lax.switch(choose(s), branches, s.state)
        zeros = (jnp.int32(0),) * rows.keys.ndim
        keys = lax.dynamic_update_slice(s.rows.keys, rows.keys[None], (s.group, *zeros))
        values = lax.dynamic_update_slice(s.rows.values, rows.values[None], (s.group, *zeros))
        return Loop(s.group + 1, state, KeyValue(keys, values))

    return lax.while_loop(more, body, loop)


def _behind_zeros(a: Float[Array, "l B KV W c"], slots: int) -> Float[Array, "l B KV S c"]:
    """Rows as those of the last of so many slots. A CPU writes zeros and a slice faster than it pads."""
    if a.shape[3] == slots:
        return a
    empty = jnp.zeros((*a.shape[:3], slots, a.shape[4]), a.dtype)
    return lax.dynamic_update_slice_in_dim(empty, a, slots - a.shape[3], axis=3)


def anyone_active(count: int) -> Callable[[Loop], Any]:
    """For `Walk.run`: as long as one of `count` groups is left and a token is active."""
    return lambda s: (s.group < count) & jnp.any(s.state.active)

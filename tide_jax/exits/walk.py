"""The walk over layer groups: a while loop that runs each token up to its exit.

A group is the layers between two exit points. A forward pass, over any number of tokens, is one walk:

    while a group is left, and a token still needs it:
        take the slots that run the group
        run its layers; exited tokens keep their exit state, or run on
        let the router score the newest tokens: those above the threshold exit
    fill the cache rows of the groups that did not run: now, later, or never

The fields of `Walk` hold the differences between strategies:

    strategy                 slots              slots running a group    exited tokens
    scoring, prompts         the new tokens     all                      keep their exit state
    "propagate"              one token a row    all                      keep their exit state
    "recompute"              the newest Q       the newest and waiting   run on, together with a later token
    every row of all layers  the new tokens     all                      run on at once

Two rules make a skipped group cost nothing (measured, docs/architecture.md):

* Each group is a branch of a `lax.switch` with its own weights. A dynamic slice of stacked weights would copy them at
  every step.
* The loop only reads the cache. Layers return what they keep of the new tokens, and the caller writes the cache once.

The per-token decision by a learned router follows TIDE (2026).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tide_jax.config import layer_groups
from tide_jax.exits.cache_fill import fill_rows
from tide_jax.exits.exits import Exits
from tide_jax.exits.gate import TokenState, exit_input, finish_group
from tide_jax.exits.queue import Queue, pass_number, pass_widths
from tide_jax.model.architecture import AttentionType, DecoderConfig
from tide_jax.model.attention.span import KeyValue
from tide_jax.model.cache import KVCache, place_rows
from tide_jax.model.decoder import Decoder
from tide_jax.model.layers import Context
from tide_jax.model.memory import Rows, joined, parts_of

Contexts = tuple[Context, ...]
Stacks = tuple[Any, ...]
"""Rows of several layers, with an array for each kind of row: keys, values, and inputs of each recurrent type."""
Branch = Callable[[TokenState], tuple[TokenState, Stacks]]
"""Runs one group: returns the new state and the rows of the group's layers in the layout of `GroupRows.stack`."""


class Loop(NamedTuple):
    """Carry of the while loop.

    Attributes:
      group: index of the next group, int32 scalar.
      state: state of the tokens.
      rows: rows so far, in the layout of `GroupRows.empty`.
    """

    group: Int[Array, ""]
    state: TokenState
    rows: Stacks


class GroupRows(NamedTuple):
    """Layout of rows by group: all branches of a switch return arrays of one shape.

    Layers with attention keep keys and values, and recurrent layers keep inputs, in a number that depends on their
    type. So there are arrays for each kind of row, padded to the most layers of that kind in a group.
    """

    groups: tuple[range, ...]
    config: DecoderConfig

    def empty(self, x: Float[Array, "B S D"]) -> Stacks:
        """Zeros for every layer, ``[groups, most layers, B, ..., S, channels]`` for each kind, in the dtype of `x`."""
        return tuple(
            jax.tree.map(lambda a, n=most: jnp.zeros((len(self.groups), n, *a.shape), a.dtype), self._row(kind, x))
            for kind, most in self._most.items()
        )

    def stack(self, g: int, rows: Sequence[Rows], slots: int) -> Stacks:
        """Stacks the rows of the layers of group `g`, padded in front to `slots` slots."""

        def stack(most: int, *arrays: Array) -> Array:
            stacked = jnp.stack([*arrays, *[jnp.zeros_like(arrays[0])] * (most - len(arrays))])
            return place_rows(stacked, slots, slots - stacked.shape[-2])

        kinds, found = [kind for layer in self.groups[g] for kind in self._kinds(layer)], []
        parts = list(zip(kinds, [part for row in rows for part in parts_of(row)], strict=True))
        for kind, most in self._most.items():
            own = [part for k, part in parts if k == kind]
            found.append(jax.tree.map(functools.partial(stack, most), *(own or [self._no_row(kind, rows, slots)])))
        return tuple(found)

    def by_layer(self, stacks: Stacks) -> tuple[Rows, ...]:
        """The rows of each layer."""
        of_kind, found = dict(zip(self._most, stacks, strict=True)), []
        for g, group in enumerate(self.groups):
            seen = dict.fromkeys(self._most, 0)
            for kinds in map(self._kinds, group):
                parts = [jax.tree.map(lambda a, place=(g, seen[kind]): a[place], of_kind[kind]) for kind in kinds]
                found.append(joined(tuple(parts)))
                for kind in kinds:
                    seen[kind] += 1
        return tuple(found)

    def layers_before(self, group: Int[Array, ""]) -> Int[Array, ""]:
        """Number of layers in the groups before `group`."""
        return jnp.asarray([0, *(g.stop for g in self.groups)], jnp.int32)[group]

    def _kinds(self, layer: int) -> tuple[int, ...]:
        """What a layer keeps: -1 for keys and values, and the number of a token's inputs to the layer's state."""
        kinds = self.config.layer_type(layer), self.config.recurrent_beside(layer)
        sizes = [-1 if isinstance(k, AttentionType) else k.sizes(self.config.hidden_size).inputs for k in kinds if k]
        return tuple(sizes)

    @property
    def _most(self) -> dict[int, int]:
        """For each kind of row, the most layers of that kind in a group."""
        kinds = [[kind for layer in group for kind in self._kinds(layer)] for group in self.groups]
        return {kind: max(of.count(kind) for of in kinds) for kind in sorted({k for of in kinds for k in of})}

    def _row(self, kind: int, x: Float[Array, "B S D"]) -> Rows:
        """Zeros in place of one layer's row."""
        batch, slots, _ = x.shape
        if kind >= 0:
            return jnp.zeros((batch, slots, kind), x.dtype)
        heads, *channels = self.config.cache_shape
        return KeyValue(*(jnp.zeros((batch, heads, slots, c), x.dtype) for c in channels))

    def _no_row(self, kind: int, rows: Sequence[Rows], slots: int) -> Rows:
        """What stands for the rows of a kind that the group's layers lack."""
        like = jax.tree.leaves(rows)[0]
        return self._row(kind, jnp.zeros((like.shape[0], slots, 0), like.dtype))


class Walk(NamedTuple):
    """One forward pass over the layer groups.

    Attributes:
      model: the decoder.
      groups: the layers of each group.
      exits: routers and thresholds; None turns exits off.
      may_exit: the new tokens that may exit early.
      cache: earlier tokens, None if there are none.
      positions: positions of the S slots, -1 for slots without a token.
      runs_on: whether exited tokens run the remaining layers, for their keys and values.
      queue: the queue of tokens that wait for layers; None if all slots are new tokens.
    """

    model: Decoder
    groups: tuple[range, ...]
    exits: Exits | None
    may_exit: Bool[Array, "B T"]
    cache: KVCache | None
    positions: Int[Array, "B S"]
    runs_on: bool = False
    queue: Queue | None = None

    @property
    def rows(self) -> GroupRows:
        """Layout of what the walk's layers keep."""
        return GroupRows(self.groups, self.model.config)

    def start(self, state: TokenState) -> Loop:
        """The loop's carry before the first group."""
        return Loop(jnp.int32(0), state, self.rows.empty(state.x))

    def run(self, loop: Loop, more: Callable[[Loop], Bool[Array, ""]]) -> Loop:
        """Runs group after group while `more` returns True."""
        widths, count = self._widths, len(self.groups)
        newest = self.positions if self.queue is None else self.positions[:, -1:]
        contexts = self.model.contexts(newest, self.cache)
        branches = [self.branch(g, width, contexts) for width in widths for g in range(count)]

        # With a queue, there is a branch for each group and width: take the smallest that holds the waiting slots.
        def number(s: Loop) -> Int[Array, ""]:
            if self.queue is None:
                return s.group
            return s.group + count * pass_number(self.queue.count_waiting(s.group), widths[-1])

        return run_groups(more, branches, loop, choose=number)

    @property
    def _widths(self) -> tuple[int, ...]:
        """Numbers of slots that a group is compiled for."""
        slots = self.positions.shape[1]
        return (slots,) if self.queue is None else pass_widths(slots)

    def branch(self, g: int, width: int, contexts: Contexts) -> Branch:
        """Branch that runs group `g` over the newest `width` slots, then makes the exit decision.

        Args:
          contexts: of the layers, with the newest tokens as queries.
        """

        def run(state: TokenState) -> tuple[TokenState, Stacks]:
            # Take the slots. Of a queue, only those run that wait for the group; they attend to slots it has processed.
            before, waits, seen = state.x[:, -width:], None, contexts
            x = before
            if self.queue is not None and width > 1:
                waits = self.queue.waiting_slots(g)[:, -width:]
                positions = jnp.where(waits, self.positions[:, -width:], -1)
                seen = self.model.contexts(positions, self.queue.without_waiting(g))
                # Slots that do not wait are masked, but a mask does not stop NaN: set them to zero.
                x = jnp.where(waits[:, :, None], before, jnp.zeros_like(before))
            # Run the layers. An exited token keeps its exit state, so that its rows equal those of state propagation
            # even while other tokens run the layer.
            rows, active = [], state.active[:, :, None]
            everyone = self.exits is None or self.runs_on or active.size == 1  # a lone token is active
            for i in self.groups[g]:
                reads = x if everyone else jnp.where(active, x, exit_input(self.model, self.exits, i, state))
                cached, left = None if self.cache is None else self.cache.layer(i), None if everyone else ~state.active
                y, new = self.model.layers[i](reads, seen, cached, left)
                x = y if everyone else jnp.where(active, y, x)
                rows.append(new)
            # Write the slots back, then make the exit decision.
            x = x if waits is None else jnp.where(waits[:, :, None], x, before)
            ahead = state.x.shape[1] - width
            state = state._replace(x=jnp.concatenate([state.x[:, :ahead], x], axis=1) if ahead else x)
            state = finish_group(self.model, self.groups, g, state, self.exits, self.may_exit)
            return state, self.rows.stack(g, rows, self.positions.shape[1])

        return run

    def fill(self, loop: Loop, contexts: Contexts, wanted: Bool[Array, "B S"] | Callable[[int], Array]) -> Loop:
        """Projects the rows of the remaining groups from the exit states, translated to each layer.

        This is CALM's state propagation (Schuster et al. 2022, arXiv:2207.07061, section 3.3).

        Args:
          contexts: of the layers, with the slots' true positions.
          wanted: slots whose rows are needed, or a function from the group to these slots.
        """
        count = len(self.groups)
        of = wanted if callable(wanted) else lambda _: wanted
        return run_groups(lambda s: s.group < count, [self._projection(g, contexts, of(g)) for g in range(count)], loop)

    def _projection(self, g: int, contexts: Contexts, wanted: Bool[Array, "B S"]) -> Branch:
        implementation = None if self.exits is None else self.exits.implementation

        def project(state: TokenState) -> tuple[TokenState, Stacks]:
            rows = []
            for i in self.groups[g]:
                x = exit_input(self.model, self.exits, i, state)
                rows.append(fill_rows(self.model.layers[i], x, contexts, wanted, implementation=implementation))
            return state, self.rows.stack(g, rows, state.x.shape[1])

        return project


def groups_of(model: Decoder, exits: Exits | None) -> tuple[range, ...]:
    """The layers between exit points; one group of all layers without exits."""
    return layer_groups(model.config.num_layers, () if exits is None else exits.routers.exit_points)


def run_groups(
    more: Callable[[Loop], Bool[Array, ""]],
    branches: Sequence[Branch],
    loop: Loop,
    *,
    choose: Callable[[Loop], Int[Array, ""]] = lambda s: s.group,
) -> Loop:
    """While loop over layer groups, shared by all decoding strategies.

    Args:
      more: whether to run another group.
      branches: the branches of the switch.
      loop: the carry to start from.
      choose: index of the branch that runs ``loop.group``; by default there is one branch for each group.
    """

    def body(s: Loop) -> Loop:
        state, rows = lax.switch(choose(s), branches, s.state)

        def write(old: Array, new: Array) -> Array:
            return lax.dynamic_update_slice(old, new[None], (s.group, *(jnp.int32(0),) * new.ndim))

        return Loop(s.group + 1, state, jax.tree.map(write, s.rows, rows))

    return lax.while_loop(more, body, loop)


def anyone_active(count: int) -> Callable[[Loop], Any]:
    """Loop condition for `Walk.run`: one of `count` groups is left, and a token is active."""
    return lambda s: (s.group < count) & jnp.any(s.state.active)

"""Runs deep layers only for the tokens that have not exited, in passes over many tokens.

The masked loop (`tide_jax.exits.walk`) runs a group for all tokens as long as one token needs it. Here the active
tokens of each row are gathered into a smaller array, of the smallest static size that holds them. Queries, attention
outputs and feed-forward blocks are computed for these alone. Keys and values are still those of every token, at its own
position: an exited token's come from its exit state, translated to the layer (`tide_jax.exits.translators`). So the
result equals the masked loop's, to rounding. Every size adds a branch for each group but the first, in which all tokens
are active.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels.compact import IMPLEMENTATIONS, Partition, gather_rows, partition, scatter_rows
from tide_jax.exits.cache_fill import fill_rows
from tide_jax.exits.exits import Exits
from tide_jax.exits.gate import TokenState, exit_input, finish_group
from tide_jax.exits.walk import Branch, GroupRows, Loop, Walk, run_groups
from tide_jax.model.attention.grouped import AttentionContext
from tide_jax.model.attention.span import KeyValue
from tide_jax.model.cache import KVCache
from tide_jax.model.decoder import Decoder
from tide_jax.model.sharding import on_mesh

LEAST_TOKENS = 128
"""Fewest tokens of a row for which smaller sizes are compiled.

A pass over fewer tokens is bound by reading the weights, and takes as long for half as many."""
QUARTERS = (3, 2, 1)
"""Compiled sizes below the full row, in quarters of it."""


def survivor_sizes(tokens: int) -> tuple[int, ...]:
    """Sizes that groups are compiled for besides the full row, largest first; none for short rows.

    >>> survivor_sizes(512), survivor_sizes(96)
    ((384, 256, 128), ())
    """
    return tuple(tokens * quarters // 4 for quarters in QUARTERS) if tokens >= LEAST_TOKENS else ()


def run_survivors(walk: Walk, loop: Loop, more: Callable[[Loop], Array]) -> Loop:
    """Like `Walk.run`, but each group runs in the smallest size that holds the active tokens."""
    assert walk.exits is not None
    contexts = walk.model.contexts(walk.positions, walk.cache)
    fewer = Survivors(walk.model, walk.groups, walk.cache, walk.exits, walk.may_exit, walk.positions, contexts)
    branches = [walk.branch(g, walk.positions.shape[1], contexts) for g in range(len(walk.groups))]
    return run_groups(more, branches + fewer.branches(), loop, choose=fewer.choose)


class Survivors(NamedTuple):
    """Branches of a walk that run a group for fewer tokens than the row has.

    Attributes:
      model, groups, cache, exits, may_exit: as in `Walk`.
      positions: positions of all new tokens, -1 for padding.
      contexts: attention contexts with all new tokens as queries.
    """

    model: Decoder
    groups: tuple[range, ...]
    cache: KVCache | None
    exits: Exits
    may_exit: Bool[Array, "B T"]
    positions: Int[Array, "B T"]
    contexts: tuple[AttentionContext, ...]

    def branches(self) -> list[Branch]:
        """One branch for each size and each group but the first; they follow the branches of full size."""
        return [self._branch(g, size) for size in self._sizes for g in range(1, len(self.groups))]

    def choose(self, loop: Loop) -> Int[Array, ""]:
        """Index of the branch that runs the next group in the smallest size that holds the active tokens."""
        most, count = jnp.max(jnp.sum(loop.state.active, axis=1, dtype=jnp.int32)), len(self.groups)
        smaller = sum((most <= size).astype(jnp.int32) for size in self._sizes)
        compacted = count + (smaller - 1) * (count - 1) + loop.group - 1
        return jnp.where((smaller > 0) & (loop.group > 0), compacted, loop.group)

    @property
    def _sizes(self) -> tuple[int, ...]:
        return survivor_sizes(self.positions.shape[1])

    def _branch(self, g: int, size: int) -> Branch:
        """Branch that runs group `g` for up to `size` active tokens of each row, then makes the exit decision."""

        def run(state: TokenState) -> tuple[TokenState, KeyValue]:
            # Gather the active tokens of each row.
            rows = partition(state.active)
            few = _taken(state, rows, size)._replace(x=self._gathered(state.x, rows, size))
            places = jnp.where(few.active, _picked(self.positions, rows, size), -1)
            # Run the layers: queries of the active tokens, keys and values of all tokens.
            asking, new = self.model.contexts(self.positions, self.cache, places), []
            for i in self.groups[g]:
                new.append(self._stored(i, state, few.x, rows))
                cached = None if self.cache is None else self.cache.layer(i)
                few = few._replace(x=self.model.layers[i].run_on(few.x, new[-1], asking, cached))
            # Decide for the active tokens, then scatter their state back.
            few = finish_group(self.model, self.groups, g, few, self.exits, _picked(self.may_exit, rows, size))
            return self._returned(state, few, rows), GroupRows(self.groups).stack(new, self.positions.shape[1])

        return run

    def _stored(self, layer: int, state: TokenState, x: Float[Array, "B M D"], rows: Partition) -> KeyValue:
        """A layer's key and value rows for all tokens: from `x` if active, from the exit state if exited."""
        left = exit_input(self.model, self.exits, layer, state)
        reads = self._scattered(x, rows, left)
        real, implementation = self.positions >= 0, self.exits.implementation
        return fill_rows(self.model.layers[layer], reads, self.contexts, real, implementation=implementation)

    def _returned(self, state: TokenState, few: TokenState, rows: Partition) -> TokenState:
        """State of all tokens, updated with the new state of the active ones."""
        code = few.code
        return TokenState(
            x=self._scattered(few.x, rows, state.x),
            states=self._scattered(few.states, rows, state.states),
            code=None if code is None or state.code is None else self._scattered(code, rows, state.code),
            active=_placed(few.active, rows, state.active),
            exit_layers=_placed(few.exit_layers, rows, state.exit_layers),
        )

    def _gathered(self, x: Float[Array, "B T D"], rows: Partition, size: int) -> Float[Array, "B M D"]:
        return gather_rows(x, rows, size, implementation=self._moving)

    def _scattered(
        self, x: Float[Array, "B M D"], rows: Partition, out: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        # Codes of rank-0 translators have no channels: nothing to move.
        return out if x.size == 0 else scatter_rows(x, rows, out, implementation=self._moving)

    @property
    def _moving(self) -> str | None:
        """Implementation of the gather and scatter; on a mesh plain JAX, since kernels can't handle split arrays."""
        return "reference" if on_mesh() else IMPLEMENTATIONS.own(self.exits.implementation)


def _taken(state: TokenState, rows: Partition, size: int) -> TokenState:
    """State of the active tokens, with zeros for the residual stream, and for output states and codes (none yet)."""

    def none_yet(a: Float[Array, "B T D"]) -> Float[Array, "B M D"]:
        return jnp.zeros((a.shape[0], size, a.shape[2]), a.dtype)

    return TokenState(
        x=none_yet(state.x),
        states=none_yet(state.states),
        code=None if state.code is None else none_yet(state.code),
        active=_picked(state.active, rows, size),
        exit_layers=_picked(state.exit_layers, rows, size),
    )


def _picked(a: Shaped[Array, "B T"], rows: Partition, size: int) -> Shaped[Array, "B M"]:
    """Gathers one number for each active token, 0 behind them."""
    return gather_rows(a[:, :, None], rows, size, implementation="reference")[:, :, 0]


def _placed(a: Shaped[Array, "B M"], rows: Partition, out: Shaped[Array, "B T"]) -> Shaped[Array, "B T"]:
    return scatter_rows(a[:, :, None], rows, out[:, :, None], implementation="reference")[:, :, 0]

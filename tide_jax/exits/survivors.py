"""Deep layers on the tokens that are left, where many tokens run at once.

While any token of a prompt goes on, the next group of layers has to run, and the masked loop
(`tide_jax.exits.walk`) runs it for all tokens, those that have left included. Here the tokens that go on are
brought together, in each row by itself, and queries, attention outputs and feed-forward blocks are computed for as many
as the smallest of a few static sizes holds. Keys and values are still those of every token, at its own position: a
token that has left is seen as its exit state, translated to the layer (`tide_jax.exits.translators`), so what a layer
computes for a token is what the masked loop computes, to rounding. Each size is a branch of its own for every group but
the first, before which nobody leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.compact import IMPLEMENTATIONS, Partition, gather_rows, partition, scatter_rows
from tide_jax.exits.cache_fill import fill_rows
from tide_jax.exits.gate import Gating, TokenState, finish_group
from tide_jax.exits.walk import Branch, GroupRows, Loop, Walk, run_groups
from tide_jax.model.attention.grouped import AttentionContext
from tide_jax.model.attention.span import KeyValue
from tide_jax.model.cache import KVCache
from tide_jax.model.decoder import Decoder
from tide_jax.model.sharding import on_mesh

LEAST_TOKENS = 128
"""Tokens from which on it is worth compiling a group for fewer of them: a pass over few tokens reads the weights, and
takes as long for half as many."""
QUARTERS = (3, 2, 1)
"""Sizes below all tokens, in quarters."""


def survivor_sizes(tokens: int) -> tuple[int, ...]:
    """Tokens of a row that groups are compiled for, besides all of them, the largest first; none for short rows.

    >>> survivor_sizes(512), survivor_sizes(96)
    ((384, 256, 128), ())
    """
    return tuple(tokens * quarters // 4 for quarters in QUARTERS) if tokens >= LEAST_TOKENS else ()


def run_survivors(walk: Walk, loop: Loop, more: Callable[[Loop], Array]) -> Loop:
    """`Walk.run`, each group for as few tokens as hold those that are left."""
    assert walk.gating is not None
    contexts = walk.model.contexts(walk.positions, walk.cache)
    fewer = Survivors(walk.model, walk.groups, walk.cache, walk.gating, walk.positions, contexts)
    branches = [walk.branch(g, walk.positions.shape[1], contexts) for g in range(len(walk.groups))]
    return run_groups(more, branches + fewer.branches(), loop, choose=fewer.choose)


class Survivors(NamedTuple):
    """A walk over the layer groups with branches for fewer tokens.

    Attributes:
      model, groups, cache, gating: of the walk.
      positions: of all new tokens, -1 for padding.
      contexts: with all new tokens asking.
    """

    model: Decoder
    groups: tuple[range, ...]
    cache: KVCache | None
    gating: Gating
    positions: Int[Array, "B T"]
    contexts: tuple[AttentionContext, ...]

    def branches(self) -> list[Branch]:
        """Every group but the first, for each size; they follow the groups' own branches."""
        return [self._branch(g, size) for size in self._sizes for g in range(1, len(self.groups))]

    def choose(self, loop: Loop) -> Int[Array, ""]:
        """The number of the branch that runs the next group for no more tokens than it has to."""
        most, count = jnp.max(jnp.sum(loop.state.active, axis=1, dtype=jnp.int32)), len(self.groups)
        smaller = sum((most <= size).astype(jnp.int32) for size in self._sizes)
        compacted = count + (smaller - 1) * (count - 1) + loop.group - 1
        return jnp.where((smaller > 0) & (loop.group > 0), compacted, loop.group)

    @property
    def _sizes(self) -> tuple[int, ...]:
        return survivor_sizes(self.positions.shape[1])

    def _branch(self, g: int, size: int) -> Branch:
        """Runs group `g` for the active tokens, `size` of each row, then decides who of them leaves."""

        def run(state: TokenState) -> tuple[TokenState, KeyValue]:
            rows = partition(state.active)
            few = _taken(state, rows, size)._replace(x=self._gathered(state.x, rows, size))
            places = jnp.where(few.active, _picked(self.positions, rows, size), -1)
            asking, new = self.model.contexts(self.positions, self.cache, places), []
            for i in self.groups[g]:
                new.append(self._stored(i, state, few.x, rows))
                cached = None if self.cache is None else self.cache.layer(i)
                few = few._replace(x=self.model.layers[i].run_on(few.x, new[-1], asking, cached))
            gating = self.gating._replace(may_exit=_picked(self.gating.may_exit, rows, size))
            few = finish_group(self.model, self.groups, g, few, gating)
            return self._returned(state, few, rows), GroupRows(self.groups).stack(new, self.positions.shape[1])

        return run

    def _stored(self, layer: int, state: TokenState, x: Float[Array, "B M D"], rows: Partition) -> KeyValue:
        """A layer's key and value rows of all tokens, from the active ones' `x` and the others' exit states."""
        left = self.gating.translated(self.model, layer, state.x, state.code, state.exit_layers)
        reads = self._scattered(x, rows, left)
        real, implementation = self.positions >= 0, self.gating.implementation
        return fill_rows(self.model.layers[layer], reads, self.contexts, real, implementation=implementation)

    def _returned(self, state: TokenState, few: TokenState, rows: Partition) -> TokenState:
        """All tokens' state, with what became of the active ones."""
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
        # A translator of rank 0 reads nothing: there are no rows to move.
        return out if x.size == 0 else scatter_rows(x, rows, out, implementation=self._moving)

    @property
    def _moving(self) -> str | None:
        """Of the compaction: a kernel does not know how a mesh splits its arrays."""
        return "reference" if on_mesh() else IMPLEMENTATIONS.own(self.gating.implementation)


def _taken(state: TokenState, rows: Partition, size: int) -> TokenState:
    """The active tokens' state, but for the residual stream. None of them has an answer or a code yet."""

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
    """One number of each active token, 0 past them."""
    return gather_rows(a[:, :, None], rows, size, implementation="reference")[:, :, 0]


def _placed(a: Shaped[Array, "B M"], rows: Partition, out: Shaped[Array, "B T"]) -> Shaped[Array, "B T"]:
    return scatter_rows(a[:, :, None], rows, out[:, :, None], implementation="reference")[:, :, 0]

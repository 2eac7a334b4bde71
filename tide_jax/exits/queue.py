"""The newest Q cache slots, and which layer groups still have to process them.

A token that exits leaves its deep layers undone. Its exit state is all that they need, so it is kept here until a later
token runs these layers, or until the queue is full. "recompute" then runs them (`tide_jax.exits.recompute`), a deferred
"propagate" projects their cache rows (`tide_jax.exits.deferred_fill`).

A group always processes all tokens that wait for it. So what waits for a group is what came after its last run: the
newest slots, none missing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tide_jax.model.attention.span import KeyValue
from tide_jax.model.cache import KVCache, Pending, newest_positions


class Queue(NamedTuple):
    """The newest Q slots during a step, its own token among them.

    Attributes:
      cache: before the step, with `pending`.
      groups: the layer groups that `pending` counts.
      positions: of the Q slots, -1 where empty.
    """

    cache: KVCache
    groups: tuple[range, ...]
    positions: Int[Array, "B Q"]

    @classmethod
    def start(cls, cache: KVCache, groups: tuple[range, ...], positions: Int[Array, "B 1"]) -> Queue:
        """The queue with one token more in each row, at the given positions."""
        earlier = newest_positions(cache, pending_of(cache).queue_length - 1)
        return cls(cache, groups, jnp.concatenate([earlier, positions], axis=1))

    @property
    def pending(self) -> Pending:
        """The cache's."""
        return pending_of(self.cache)

    @property
    def length(self) -> Int[Array, ""]:
        """Slots written after the step."""
        return self.cache.length + 1

    @property
    def first(self) -> Int[Array, ""]:
        """The slot that the queue begins with."""
        return self.length - self.positions.shape[1]

    @property
    def full(self) -> Bool[Array, ""]:
        """Whether a step later the queue would not hold what waits for the last group."""
        return self.length - self.pending.ran[-1] >= self.positions.shape[1]

    def waiting(self, group: Int[Array, ""]) -> Int[Array, ""]:
        """How many slots wait for a group, the step's own included."""
        return self.length - self.pending.ran[group]

    def waits(self, g: int) -> Bool[Array, "1 Q"]:
        """Which slots wait for group `g`, the step's own included."""
        return self._after(self.pending.ran[g][None])

    def complete(self, g: int) -> KVCache:
        """The cache with nothing in the slots that group `g` has not processed."""
        slots = jnp.arange(self.cache.capacity, dtype=jnp.int32)[None]
        return self.cache._replace(positions=jnp.where(slots < self.pending.ran[g], self.cache.positions, -1))

    def filled(self, new: KeyValue, done: Bool[Array, " groups"]) -> KVCache:
        """The cache with the rows that groups have computed for slots that waited for them.

        Args:
          new: ``[L, B, KV, Q, channels]``, rows of the queue's slots.
          done: groups whose rows there are.
        """
        by_group = self._after(self.pending.ran) & done[:, None]
        fresh = [by_group[g][None, None, :, None] for g, group in enumerate(self.groups) for _ in group]
        zero = jnp.int32(0)
        start = (zero, zero, self.first, zero)

        def write_layer(old: Array, rows: Float[Array, "B KV Q c"], fresh: Bool[Array, "1 1 Q 1"]) -> Array:
            kept = lax.dynamic_slice(old, start, rows.shape)
            return lax.dynamic_update_slice(old, jnp.where(fresh, rows.astype(old.dtype), kept), start)

        def write(old: tuple[Array, ...], rows: Array) -> tuple[Array, ...]:
            return tuple(write_layer(*layer) for layer in zip(old, rows, fresh, strict=True))

        return self.cache._replace(keys=write(self.cache.keys, new.keys), values=write(self.cache.values, new.values))

    def written(self, new: KeyValue, done: Bool[Array, " groups"], states: Float[Array, "B Q D"]) -> KVCache:
        """`filled`, and the step's tokens appended; `states`: of the slots, each after the last group that ran it."""
        zero, pending = jnp.int32(0), self.pending
        return self.filled(new, done)._replace(
            positions=lax.dynamic_update_slice(self.cache.positions, self.positions, (zero, self.first)),
            length=self.length,
            pending=pending._replace(
                states=states.astype(pending.states.dtype), ran=jnp.where(done, self.length, pending.ran)
            ),
        )

    def _after(self, ran: Int[Array, " n"]) -> Bool[Array, "n Q"]:
        """Slots of the queue that came after so many."""
        return (self.first + jnp.arange(self.positions.shape[1], dtype=jnp.int32))[None] >= ran[:, None]


def pending_of(cache: KVCache) -> Pending:
    """What waits in a cache that has a queue."""
    assert cache.pending is not None
    return cache.pending


def pass_widths(most: int) -> tuple[int, ...]:
    """Slots in the passes that are compiled: mostly there is one, and two rows are cheaper than eight.

    >>> pass_widths(8), pass_widths(1)
    ((1, 2, 8), (1,))
    """
    return tuple(sorted({1, min(2, most), most}))


def pass_number(needed: Int[Array, "..."], most: int) -> Int[Array, "..."]:
    """Index into `pass_widths` of the least width that holds so many slots."""
    number = jnp.zeros_like(needed)
    for width in pass_widths(most)[:-1]:
        number += (needed > width).astype(number.dtype)
    return number

"""The newest slots of a cache, where tokens wait for layers: which groups have yet to see to them, and writing them."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tide_jax.model.attention.span import KeyValue
from tide_jax.model.cache import KVCache, Pending


class SlotWindow(NamedTuple):
    """The newest Q slots, those of a step's own tokens among them.

    Attributes:
      cache: before the step, with `pending`.
      groups: the layer groups that `pending` counts.
      positions: of the window's slots, -1 where empty.
      length: slots written after the step.
    """

    cache: KVCache
    groups: tuple[range, ...]
    positions: Int[Array, "B Q"]
    length: Int[Array, ""]

    @property
    def pending(self) -> Pending:
        """The cache's."""
        assert self.cache.pending is not None
        return self.cache.pending

    @property
    def first(self) -> Int[Array, ""]:
        """The slot that the window begins with."""
        return self.length - self.positions.shape[1]

    @property
    def full(self) -> Bool[Array, ""]:
        """Whether a step later the window would not hold what waits for the last group."""
        return self.length - self.pending.ran[-1] >= self.positions.shape[1]

    def waits(self, ran: Int[Array, " groups"]) -> Bool[Array, "groups Q"]:
        """Which slots of the window groups that have seen to so many have yet to see to, the step's own included."""
        return (self.first + jnp.arange(self.positions.shape[1], dtype=jnp.int32))[None] >= ran[:, None]

    def complete(self, g: int) -> KVCache:
        """The cache with nothing in the slots that group `g` has not seen to."""
        slots = jnp.arange(self.cache.capacity, dtype=jnp.int32)[None]
        return self.cache._replace(positions=jnp.where(slots < self.pending.ran[g], self.cache.positions, -1))

    def filled(self, new: KeyValue, done: Bool[Array, " groups"]) -> KVCache:
        """The cache with the rows that groups have computed of slots that waited for them.

        Args:
          new: ``[L, B, KV, Q, channels]``, rows of the window's slots.
          done: groups whose rows there are.
        """
        by_group = self.waits(self.pending.ran) & done[:, None]
        fresh = [by_group[g][None, None, :, None] for g, group in enumerate(self.groups) for _ in group]
        zero = jnp.int32(0)
        start = (zero, zero, self.first, zero)

        def write_layer(old: Array, rows: Float[Array, "B KV Q c"], fresh: Bool[Array, "1 1 Q 1"]) -> Array:
            kept = lax.dynamic_slice(old, start, rows.shape)
            return lax.dynamic_update_slice(old, jnp.where(fresh, rows.astype(old.dtype), kept), start)

        def write(old: tuple[Array, ...], rows: Array) -> tuple[Array, ...]:
            return tuple(write_layer(*layer) for layer in zip(old, rows, fresh, strict=True))

        return self.cache._replace(keys=write(self.cache.keys, new.keys), values=write(self.cache.values, new.values))

    def written(self, new: KeyValue, done: Bool[Array, " groups"], pending: Pending) -> KVCache:
        """`filled`, and the step's tokens appended; `pending`: as it is after the step, but for `ran`."""
        zero = jnp.int32(0)
        return self.filled(new, done)._replace(
            positions=lax.dynamic_update_slice(self.cache.positions, self.positions, (zero, self.first)),
            length=self.length,
            pending=pending._replace(ran=jnp.where(done, self.length, self.pending.ran)),
        )

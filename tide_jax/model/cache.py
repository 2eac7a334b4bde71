"""The KV cache: a pytree that layers read and that each forward pass writes once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.attention.span import BLOCK, EVEN_SLOTS, CachedRows, KeyValue
from tide_jax.model.ops import in_order
from tide_jax.model.sharding import constrain_cache


class KVCache(NamedTuple):
    """Keys and values of every layer, and the position of the token in each slot.

    Because slots store positions, a row may have padding anywhere. A query sees a slot if the slot's position is at
    least 0 and not after the query's.

    Attributes:
      keys, values: one array per layer, ``[B, KV, S, hk]`` and ``[B, KV, S, hv]``, keys already rotated. Latent
        attention stores everything in the keys (see `DecoderConfig.cache_shape`).
      positions: ``[B, S]`` int32, the position of the token in each slot, -1 where empty.
      length: number of slots written so far (the same for all rows), int32 scalar; empty slots ahead of the first
        token count as written.
    """

    keys: tuple[Float[Array, "B KV S hk"], ...]
    values: tuple[Float[Array, "B KV S hv"], ...]
    positions: Int[Array, "B S"]
    length: Int[Array, ""]

    @property
    def capacity(self) -> int:
        """Number of slots S."""
        return self.positions.shape[1]

    def layer(self, index: int) -> CachedRows:
        """One layer's keys and values, without a copy."""
        return CachedRows(self.keys[index], self.values[index], self.length)

    def append(self, new: Sequence[KeyValue], positions: Int[Array, "B T"]) -> KVCache:
        """Writes T new slots of every layer (``new[layer].keys [B, KV, T, hk]``) after the last one.

        The caller ensures that ``length + T <= capacity``.
        """
        zero = jnp.int32(0)
        start = (zero, zero, self.length, zero)

        def write(old: Array, rows: Array) -> Array:
            return lax.dynamic_update_slice(old, in_order(rows.astype(old.dtype)), start)

        return KVCache(
            keys=tuple(write(old, rows.keys) for old, rows in zip(self.keys, new, strict=True)),
            values=tuple(write(old, rows.values) for old, rows in zip(self.values, new, strict=True)),
            positions=lax.dynamic_update_slice(self.positions, positions.astype(jnp.int32), (zero, self.length)),
            length=self.length + jnp.int32(positions.shape[1]),
        )


def place_rows(rows: Float[Array, "... W c"], slots: int, at: int) -> Float[Array, "... S c"]:
    """Key or value rows in `slots` slots, from slot `at` on; zeros elsewhere.

    On a CPU, updating a slice of zeros is faster than `jnp.pad`.
    """
    if rows.shape[-2] == slots:
        return rows
    empty = jnp.zeros((*rows.shape[:-2], slots, rows.shape[-1]), rows.dtype)
    return lax.dynamic_update_slice_in_dim(empty, rows, at, axis=rows.ndim - 2)


def newest_positions(cache: KVCache, count: int) -> Int[Array, "B count"]:
    """Positions of the tokens in the newest `count` slots."""
    return lax.dynamic_slice_in_dim(cache.positions, cache.length - count, count, axis=1)


def empty_cache(config: DecoderConfig, batch: int, capacity: int, dtype: DTypeLike, *, ahead: int = 0) -> KVCache:
    """An empty cache of at least `capacity` slots for `batch` rows, on the mesh of ``jax.set_mesh`` if there is one.

    Args:
      ahead: empty slots before the first token; they count as written.
    """
    heads, key_channels, value_channels = config.cache_shape
    slots = ahead + capacity
    if slots > BLOCK:
        slots += -slots % EVEN_SLOTS
    shape, layers = (batch, heads, slots), range(config.num_layers)
    cache = KVCache(
        keys=tuple(jnp.zeros((*shape, key_channels), dtype) for _ in layers),
        values=tuple(jnp.zeros((*shape, value_channels), dtype) for _ in layers),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        length=jnp.int32(ahead),
    )
    return constrain_cache(cache)

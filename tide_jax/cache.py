"""The key-value cache: a pytree that layers read and that is written once per forward pass."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from tide_jax.architecture import DecoderConfig
from tide_jax.attention import KeyValue


class KVCache(NamedTuple):
    """Keys and values of every layer, with the position each slot holds.

    Slots carry positions of their own, so a row may be padded anywhere: a slot is seen where its position is at
    least 0 and not after the query's.

    Attributes:
      keys, values: ``[layers, B, KV, S, hk]`` and ``[layers, B, KV, S, hv]``, keys already rotated. Latent attention
        keeps everything in the keys (see `DecoderConfig.cache_shape`).
      positions: ``[B, S]`` int32, the token position in each slot, -1 where empty.
      length: slots written so far (the same for all rows), int32 scalar.
    """

    keys: Float[Array, "L B KV S hk"]
    values: Float[Array, "L B KV S hv"]
    positions: Int[Array, "B S"]
    length: Int[Array, ""]

    @property
    def capacity(self) -> int:
        """Number of slots S."""
        return self.keys.shape[3]

    def layer(self, index: int) -> KeyValue:
        """One layer's keys and values."""
        return KeyValue(self.keys[index], self.values[index])

    def append(self, new: KeyValue, positions: Int[Array, "B T"]) -> KVCache:
        """Writes T new slots of every layer (``new.keys [L, B, KV, T, hk]``) after the last one.

        The caller sees to it that ``length + T <= capacity``.
        """
        zero = jnp.int32(0)
        start = (zero, zero, zero, self.length, zero)
        return KVCache(
            keys=lax.dynamic_update_slice(self.keys, new.keys.astype(self.keys.dtype), start),
            values=lax.dynamic_update_slice(self.values, new.values.astype(self.values.dtype), start),
            positions=lax.dynamic_update_slice(self.positions, positions.astype(jnp.int32), (zero, self.length)),
            length=self.length + jnp.int32(positions.shape[1]),
        )


def init_cache(config: DecoderConfig, batch: int, capacity: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache of `capacity` slots for `batch` rows."""
    heads, key_channels, value_channels = config.cache_shape
    shape = (config.num_layers, batch, heads, capacity)
    return KVCache(
        keys=jnp.zeros((*shape, key_channels), dtype),
        values=jnp.zeros((*shape, value_channels), dtype),
        positions=jnp.full((batch, capacity), -1, jnp.int32),
        length=jnp.int32(0),
    )

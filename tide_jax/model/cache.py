"""The key-value cache: a pytree that layers read and that is written once per forward pass."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from tide_jax.checks import whole_number
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.attention.span import BLOCK, CachedRows, KeyValue
from tide_jax.model.sharding import constrain_cache

QUEUE_LENGTH = 8
"""Tokens whose deep layers may wait, the newest included: one pass over the weights runs them all."""
EVEN_SLOTS = 128
"""Long caches have a multiple of so many slots: of others XLA makes padded copies on a GPU, at every step and layer."""


class Left(NamedTuple):
    """How the newest Q slots left: what their rows of skipped layers are projected with.

    Attributes:
      exit_layers: index of the last layer each ran, int32; -1 where there is no token.
      code: what translators read of the exit states; R is 0 without translators.
    """

    exit_layers: Int[Array, "B Q"]
    code: Float[Array, "B Q R"]


class Pending(NamedTuple):
    """Tokens that have left, and whose deep keys and values are still to be computed.

    A group of layers always sees to all tokens that wait for it, so what waits for a group is what came after its last
    run: the newest slots, none missing.

    Attributes:
      states: residual stream of the newest Q slots, each after the last group that ran it.
      ran: slots that each group of layers has seen to, int32; never more than the group before.
      left: where groups project the rows of tokens that have left (`tide_jax.exits.deferred_fill`); None where they run
        them (``kv_strategy="recompute"``).
    """

    states: Float[Array, "B Q D"]
    ran: Int[Array, " groups"]
    left: Left | None = None

    @property
    def queue_length(self) -> int:
        """Q, slots held."""
        return self.states.shape[1]

    @property
    def code_size(self) -> int | None:
        """What `init_cache` was told."""
        return None if self.left is None else self.left.code.shape[2]


class KVCache(NamedTuple):
    """Keys and values of every layer, with the position each slot holds.

    Slots carry positions of their own, so a row may be padded anywhere: a slot is seen where its position is at
    least 0 and not after the query's.

    Attributes:
      keys, values: an array for each layer, ``[B, KV, S, hk]`` and ``[B, KV, S, hv]``, keys already rotated. Latent
        attention keeps everything in the keys (see `DecoderConfig.cache_shape`).
      positions: ``[B, S]`` int32, the token position in each slot, -1 where empty.
      length: slots written so far (the same for all rows), int32 scalar. With `pending`, the empty slots in front that
        its window needs count as written, here and in `Pending.ran`.
      pending: slots whose deep layers are yet to run; None where every slot is complete.
    """

    keys: tuple[Float[Array, "B KV S hk"], ...]
    values: tuple[Float[Array, "B KV S hv"], ...]
    positions: Int[Array, "B S"]
    length: Int[Array, ""]
    pending: Pending | None = None

    @property
    def capacity(self) -> int:
        """Number of slots S."""
        return self.positions.shape[1]

    def layer(self, index: int) -> CachedRows:
        """One layer's keys and values, left where they are."""
        return CachedRows(self.keys[index], self.values[index], self.length)

    def append(self, new: KeyValue, positions: Int[Array, "B T"]) -> KVCache:
        """Writes T new slots of every layer (``new.keys [L, B, KV, T, hk]``) after the last one.

        The caller sees to it that ``length + T <= capacity``, and that nothing is pending.
        """
        zero = jnp.int32(0)
        start = (zero, zero, self.length, zero)
        length = self.length + jnp.int32(positions.shape[1])
        pending = self.pending
        if pending is not None:
            pending = pending._replace(ran=jnp.broadcast_to(length, pending.ran.shape))

        def write(old: tuple[Array, ...], rows: Array) -> tuple[Array, ...]:
            return tuple(lax.dynamic_update_slice(a, r.astype(a.dtype), start) for a, r in zip(old, rows, strict=True))

        return KVCache(
            keys=write(self.keys, new.keys),
            values=write(self.values, new.values),
            positions=lax.dynamic_update_slice(self.positions, positions.astype(jnp.int32), (zero, self.length)),
            length=length,
            pending=pending,
        )


def newest_positions(cache: KVCache, count: int) -> Int[Array, "B count"]:
    """Positions that the newest `count` slots hold."""
    return lax.dynamic_slice_in_dim(cache.positions, cache.length - count, count, axis=1)


def init_cache(
    config: DecoderConfig,
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    *,
    pending_groups: int = 0,
    queue_length: int = QUEUE_LENGTH,
    code_size: int | None = None,
) -> KVCache:
    """An empty cache of at least `capacity` slots for `batch` rows; on the mesh of ``jax.set_mesh`` where there is one.

    Args:
      pending_groups: where tokens may wait for deep layers, the number of layer groups (checkpoints and one); 0
        otherwise. `tide_jax.generation.generate.Exits` knows this and `code_size`.
      queue_length: tokens that may wait, the newest included.
      code_size: where rows of skipped layers are projected later (``Exits(deferred=True)``), the translators' rank, 0
        without translators; None where tokens wait to be run (``kv_strategy="recompute"``).

    Raises:
      TideError: a queue of no token.
    """
    heads, key_channels, value_channels = config.cache_shape
    # The newest slots are rewritten when their deep layers run: empty slots ahead of the first keep that window inside.
    ahead, pending = 0, None
    if pending_groups:
        queue_length = whole_number("queue_length", queue_length, 1)
        ahead = queue_length - 1
        states = jnp.zeros((batch, queue_length, config.hidden_size), dtype)
        left = None
        if code_size is not None:
            nowhere = jnp.full((batch, queue_length), -1, jnp.int32)
            left = Left(nowhere, jnp.zeros((batch, queue_length, code_size), dtype))
        pending = Pending(states, jnp.full((pending_groups,), ahead, jnp.int32), left)
    slots = ahead + capacity
    if slots > BLOCK:
        slots += -slots % EVEN_SLOTS
    shape, layers = (batch, heads, slots), range(config.num_layers)
    cache = KVCache(
        keys=tuple(jnp.zeros((*shape, key_channels), dtype) for _ in layers),
        values=tuple(jnp.zeros((*shape, value_channels), dtype) for _ in layers),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        length=jnp.int32(ahead),
        pending=pending,
    )
    return constrain_cache(cache)

"""The KV cache: a pytree that layers read and that each forward pass writes once."""

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
"""Tokens whose deep layers may wait, the newest included; one pass over the weights runs them all."""
EVEN_SLOTS = 128
"""Long caches have a multiple of this many slots.

For other sizes, XLA on a GPU makes padded copies at every step and layer.
"""


class Left(NamedTuple):
    """Inputs for projecting the newest Q slots' keys and values in layers that they skipped.

    Attributes:
      exit_layers: index of the last layer that each slot ran, int32; -1 where there is no token.
      code: exit states, projected to the translators' rank R; R is 0 without translators.
    """

    exit_layers: Int[Array, "B Q"]
    code: Float[Array, "B Q R"]


class Pending(NamedTuple):
    """Tokens that exited and whose deep keys and values are not computed yet.

    A group of layers always processes all tokens that wait for it. So the tokens that wait for a group are those after
    its last run: the newest slots, without gaps.

    Attributes:
      states: residual stream of the newest Q slots, each after the last group that ran it.
      ran: number of slots that each group of layers has processed, int32; never more than the group before.
      left: set if groups project the keys and values of exited tokens (`tide_jax.exits.deferred_fill`); None if groups
        run these tokens (``kv_strategy="recompute"``).
    """

    states: Float[Array, "B Q D"]
    ran: Int[Array, " groups"]
    left: Left | None = None

    @property
    def queue_length(self) -> int:
        """Q, the number of slots held."""
        return self.states.shape[1]

    @property
    def code_size(self) -> int | None:
        """The `code_size` that `init_cache` was called with."""
        return None if self.left is None else self.left.code.shape[2]


class KVCache(NamedTuple):
    """Keys and values of every layer, and the position of the token in each slot.

    Because slots store positions, a row may have padding anywhere. A query sees a slot if the slot's position is at
    least 0 and not after the query's.

    Attributes:
      keys, values: one array per layer, ``[B, KV, S, hk]`` and ``[B, KV, S, hv]``, keys already rotated. Latent
        attention stores everything in the keys (see `DecoderConfig.cache_shape`).
      positions: ``[B, S]`` int32, the position of the token in each slot, -1 where empty.
      length: number of slots written so far (the same for all rows), int32 scalar. With `pending`, the empty slots at
        the front, which its window needs, count as written, here and in `Pending.ran`.
      pending: slots whose deep layers have yet to run; None if every slot is complete.
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
        """One layer's keys and values, without a copy."""
        return CachedRows(self.keys[index], self.values[index], self.length)

    def append(self, new: KeyValue, positions: Int[Array, "B T"]) -> KVCache:
        """Writes T new slots of every layer (``new.keys [L, B, KV, T, hk]``) after the last one.

        The caller ensures that ``length + T <= capacity`` and that nothing is pending.
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
    """Positions of the tokens in the newest `count` slots."""
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
    """An empty cache of at least `capacity` slots for `batch` rows, on the mesh of ``jax.set_mesh`` if there is one.

    Args:
      pending_groups: number of layer groups (checkpoints plus one) if tokens may wait for deep layers, otherwise 0.
        `tide_jax.generation.generate.Exits` has this value and `code_size`.
      queue_length: number of tokens that may wait, the newest included.
      code_size: if keys and values of skipped layers are projected later (``Exits(deferred=True)``), the rank of the
        translators, or 0 without translators. None if tokens wait to be run (``kv_strategy="recompute"``).

    Raises:
      TideError: `queue_length` is less than 1.
    """
    heads, key_channels, value_channels = config.cache_shape
    # The window of the newest slots is rewritten when their deep layers run. Empty slots before the first token keep
    # the window inside the cache.
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

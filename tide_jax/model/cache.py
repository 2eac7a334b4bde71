"""The cache: a pytree of keys, values and states that layers read and that each forward pass writes once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.attention.span import BLOCK, EVEN_SLOTS, CachedRows, KeyValue
from tide_jax.model.layers import DecoderLayer
from tide_jax.model.memory import Cached, Memory, New, Rows, SideBySide, by_part
from tide_jax.model.ops import in_order
from tide_jax.model.recurrent.mixer import State, empty_state
from tide_jax.model.recurrent.order import TokenOrder
from tide_jax.model.recurrent.types import RecurrentType
from tide_jax.model.sharding import constrain_cache


class KVCache(NamedTuple):
    """What every layer keeps of earlier tokens, and the position of the token in each slot.

    Because slots store positions, a row may have padding anywhere. A query sees a slot if the slot's position is at
    least 0 and not after the query's.

    Attributes:
      layers: for each layer, keys and values, ``[B, KV, S, hk]`` and ``[B, KV, S, hv]``, keys already rotated; or its
        state after the tokens so far, which has no slots; or both. Latent attention stores everything in the keys (see
        `DecoderConfig.cache_shape`).
      positions: ``[B, S]`` int32, the position of the token in each slot, -1 where empty.
      length: number of slots written so far (the same for all rows), int32 scalar; empty slots ahead of the first
        token count as written.
    """

    layers: tuple[Memory, ...]
    positions: Int[Array, "B S"]
    length: Int[Array, ""]

    @property
    def capacity(self) -> int:
        """Number of slots S."""
        return self.positions.shape[1]

    def layer(self, index: int) -> Cached:
        """One layer's part, without a copy."""
        return by_part(self.layers[index], slots=lambda kv: CachedRows(*kv, self.length), state=lambda state: state)

    def append(
        self,
        new: Sequence[New],
        positions: Int[Array, "B T"],
        layers: Sequence[DecoderLayer],
        *,
        counts: Sequence[Bool[Array, ""]] | None = None,
    ) -> KVCache:
        """Writes T new slots after the last one. States take in the tokens with a position.

        The caller ensures that ``length + T <= capacity``.

        Args:
          new: what each layer keeps of the tokens; states among it have taken in all of them.
          positions: of the tokens, -1 for slots without one.
          layers: the model's layers.
          counts: for each layer, whether its state takes in the tokens; all do if omitted.
        """
        zero = jnp.int32(0)
        order = TokenOrder.of(positions >= 0)
        orders = [order] * len(self.layers) if counts is None else [order.only_if(c) for c in counts]
        grown = zip(layers, self.layers, new, orders, strict=True)
        return KVCache(
            layers=tuple(_append(layer, memory, rows, self.length, order) for layer, memory, rows, order in grown),
            positions=lax.dynamic_update_slice(self.positions, positions.astype(jnp.int32), (zero, self.length)),
            length=self.length + jnp.int32(positions.shape[1]),
        )

    def rolled_back(self, before: KVCache) -> KVCache:
        """The cache `before` some tokens were appended, in the memory of the present one.

        Slots written since count as empty.
        """
        layers = tuple(
            by_part(old, new, slots=lambda old, new: new, state=lambda old, new: old)
            for old, new in zip(before.layers, self.layers, strict=True)
        )
        return KVCache(layers, before.positions, before.length)


def _append(layer: DecoderLayer, memory: Memory, new: New, start: Int[Array, ""], order: TokenOrder) -> Memory:
    return by_part(
        memory,
        new,
        slots=lambda kv, rows: write_slots(kv, rows, start),
        state=lambda state, taken: taken if isinstance(taken, State) else advance(layer, state, taken, order),
    )


def advance(layer: DecoderLayer, state: State, inputs: Float[Array, "B T _"], order: TokenOrder) -> State:
    """A layer's state after it took in the real tokens' inputs."""
    return state if layer.recurrent is None else layer.recurrent.advance(state, inputs, order)


def write_slots(memory: KeyValue, rows: KeyValue, start: Int[Array, ""]) -> KeyValue:
    """Keys and values with the slots from `start` on written."""
    zero = jnp.int32(0)
    written = (
        lax.dynamic_update_slice(old, in_order(new.astype(old.dtype)), (zero, zero, start, zero))
        for old, new in zip(memory, rows, strict=True)
    )
    return KeyValue(*written)


def only_slots(rows: Sequence[Rows], kept: Bool[Array, "B T"]) -> tuple[Rows, ...]:
    """Each layer's rows, zeros for the slots that are not kept."""

    def keep(a: Array) -> Array:
        mask = kept.reshape(kept.shape[0], *(1,) * (a.ndim - 3), kept.shape[1], 1)
        return jnp.where(mask, a, jnp.zeros_like(a))

    return jax.tree.map(keep, tuple(rows))


def place_rows(rows: Float[Array, "... W c"], slots: int, at: int) -> Float[Array, "... S c"]:
    """Rows of one kind in `slots` slots, from slot `at` on; zeros elsewhere.

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
    slots = ahead + capacity
    if slots > BLOCK:
        slots += -slots % EVEN_SLOTS
    cache = KVCache(
        layers=tuple(_empty_memory(config, layer, batch, slots, dtype) for layer in range(config.num_layers)),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        length=jnp.int32(ahead),
    )
    return constrain_cache(cache)


def _empty_memory(config: DecoderConfig, layer: int, batch: int, slots: int, dtype: DTypeLike) -> Memory:
    kind, beside = config.layer_type(layer), config.recurrent_beside(layer)
    if isinstance(kind, RecurrentType):
        return empty_state(kind.sizes(config.hidden_size), batch, dtype)
    heads, *channels = config.cache_shape
    empty = KeyValue(*(jnp.zeros((batch, heads, slots, c), dtype) for c in channels))
    return empty if beside is None else SideBySide(empty, empty_state(beside.sizes(config.hidden_size), batch, dtype))

"""The newest Q cache slots, and which layer groups still have to process them.

A token that exits skips its deep layers. They need only its exit state, so the queue keeps that until a later token
runs these layers, or until the queue is full. Then "recompute" runs the layers (`tide_jax.exits.recompute`), and
deferred "propagate" projects their cache rows (`tide_jax.exits.deferred_fill`).

A group always processes all slots that wait for it. So the slots waiting for a group are exactly those written after
its last run: a contiguous range at the end of the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from tide_jax.checks import whole_number
from tide_jax.errors import TideError
from tide_jax.exits.exits import Exits
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.attention.span import KeyValue
from tide_jax.model.cache import KVCache, advance, empty_cache, newest_positions, write_slots
from tide_jax.model.layers import DecoderLayer
from tide_jax.model.memory import New, Rows, by_part
from tide_jax.model.recurrent.order import TokenOrder

QUEUE_LENGTH = 8
"""Tokens whose deep layers may wait, the newest included; one pass over the weights runs them all."""


class Pending(NamedTuple):
    """Tokens that exited and whose deep keys and values are not computed yet.

    Attributes:
      states: residual stream of the newest Q slots, with what it carries, each after the last group that ran it.
      ran: number of slots that each group of layers has processed, int32; never more than the group before.
      exit_layers: index of the last layer that each slot ran, int32, -1 where there is no token; None if groups run
        waiting tokens (``kv_strategy="recompute"``) and need no projection.
      code: exit states, projected to the translators' rank R (0 without translators); None as for `exit_layers`.
    """

    states: Float[Array, "B Q S"]
    ran: Int[Array, " groups"]
    exit_layers: Int[Array, "B Q"] | None = None
    code: Float[Array, "B Q R"] | None = None

    @property
    def queue_length(self) -> int:
        """Q, the number of slots held."""
        return self.states.shape[1]

    @property
    def code_size(self) -> int | None:
        """Size of the translators' code; None where tokens wait for their layers to run."""
        return None if self.code is None else self.code.shape[2]


class QueuedCache(NamedTuple):
    """A cache whose newest slots may wait for deep layers.

    Attributes:
      kv: keys, values and states; Q - 1 empty slots lie ahead of the first token, so that the newest Q slots always
        exist.
      pending: what the waiting slots need.
    """

    kv: KVCache
    pending: Pending

    def append(self, new: Sequence[New], positions: Int[Array, "B T"], layers: Sequence[DecoderLayer]) -> QueuedCache:
        """`KVCache.append` for slots that have run all layers; nothing may wait."""
        kv = self.kv.append(new, positions, layers)
        return QueuedCache(kv, self.pending._replace(ran=jnp.broadcast_to(kv.length, self.pending.ran.shape)))


AnyCache = KVCache | QueuedCache
"""The cache that `init_cache` makes for given exits."""


class Queue(NamedTuple):
    """The newest Q cache slots during a decode step, the step's own token included.

    Attributes:
      cache: the cache before the step.
      groups: the layer groups of `Pending.ran`.
      positions: positions of the Q slots, -1 for empty slots.
    """

    cache: QueuedCache
    groups: tuple[range, ...]
    positions: Int[Array, "B Q"]

    @classmethod
    def start(cls, cache: QueuedCache, groups: tuple[range, ...], positions: Int[Array, "B 1"]) -> Queue:
        """The queue after adding one token to each row, at the given positions."""
        earlier = newest_positions(cache.kv, cache.pending.queue_length - 1)
        return cls(cache, groups, jnp.concatenate([earlier, positions], axis=1))

    @property
    def pending(self) -> Pending:
        """Pending tokens of the cache."""
        return self.cache.pending

    @property
    def length(self) -> Int[Array, ""]:
        """Cache slots in use after the step."""
        return self.cache.kv.length + 1

    @property
    def first(self) -> Int[Array, ""]:
        """Index of the queue's first slot in the cache."""
        return self.length - self.positions.shape[1]

    @property
    def full(self) -> Bool[Array, ""]:
        """Whether the last group has to process its waiting slots in this step: the next step would drop one."""
        return self.length - self.pending.ran[-1] >= self.positions.shape[1]

    def count_waiting(self, group: Int[Array, ""]) -> Int[Array, ""]:
        """Number of slots that wait for a group, the step's own included."""
        return self.length - self.pending.ran[group]

    def waiting_slots(self, g: int) -> Bool[Array, "1 Q"]:
        """Slots that wait for group `g`, the step's own included."""
        return self._after(self.pending.ran[g][None])

    def without_waiting(self, g: int) -> KVCache:
        """The cache with the slots that group `g` has not processed marked empty."""
        kv = self.cache.kv
        slots = jnp.arange(kv.capacity, dtype=jnp.int32)[None]
        return kv._replace(positions=jnp.where(slots < self.pending.ran[g], kv.positions, -1))

    def write_rows(
        self,
        new: Sequence[Rows],
        done: Bool[Array, " groups"],
        layers: Sequence[DecoderLayer],
        *,
        own: bool = True,
    ) -> KVCache:
        """The cache with the rows of waiting slots written, or taken in by states.

        Args:
          new: rows of the queue's slots, for each layer.
          done: groups whose rows `new` holds.
          layers: the model's layers.
          own: whether states take in the step's own tokens, too.
        """
        # Only slots that waited for a group of `done` get new rows; all others keep theirs.
        fresh = self._after(self.pending.ran) & done[:, None]
        slots = jnp.arange(self.positions.shape[1], dtype=jnp.int32)[None]
        there = (self.positions >= 0) & (own | (slots < self.positions.shape[1] - 1))
        kv, written = self.cache.kv, []
        for g, group in enumerate(self.groups):
            write = functools.partial(self._write_slots, fresh=fresh[g])
            order = TokenOrder.of(there & fresh[g][None])
            for i in group:
                take_in = functools.partial(advance, layers[i], order=order)
                written.append(by_part(kv.layers[i], new[i], slots=write, state=take_in))
        return kv._replace(layers=tuple(written))

    def _write_slots(self, memory: KeyValue, rows: KeyValue, fresh: Bool[Array, " Q"]) -> KeyValue:
        """Writes the fresh rows of the queue's slots, and what is there in the others."""
        kept = memory.slots(self.first, self.positions.shape[1])
        mask = fresh[None, None, :, None]
        merged = jax.tree.map(lambda a, b: jnp.where(mask, a.astype(b.dtype), b), rows, kept)
        return write_slots(memory, merged, self.first)

    def write_step(
        self,
        new: Sequence[Rows],
        done: Bool[Array, " groups"],
        layers: Sequence[DecoderLayer],
        states: Float[Array, "B Q S"],
    ) -> QueuedCache:
        """Writes rows like `write_rows` and appends the step's tokens.

        Args:
          new, done, layers: as in `write_rows`.
          states: residual stream of the queue's slots, each after the last group that ran it.
        """
        zero, pending = jnp.int32(0), self.pending
        kv = self.write_rows(new, done, layers)._replace(
            positions=lax.dynamic_update_slice(self.cache.kv.positions, self.positions, (zero, self.first)),
            length=self.length,
        )
        ran = jnp.where(done, self.length, pending.ran)
        return QueuedCache(kv, pending._replace(states=states.astype(pending.states.dtype), ran=ran))

    def _after(self, ran: Int[Array, " n"]) -> Bool[Array, "n Q"]:
        """For each count in `ran`, the queue's slots at or beyond that many cache slots."""
        return (self.first + jnp.arange(self.positions.shape[1], dtype=jnp.int32))[None] >= ran[:, None]


def init_cache(
    config: DecoderConfig,
    batch: int,
    capacity: int,
    dtype: DTypeLike,
    *,
    exits: Exits | None = None,
    queue_length: int = QUEUE_LENGTH,
) -> AnyCache:
    """An empty cache of at least `capacity` slots for `batch` rows, on the mesh of ``jax.set_mesh`` if there is one.

    Args:
      exits: the exits to decode with; where their tokens wait for deep layers, the cache has a queue.
      queue_length: number of tokens that may wait, the newest included.

    Raises:
      TideError: `queue_length` is less than 1.
    """
    queue_length = whole_number("queue_length", queue_length, 1)
    if exits is None or not exits.queues:
        return empty_cache(config, batch, capacity, dtype)
    # The newest slots are rewritten when their deep layers run. Empty slots before the first token keep them inside.
    ahead, groups = queue_length - 1, len(exits.routers.exit_points) + 1
    states = jnp.zeros((batch, queue_length, config.stream_size), dtype)
    pending = Pending(states, jnp.full((groups,), ahead, jnp.int32))
    if exits.projects_later:
        nowhere = jnp.full((batch, queue_length), -1, jnp.int32)
        pending = pending._replace(exit_layers=nowhere, code=jnp.zeros((batch, queue_length, exits.code_size), dtype))
    return QueuedCache(empty_cache(config, batch, capacity, dtype, ahead=ahead), pending)


def check_cache(cache: AnyCache, exits: Exits | None) -> None:
    """Raises TideError unless a cache was made for these exits."""
    fits = isinstance(cache, QueuedCache) == (exits is not None and exits.queues)
    if fits and isinstance(cache, QueuedCache) and exits is not None:
        code_size = exits.code_size if exits.projects_later else None
        found = len(cache.pending.ran), cache.pending.code_size
        fits = found == (len(exits.routers.exit_points) + 1, code_size)
    if not fits:
        raise TideError(
            "the cache was made for other exits: tokens wait in it in another way, or not at all; make it with "
            "init_cache(..., exits=exits) for the exits of the step"
        )


def keys_and_values(cache: AnyCache) -> KVCache:
    """The keys and values of a cache of either kind."""
    return cache.kv if isinstance(cache, QueuedCache) else cache


def pass_widths(most: int) -> tuple[int, ...]:
    """Numbers of slots that passes are compiled for: 1 is the usual case, and 2 cost less than `most`.

    >>> pass_widths(8), pass_widths(1)
    ((1, 2, 8), (1,))
    """
    return tuple(sorted({1, min(2, most), most}))


def pass_number(needed: Int[Array, "..."], most: int) -> Int[Array, "..."]:
    """Index into `pass_widths` of the smallest width that holds `needed` slots."""
    number = jnp.zeros_like(needed)
    for width in pass_widths(most)[:-1]:
        number += (needed > width).astype(number.dtype)
    return number

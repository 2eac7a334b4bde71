"""A uniform sample of hidden states in bounded memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float16, Int

Allocate = Callable[[str, tuple[int, ...], Any], np.ndarray]
"""Allocates an array from a name, shape and dtype; its initial content does not matter."""


class Reservoir:
    """Reservoir sampling (Vitter 1985, algorithm R) of tokens with their states at every exit point.

    The choice of kept tokens and their slots depends only on the number of tokens and the seed. `offer` makes it before
    any state is known; `put` stores the states later, in any order, and repeatedly if needed.

    States are stored RMS-normed in float16. Routers and exit heads read normed states, and their range fits float16,
    unlike that of the raw residual stream.

    Args:
      capacity: most tokens kept.
      exit_points: number of exit points C.
      size: hidden size D.
      seed: determines which tokens are kept.
      allocate: allocates the three arrays; by default in memory.
    """

    def __init__(
        self, capacity: int, exit_points: int, size: int, *, seed: int, allocate: Allocate | None = None
    ) -> None:
        allocate = allocate or (lambda _, shape, dtype: np.empty(shape, dtype))
        self._states = allocate("states", (exit_points, capacity, size), np.float16)
        self._last = allocate("last", (capacity, size), np.float16)
        self._targets = allocate("targets", (capacity,), np.int32)
        self._rng = np.random.default_rng(seed)
        self.seen = 0

    @staticmethod
    def bytes_per_token(exit_points: int, size: int) -> int:
        """Bytes of memory for each kept token."""
        return 2 * size * (exit_points + 1) + 4

    def offer(self, count: int) -> Int[np.ndarray, " N"]:
        """Offers `count` more tokens; returns the slot of each, -1 for tokens that are not kept.

        No slot is returned twice by one call, but a slot of an earlier call may be returned again.
        """
        # Algorithm R: the first tokens fill the slots in order. A later token i draws from 0..i, and replaces the token
        # in that slot, if there is such a slot.
        index, capacity = self.seen + np.arange(count), len(self._targets)
        drawn = np.where(index < capacity, index, (self._rng.random(count) * (index + 1)).astype(np.int64))
        kept = np.flatnonzero(drawn < capacity)
        # A slot drawn twice goes to its later token.
        _, final = np.unique(drawn[kept][::-1], return_index=True)
        kept = kept[::-1][final]
        slots = np.full(count, -1)
        slots[kept] = drawn[kept]
        self.seen += count
        return slots

    def put(
        self,
        slots: Int[np.ndarray, " N"],
        states: Float16[np.ndarray, "C N D"],
        last: Float16[np.ndarray, "N D"],
        targets: Int[np.ndarray, " N"],
    ) -> None:
        """Stores tokens in slots: states at the exit points and after the last layer, and the full model's argmax."""
        self._states[:, slots] = states
        self._last[slots] = last
        self._targets[slots] = targets

    def checksum(self, slots: Int[np.ndarray, " N"], start: int = 0) -> int:
        """CRC-32 of the content of the slots, continued from `start`."""
        for array in (self._states.swapaxes(0, 1), self._last, self._targets):
            start = zlib.crc32(np.ascontiguousarray(array[slots]), start)
        return start

    def add(
        self,
        states: Float16[np.ndarray, "C N D"],
        last: Float16[np.ndarray, "N D"],
        targets: Int[np.ndarray, " N"],
    ) -> None:
        """Offers tokens together with their states, and stores those that are kept."""
        slots = self.offer(len(targets))
        kept = np.flatnonzero(slots >= 0)
        self.put(slots[kept], states[:, kept], last[kept], targets[kept])

    def __len__(self) -> int:
        return min(self.seen, len(self._targets))

    @property
    def states(self) -> Float16[np.ndarray, "C N D"]:
        """States of the kept tokens at every exit point."""
        return self._states[:, : len(self)]

    @property
    def last(self) -> Float16[np.ndarray, "N D"]:
        """States of the kept tokens after the last layer."""
        return self._last[: len(self)]

    @property
    def targets(self) -> Int[np.ndarray, " N"]:
        """The full model's argmax after each kept token."""
        return self._targets[: len(self)]

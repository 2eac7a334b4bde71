"""A uniform sample of hidden states in bounded memory, taken in one pass over the text."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float16, Int


class Reservoir:
    """Reservoir sampling (Vitter 1985, algorithm R) of tokens with their states at every checkpoint.

    States are kept RMS-normed in float16: that is what routers and exit heads read, and its range is small, which the
    raw residual stream's is not.

    Args:
      capacity: tokens kept at the most.
      checkpoints: number of checkpoints C.
      size: hidden size D.
      seed: which tokens are kept follows from it.
    """

    def __init__(self, capacity: int, checkpoints: int, size: int, *, seed: int) -> None:
        self._states = np.empty((checkpoints, capacity, size), np.float16)
        self._last = np.empty((capacity, size), np.float16)
        self._targets = np.empty((capacity,), np.int32)
        self._rng = np.random.default_rng(seed)
        self.seen = 0

    @staticmethod
    def bytes_per_token(checkpoints: int, size: int) -> int:
        """Memory one kept token takes."""
        return 2 * size * (checkpoints + 1) + 4

    def add(
        self,
        states: Float16[np.ndarray, "C N D"],
        last: Float16[np.ndarray, "N D"],
        targets: Int[np.ndarray, " N"],
    ) -> None:
        """Offers N tokens: states at the checkpoints, at the last layer, and the full model's argmax."""
        index = self.seen + np.arange(len(targets))
        capacity = len(self._targets)
        slots = np.where(index < capacity, index, (self._rng.random(len(index)) * (index + 1)).astype(np.int64))
        kept = np.flatnonzero(slots < capacity)
        # A slot drawn twice keeps its later token; dropping the earlier one keeps the three arrays in step.
        _, final = np.unique(slots[kept][::-1], return_index=True)
        kept = kept[::-1][final]
        self._states[:, slots[kept]] = states[:, kept]
        self._last[slots[kept]] = last[kept]
        self._targets[slots[kept]] = targets[kept]
        self.seen += len(targets)

    def __len__(self) -> int:
        return min(self.seen, len(self._targets))

    @property
    def states(self) -> Float16[np.ndarray, "C N D"]:
        """States at every checkpoint of the kept tokens."""
        return self._states[:, : len(self)]

    @property
    def last(self) -> Float16[np.ndarray, "N D"]:
        """States after the last layer."""
        return self._last[: len(self)]

    @property
    def targets(self) -> Int[np.ndarray, " N"]:
        """The full model's argmax."""
        return self._targets[: len(self)]

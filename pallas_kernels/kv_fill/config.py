"""Programs of the cache fill: one for each token, with the keys and values of all heads."""

from __future__ import annotations


def warps(numbers: int) -> int:
    """Warps of a program with this many key numbers: about 32 per thread. Not measured on a GPU yet."""
    return max(1, min(16, numbers // 1024))

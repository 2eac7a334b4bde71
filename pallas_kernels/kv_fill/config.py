"""How the cache fill is cut into programs: one for each token, with its keys and values of all heads."""

from __future__ import annotations


def warps(numbers: int) -> int:
    """Warps of a program with so many numbers of keys: some 32 for each thread. Not measured on a GPU yet."""
    return max(1, min(16, numbers // 1024))

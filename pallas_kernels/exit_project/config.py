"""Programs of the exit projection: one for each row, with the whole row in registers."""

from __future__ import annotations


def warps(columns: int) -> int:
    """Warps of a program with this many channels: about 32 numbers per thread. Not measured on a GPU yet."""
    return max(1, min(16, columns // 1024))

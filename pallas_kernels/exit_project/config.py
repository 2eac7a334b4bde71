"""How the exit projection is cut into programs: one for each row, the whole row in registers."""

from __future__ import annotations


def warps(columns: int) -> int:
    """Warps of a program with so many channels: some 32 numbers for each thread. Not measured on a GPU yet."""
    return max(1, min(16, columns // 1024))

"""Block sizes of the compaction kernels. Not measured on a GPU yet."""

from __future__ import annotations

from pallas_kernels.common import power_of_two

_WIDEST = 4096


def block(columns: int) -> int:
    """Number of channels that one program copies, a power of two."""
    return min(_WIDEST, power_of_two(columns))


def warps(columns: int) -> int:
    """Warps of a program that copies this many channels: 8 channels per thread, 16 bytes of 16-bit floats."""
    return max(1, min(8, columns // 256))

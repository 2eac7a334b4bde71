"""Block sizes and grids of the exit step's programs."""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels.exit_step.shapes import Problem, power_of_two
from pallas_kernels.gpu import Gpu


class Blocks(NamedTuple):
    """The grid and its programs.

    Attributes:
      rows: rows per program.
      columns: channels that a program multiplies at once.
      splits: number of programs that share a block of rows, each with its own channels; with 1, the same program also
        decides.
      warps: warps per program.
    """

    rows: int
    columns: int
    splits: int
    warps: int = 4


MEASURED: dict[tuple[str, str, str, int, int], Blocks] = {}
"""The fastest blocks measured on a GPU; empty, because no GPU has been measured.

Keys: architecture, dtype, norm, channels, and number of blocks of 16 rows (a power of two).
"""


_PARTS = 1 << 14
"""Numbers that fit into the program that sums a row's parts."""


def choose_blocks(problem: Problem, gpu: Gpu) -> Blocks:
    """The measured blocks, or a guess if there are none."""
    tiles = -(-problem.rows // 16)
    key = (gpu.architecture, problem.dtype.name, problem.norm, problem.size, power_of_two(tiles))
    return MEASURED.get(key) or _guess(problem, gpu)


def _guess(problem: Problem, gpu: Gpu) -> Blocks:
    """Enough programs to keep every multiprocessor busy, with the largest blocks that this and the registers allow.

    With few rows most multiprocessors would be idle, so the channels are split. With many rows the blocks are taller,
    because every program reads the whole router.
    """
    tall, columns, warps = _tallest(problem)
    if problem.rows < tall * gpu.multiprocessors:
        tall, warps = 16, 4
    row_blocks, tiles = -(-problem.rows // tall), -(-problem.size // columns)
    # As many splits as there are idle multiprocessors, up to the limit of the summing program, in equal shares.
    wanted = max(1, min(tiles, gpu.multiprocessors // row_blocks, _PARTS // problem.padded_hidden))
    return Blocks(tall, columns, splits=-(-tiles // -(-tiles // wanted)), warps=warps)


def _tallest(problem: Problem) -> tuple[int, int, int]:
    """Rows, columns and warps for which the compiler has enough registers, on compute capability 8.0 and 9.0."""
    wide = problem.padded_hidden > 128
    if problem.weight_parts == 0:
        return (16 if wide else 32), 32, 4
    return (32, 32, 4) if wide else (64, 64, 8)

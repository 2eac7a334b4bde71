"""How the exit step is cut into programs."""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels.exit_step.shapes import Problem, power_of_two
from pallas_kernels.gpu import Gpu


class Blocks(NamedTuple):
    """The grid and its programs.

    Attributes:
      rows: rows of a program.
      columns: channels that it multiplies at once.
      splits: programs that share a block of rows, each with channels of its own; 1 decides in the same program.
      warps: warps of a program.
    """

    rows: int
    columns: int
    splits: int
    warps: int = 4


MEASURED: dict[tuple[str, str, str, int, int], Blocks] = {}
"""What a GPU was measured to run fastest, by architecture, dtype, norm, channels and blocks of 16 rows (a power of
two). Empty: no GPU has been measured."""


_PARTS = 1 << 14
"""Numbers that the program adding up a row's parts can hold."""


def choose_blocks(problem: Problem, gpu: Gpu) -> Blocks:
    """The measured blocks where there are some, else a guess."""
    tiles = -(-problem.rows // 16)
    key = (gpu.architecture, problem.dtype.name, problem.norm, problem.size, power_of_two(tiles))
    return MEASURED.get(key) or _guess(problem, gpu)


def _guess(problem: Problem, gpu: Gpu) -> Blocks:
    """Enough programs to keep every multiprocessor busy, and blocks no larger than that and the registers allow.

    Few rows leave most multiprocessors idle, so their channels are split. Many rows use taller blocks, since every
    program reads the whole router.
    """
    tall, columns, warps = _tallest(problem)
    if problem.rows < tall * gpu.multiprocessors:
        tall, warps = 16, 4
    row_blocks, tiles = -(-problem.rows // tall), -(-problem.size // columns)
    wanted = max(1, min(tiles, gpu.multiprocessors // row_blocks, _PARTS // problem.padded_hidden))
    return Blocks(tall, columns, splits=-(-tiles // -(-tiles // wanted)), warps=warps)


def _tallest(problem: Problem) -> tuple[int, int, int]:
    """Rows, columns and warps that the compiler finds registers for, on compute capability 8.0 and 9.0."""
    wide = problem.padded_hidden > 128
    if problem.weight_parts == 0:
        return (16 if wide else 32), 32, 4
    return (32, 32, 4) if wide else (64, 64, 8)

"""Reads XLA's compiled program for a GPU or a TPU: large results in its HLO, and its launches."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Set
from typing import NamedTuple

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_MOVES = {"copy-done", "slice-done"}  # their results are found where they were made
_COPIES = {"copy", "transpose", "reshape", "slice", "dynamic-slice", "concatenate", "pad", "convert", "copy-done"}
_SCALING = {"multiply", "broadcast"}
_EXCHANGED = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
_EXCHANGES = {*_EXCHANGED, *(f"{name}-start" for name in _EXCHANGED)}
_FLOATS = re.compile(r"b?f\d")
_ON_CHIP = re.compile(r"S\(\d+\)")
_CALLED = re.compile(r"calls=%?([\w.\-]+)")
KERNELS = ("kCustomKernel", "kKernel")
"""Names of kernels among launches."""
_THUNK = re.compile(r"^\s*\d+: (k\w+)")
# Their results are made elsewhere, or are other names for existing arrays.
_NO_WORK = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "constant"}


class LargeResult(NamedTuple):
    """An array that a step writes.

    Attributes:
      kind: the operation; for a fusion, all its operations.
      shape: as HLO writes it.
      size: bytes.
    """

    kind: str
    shape: str
    size: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of its axes."""
        return tuple(map(int, filter(None, self.shape.partition("[")[2].rstrip("]").split(","))))


class _Array(NamedTuple):
    shape: str
    numbers: int
    size: int
    on_chip: bool


class _Instruction(NamedTuple):
    root: bool
    result: str
    operation: str
    fused: str | None


def large_results(hlo: str, limit: int) -> list[LargeResult]:
    """Finds arrays of at least `limit` bytes that the program writes, which include copies of weights or of the cache.

    Arrays written in place (an update of a slice) don't count. Neither do a TPU's prefetches into memory on the chip.
    """
    return [
        LargeResult(kind, array.shape, array.size)
        for kind, array in _written(hlo)
        if array.size >= limit and not array.on_chip
    ]


def float_copies(hlo: str, counts: Set[int]) -> list[LargeResult]:
    """Finds arrays of floats, in any memory, with as many numbers as a matrix of integers.

    Args:
      counts: numbers of elements of the integer matrices.
    """
    return [
        LargeResult(kind, array.shape, array.size)
        for kind, array in _written(hlo)
        if array.numbers in counts and _FLOATS.match(array.shape) and kind not in _MOVES
    ]


def moves_only(result: LargeResult, *, scaled: bool = False) -> bool:
    """Whether an array is another array's numbers in another place, order or format; with `scaled`, perhaps scaled."""
    return set(result.kind.split("+")) <= (_COPIES | _SCALING if scaled else _COPIES)


def collectives(hlo: str) -> Counter[str]:
    """Counts the exchanges between devices, by operation."""
    found = (match[4] for match in map(_INSTRUCTION.match, hlo.splitlines()) if match)
    return Counter(operation.removesuffix("-start") for operation in found if operation in _EXCHANGES)


def launches(thunks: str) -> Counter[str]:
    """Counts each kind of launch in a dumped thunk sequence: kernels, copies, command buffers, loops."""
    return Counter(match[1] for match in map(_THUNK.match, thunks.splitlines()) if match)


def largest_graph(thunks: str) -> int:
    """Counts the kernels of the CUDA graph with the most of them, in a dumped thunk sequence."""
    sizes, inside = [0], -1
    for line in thunks.splitlines():
        depth, match = len(line) - len(line.lstrip()), _THUNK.match(line)
        if match is None:
            continue
        if depth <= inside:
            inside = -1
        if match[1] == "kCommandBuffer" and inside < 0:
            inside = depth
            sizes.append(0)
        elif inside >= 0 and match[1] in KERNELS:
            sizes[-1] += 1
    return max(sizes)


def _written(hlo: str) -> Iterator[tuple[str, _Array]]:
    computations = _computations(hlo)
    fused = {i.fused for instructions in computations.values() for i in instructions if i.operation == "fusion"}
    for name, instructions in computations.items():
        for instruction in instructions:
            # A "-start" operation's result is reported at its "-done".
            if name in fused or instruction.operation in _NO_WORK or instruction.operation.endswith("-start"):
                continue
            inside = computations.get(instruction.fused or "", [])
            if _in_place(instruction, inside):
                continue
            kind = "+".join(dict.fromkeys(i.operation for i in inside if i.operation not in _NO_WORK))
            for array in _arrays(instruction.result):
                yield kind or instruction.operation, array


def _computations(hlo: str) -> dict[str, list[_Instruction]]:
    found: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = found.setdefault(header[1], [])
        elif match := _INSTRUCTION.match(line):
            root, _, result, operation, rest = match.groups()
            called = _CALLED.search(rest)
            current.append(_Instruction(bool(root), result, operation, called[1] if called else None))
    return found


def _in_place(instruction: _Instruction, inside: list[_Instruction]) -> bool:
    update = "dynamic-update-slice"
    return instruction.operation == update or any(i.operation == update for i in inside)


def _arrays(result: str) -> Iterator[_Array]:
    for match in _ARRAY.finditer(result):
        count = math.prod(map(int, filter(None, match[3].split(","))))
        on_chip = _ON_CHIP.search(match[4] or "") is not None
        yield _Array(f"{match[1]}[{match[3]}]", count, count * _bytes(match), on_chip)


def _bytes(match: re.Match[str]) -> int:
    return max(1, int(match[2] or 8) // 8)

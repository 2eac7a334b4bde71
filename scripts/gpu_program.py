"""Reads what XLA made of a program for a GPU: large results in its HLO, and what is launched."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import NamedTuple

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"calls=%?([\w.\-]+)")
_THUNK = re.compile(r"^\s*\d+: (k\w+)")
# Their results are made elsewhere, or are other names for what there is.
_NO_WORK = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "constant"}


class LargeResult(NamedTuple):
    """An array that a step writes.

    Attributes:
      kind: the operation; for a fusion, all that it does.
      shape: as HLO writes it.
      size: bytes.
    """

    kind: str
    shape: str
    size: int


class _Instruction(NamedTuple):
    root: bool
    result: str
    operation: str
    fused: str | None


def large_results(hlo: str, limit: int) -> list[LargeResult]:
    """Arrays of at least `limit` bytes that the program writes, but for those that are written into where they lie (an
    update of a slice): copies of weights or of the cache are among them."""
    computations = _computations(hlo)
    fused = {i.fused for instructions in computations.values() for i in instructions if i.operation == "fusion"}
    found = []
    for name, instructions in computations.items():
        for instruction in instructions:
            if name in fused or instruction.operation in _NO_WORK:
                continue
            inside = computations.get(instruction.fused or "", [])
            if _in_place(instruction, inside):
                continue
            kind = "+".join(dict.fromkeys(i.operation for i in inside if i.operation not in _NO_WORK))
            for shape, size in _arrays(instruction.result):
                if size >= limit:
                    found.append(LargeResult(kind or instruction.operation, shape, size))
    return found


def launches(thunks: str) -> Counter[str]:
    """How often each kind of launch stands in a dumped thunk sequence: kernels, copies, command buffers, loops."""
    return Counter(match[1] for match in map(_THUNK.match, thunks.splitlines()) if match)


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


def _arrays(result: str) -> list[tuple[str, int]]:
    return [(m[0], math.prod(map(int, filter(None, m[3].split(",")))) * _bytes(m)) for m in _ARRAY.finditer(result)]


def _bytes(match: re.Match[str]) -> int:
    return max(1, int(match[2] or 8) // 8)

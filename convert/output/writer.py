"""Writes safetensors shards in place, a piece of a tensor at a time.

Shard files get their full size before any weight is read, and each source tensor is written directly into its slots. So
memory holds one source tensor and one block, even for large parameters that many tensors share.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from convert.weights.rules import Slot
from tide_jax.model.files.shards import DTYPES, INDEX_FILE, SINGLE_FILE, cast_in_range

_BLOCK_BYTES = 32 * 2**20
_ALIGNMENT = 64  # of tensors in a file; XLA uses memory with this alignment without a copy
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {np.dtype(np.int8): "I8"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Assignment of parameters to shards.

    Attributes:
      shards: file name to parameters, in order.
      shapes: shape of every parameter.
      dtype: dtype of all parameters that are not in `others`.
      others: dtypes that differ from `dtype`.
      framework: "format" in the safetensors header; transformers requires its own, "pt", in a checkpoint.
    """

    shards: dict[str, tuple[str, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: np.dtype
    others: Mapping[str, np.dtype] = dataclasses.field(default_factory=dict)
    framework: str = "np"

    def dtype_of(self, name: str) -> np.dtype:
        """dtype of one parameter."""
        return self.others.get(name, self.dtype)

    def nbytes(self, name: str) -> int:
        """Bytes of one parameter."""
        return math.prod(self.shapes[name]) * self.dtype_of(name).itemsize

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(map(self.nbytes, self.shapes))


def plan_layout(
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    max_shard_bytes: float,
    others: Mapping[str, np.dtype] | None = None,
) -> Layout:
    """Fills shards of at most `max_shard_bytes` in order; a larger parameter gets its own shard.

    Args:
      others: dtypes that differ from `dtype`.
    """
    others = others or {}
    groups: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * others.get(name, dtype).itemsize
        if groups[-1] and used + size > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return Layout({SINGLE_FILE: tuple(groups[0])}, shapes, dtype, others)
    total = len(groups)
    names = (f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total))
    return Layout({name: tuple(group) for name, group in zip(names, groups, strict=True)}, shapes, dtype, others)


class ShardWriter:
    """Creates shard files of full size; `write` fills their slots. Use as a context manager."""

    def __init__(self, directory: Path, layout: Layout) -> None:
        self._layout = layout
        self._files: dict[str, BinaryIO] = {}
        self._places: dict[str, tuple[str, int]] = {}
        try:
            for shard, names in layout.shards.items():
                self._files[shard] = (directory / shard).open("w+b")
                self._lay_out(shard, names)
        except BaseException:
            self._close()
            raise
        if len(layout.shards) > 1:
            _write_index(directory / INDEX_FILE, layout)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def write(self, name: str, slot: Slot, piece: np.ndarray, source: str, first_row: int = 0) -> int:
        """Writes `piece` into ``name[slot]``, cast to the parameter's dtype; returns the number of bytes.

        Args:
          first_row: row at which `piece` begins, along the first axis of ``name[slot]``.

        Raises:
          TideError: the piece, which came from tensor `source`, holds NaN or infinity, or overflows the dtype.
        """
        shard, offset = self._places[name]
        shape, dtype = self._layout.shapes[name], self._layout.dtype_of(name)
        # Leading integers of the slot are a byte offset; the rest is applied row by row.
        leading, inner = split_slot(slot)
        for index in leading:
            shape = shape[1:]
            offset += index * _bytes(shape, dtype)
        piece, (_, *row) = np.atleast_1d(piece), shape or (1,)  # treat a scalar as one row
        row_bytes = _bytes(row, dtype)
        rows = max(1, _BLOCK_BYTES // row_bytes)
        for start in range(0, len(piece), rows):
            part = cast_in_range(piece[start : start + rows], dtype, source)
            self._write_rows(shard, offset + (first_row + start) * row_bytes, (len(part), *row), inner, part)
        return piece.size * dtype.itemsize

    def sync(self) -> None:
        """Waits until the data is on disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def _write_rows(self, shard: str, offset: int, shape: tuple[int, ...], slot: Slot, part: np.ndarray) -> None:
        """Writes whole rows, or updates a slot of the rows on disk."""
        file = self._files[shard]
        block = part
        if slot:
            file.seek(offset)
            block = np.frombuffer(bytearray(file.read(_bytes(shape, part.dtype))), part.dtype).reshape(shape)
            block[slot] = part
        file.seek(offset)
        file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)

    def _lay_out(self, shard: str, names: tuple[str, ...]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": self._layout.framework}}
        begin = 0
        # Tensors of aligned size come first, so that they all begin aligned.
        for name in sorted(names, key=lambda name: self._layout.nbytes(name) % _ALIGNMENT > 0):
            end = begin + self._layout.nbytes(name)
            shape = list(self._layout.shapes[name])
            header[name] = {
                "dtype": _DTYPE_NAMES[self._layout.dtype_of(name)],
                "shape": shape,
                "data_offsets": [begin, end],
            }
            begin = end
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self._files[shard].write(struct.pack("<Q", len(text)) + text)
        self._files[shard].truncate(8 + len(text) + begin)
        for name in names:
            self._places[name] = (shard, 8 + len(text) + header[name]["data_offsets"][0])

    def _close(self) -> None:
        for file in self._files.values():
            file.close()


def _bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def split_slot(slot: Slot) -> tuple[tuple[int, ...], Slot]:
    """Splits a slot into its leading integers and the rest."""
    count = next((i for i, index in enumerate(slot) if isinstance(index, slice)), len(slot))
    return tuple(int(i) for i in slot[:count] if isinstance(i, int)), slot[count:]


def _write_index(path: Path, layout: Layout) -> None:
    weight_map = {name: shard for shard, names in layout.shards.items() for name in names}
    index = {"metadata": {"total_size": layout.total_bytes}, "weight_map": weight_map}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

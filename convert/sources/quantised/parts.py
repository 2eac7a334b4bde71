"""Helpers for all quantisation methods: find packed weights by name, unpack words, apply scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tide_jax.errors import TideError
from tide_jax.model.files.shards import DTYPES, TensorInfo

Settings = Mapping[str, Any]
_BLOCK_NUMBERS = 2**22


class Stored(Protocol):
    """A checkpoint whose tensors can be read as they are stored."""

    description: str
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    def read_stored(self, name: str) -> np.ndarray:
        """Reads one tensor of any dtype."""
        ...


@dataclasses.dataclass(frozen=True)
class Packed:
    """A weight that a quantised checkpoint stores in parts.

    Attributes:
      info: shape and dtype name of the weight itself.
      parts: names of the stored tensors.
      unpack: reads and dequantises the weight.
      scales: for integers with one scale per output: reads the scales, in a shape that broadcasts to the weight's.
    """

    info: TensorInfo
    parts: tuple[str, ...]
    unpack: Callable[[], np.ndarray]
    scales: Callable[[], np.ndarray] | None = None


Method = Callable[[Stored, Settings], dict[str, Packed]]


def unsupported_error(stored: Stored, what: str) -> TideError:
    """An error for an unsupported feature, with the remedy."""
    return TideError(f"{stored.description}: {what}: convert the unquantised checkpoint, or a GGUF file")


def find_modules(
    stored: Stored, first: str, needed: Sequence[str] = (), optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields modules that store a part called `first`, each with the names of its parts.

    Raises:
      TideError: a module lacks one of the `needed` parts.
    """
    for name in stored.tensors:
        module, _, part = name.rpartition(f".{first}")
        if not module or part:
            continue
        parts = {first: name} | {p: f"{module}.{p}" for p in (*needed, *optional) if f"{module}.{p}" in stored.tensors}
        if missing := [p for p in needed if p not in parts]:
            raise TideError(f"{stored.description}: {name} comes without {module}.{missing[0]}: download it again")
        yield module, parts


def check_parts(
    stored: Stored, parts: Mapping[str, str], dtypes: Mapping[str, Sequence[str]], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Raises TideError unless each listed part has one of the given dtypes and the given shape."""
    for part, name in parts.items():
        info = stored.tensors[name]
        if part in dtypes and info.dtype not in dtypes[part]:
            raise unsupported_error(stored, f"{name} has dtype {info.dtype}, expected {' or '.join(dtypes[part])}")
        if part in shapes and info.shape != tuple(shapes[part]):
            raise unsupported_error(stored, f"{name} has shape {list(info.shape)}, expected {list(shapes[part])}")


def matrix_shape(stored: Stored, name: str) -> tuple[int, int]:
    """Shape of a tensor with two axes. Raises TideError for other tensors."""
    shape = stored.tensors[name].shape
    if len(shape) != 2:
        raise unsupported_error(stored, f"{name} has shape {list(shape)}, expected two axes")
    return shape[0], shape[1]


def scale_dtype(stored: Stored, name: str) -> str:
    """Name of a weight's dtype after scaling: the scales' dtype, or float32 if that is not a float."""
    found = stored.tensors[name].dtype
    return found if found in DTYPES else "F32"


def scales_by_output(
    stored: Stored, name: str, groups: int, *, transposed: bool = False
) -> Callable[[], np.ndarray] | None:
    """Returns a function that reads one scale per output (`Packed.scales`); None if outputs have several scales.

    Args:
      name: name of the scales, a tensor with two axes.
      groups: its axis over groups of inputs; the other axis is over outputs.
      transposed: the weight has its axes in the other order.
    """

    def read() -> np.ndarray:
        scales = stored.read_stored(name)
        return scales.T if transposed else scales

    return read if stored.tensors[name].shape[groups] == 1 else None


def unpack_words(words: np.ndarray, bits: int, order: Sequence[int] | None = None) -> np.ndarray:
    """Unpacks unsigned integers [rows, words * n] from 32-bit words [rows, words] of n numbers each, low bits first.

    `order` gives the position among the unpacked numbers for each number in a word.
    """
    numbers_per_word = 32 // bits
    unsigned = words.view(np.uint32)
    numbers = np.empty((words.shape[0], words.shape[1] * numbers_per_word), np.uint8)
    for i, position in enumerate(order or range(numbers_per_word)):
        numbers[:, position::numbers_per_word] = (unsigned >> np.uint32(bits * i)) & np.uint32(2**bits - 1)
    return numbers


def apply_scales(
    numbers: np.ndarray, scales: np.ndarray, rows: np.ndarray, columns: np.ndarray, zeros: np.ndarray | None = None
) -> np.ndarray:
    """Computes ``(numbers - zeros) * scales`` in float32, a block of rows at a time.

    Args:
      numbers: [out, in], of any dtype.
      scales: [R, C].
      rows, columns: index into the rows of `scales` for each of the `out` rows, and into its columns for each of the
        `in` columns.
      zeros: [R, C], none when omitted.
    """
    result = np.empty(numbers.shape, np.float32)
    scales = scales.astype(np.float32, copy=False)
    zeros = None if zeros is None else zeros.astype(np.float32, copy=False)
    step = max(1, _BLOCK_NUMBERS // max(1, numbers.shape[1]))
    for start in range(0, len(numbers), step):
        block = slice(start, start + step)
        part = numbers[block].astype(np.float32)
        if zeros is not None:
            part -= zeros[rows[block]][:, columns]
        result[block] = part * scales[rows[block]][:, columns]
    return result


def block_indices(count: int, blocks: int, size: int | None = None) -> np.ndarray:
    """Index of the block for each of `count` places, with `blocks` blocks of equal size."""
    return np.arange(count) // (size or -(-count // blocks))

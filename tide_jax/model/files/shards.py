"""Reads safetensors files one tensor at a time, with errors that a user can act on.

The format (https://huggingface.co/docs/safetensors): a little-endian 64-bit header length, a JSON header with each
tensor's dtype, shape and byte range, then the raw data. Conversion promises to hold one tensor at a time, so it uses
plain file reads, because mapped pages count as resident memory. A model that runs directly on a file's data maps it.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import math
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tide_jax.errors import TideError, first_line, join_problems, shorten
from tide_jax.json_files import GET_AGAIN, read_json
from tide_jax.model.files.model_directory import is_inside

logger = logging.getLogger(__name__)
SINGLE_FILE = "model.safetensors"
_INDEX_SUFFIX = ".index.json"
INDEX_FILE = SINGLE_FILE + _INDEX_SUFFIX
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
STORED_DTYPES = DTYPES | {
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
# Bits per number of every dtype in the format. All entries of a header are checked, even for tensors that are never
# read.
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
# The safetensors package refuses longer headers too. numpy has at most 64 axes.
_HEADER_BYTES, _AXES = 100_000_000, 64
_LARGEST = 1e12  # trained weights are far smaller; a flipped exponent bit gives 1e19 or more


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape of a stored tensor and the name its file gives the dtype ("F32", "BF16", ...)."""

    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class _Location:
    file: Path
    offset: int


class ShardedTensors:
    """The tensors of a directory with one safetensors file, or with an index and its shards.

    Construction reads only the headers; `read` fetches one tensor.

    Args:
      directory: the folder of the files.
      single: name of the single file; the index has the same name plus ".index.json".

    Attributes:
      infos: shape and dtype name of every tensor.
      files: the safetensors files, in order.

    Raises:
      TideError: a shard is missing, cut short or malformed.
    """

    def __init__(self, directory: Path, single: str = SINGLE_FILE) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self._locations: dict[str, _Location] = {}
        self._maps: dict[Path, np.ndarray] = {}
        self.files, indexed = _shard_files(directory, single)
        for file in self.files:
            for name, info, offset in _read_header(file):
                self.infos[name] = info
                self._locations[name] = _Location(file, offset)
        if absent := sorted(set(indexed) - set(self.infos)):
            # Only a warning: if the model needs the tensor, a later step reports it, and otherwise it does no harm.
            logger.warning(
                "%s%s lists tensors that its shards do not hold: %s",
                directory / single,
                _INDEX_SUFFIX,
                join_problems(absent),
            )

    def read(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
        """One float tensor, or the part of it at an index into its leading axes, in newly allocated memory.

        Raises:
          TideError: the tensor is not float32, float16 or bfloat16, or its file can no longer be read.
        """
        self._float_dtype(name)
        return self.read_stored(name, index)

    def map(self, name: str) -> np.ndarray:
        """One tensor, memory-mapped from its file, read-only; pages are read on first access.

        Raises:
          TideError: same as `read`.
        """
        return self._map_as(name, self._float_dtype(name))

    def map_stored(self, name: str) -> np.ndarray:
        """Same as `map`, for any dtype in `STORED_DTYPES`."""
        return self._map_as(name, self._stored_dtype(name))

    def _map_as(self, name: str, dtype: np.dtype) -> np.ndarray:
        info, location = self.infos[name], self._locations[name]
        try:
            if location.file not in self._maps:
                self._maps[location.file] = np.memmap(location.file, np.uint8, "r")
            size = math.prod(info.shape) * dtype.itemsize
            mapped = np.asarray(self._maps[location.file])[location.offset : location.offset + size]
            return mapped.view(dtype).reshape(info.shape)
        except (OSError, ValueError) as error:
            raise TideError(_unreadable(name, location.file, error)) from error

    def _float_dtype(self, name: str) -> np.dtype:
        if (found := self.infos[name].dtype) not in DTYPES:
            raise TideError(f"tensor {name} has dtype {found}, expected one of {', '.join(DTYPES)}")
        return DTYPES[found]

    def _stored_dtype(self, name: str) -> np.dtype:
        if (found := self.infos[name].dtype) not in STORED_DTYPES:
            raise TideError(f"tensor {name} has dtype {found}, expected one of {', '.join(STORED_DTYPES)}")
        return STORED_DTYPES[found]

    def read_stored(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
        """Same as `read`, for any dtype in `STORED_DTYPES`, such as packed integers and 8-bit floats."""
        info, location, dtype = self.infos[name], self._locations[name], self._stored_dtype(name)
        shape, skipped = info.shape, 0
        # Row-major offset of the part, in units of its size.
        for i in index:
            skipped, shape = skipped * shape[0] + i, shape[1:]
        size = math.prod(shape)
        try:
            flat = np.fromfile(location.file, dtype, size, offset=location.offset + skipped * size * dtype.itemsize)
            return flat.reshape(shape)
        except (OSError, ValueError) as error:
            raise TideError(_unreadable(name, location.file, error)) from error


def _shard_files(directory: Path, single: str) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of a checkpoint, and the index's map from tensor to shard (empty without an index)."""
    if (file := directory / single).is_file():
        return [file], {}
    index = directory / (single + _INDEX_SUFFIX)
    if not index.is_file():
        raise TideError(_no_weights(directory, single))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise TideError(f"{index} has no weight_map: {GET_AGAIN}")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise TideError(f"{index} maps tensors to something else than file names: {GET_AGAIN}")
    names = sorted(set(weight_map.values()))
    if outside := [name for name in names if not is_inside(name)]:
        raise TideError(f"{index} names {outside[0][:80]!r}, expected files in its own directory: {GET_AGAIN}")
    if absent := [name for name in names if not os.path.isfile(directory / name)]:
        shown = ", ".join(name[:40] for name in absent[:3]) + (", ..." if len(absent) > 3 else "")
        raise TideError(f"{index} names shards that are not there: {shown}: {GET_AGAIN}")
    return [directory / name for name in names], weight_map


def _no_weights(directory: Path, single: str) -> str:
    wanted = f"{directory} holds no {single} and no {single}{_INDEX_SUFFIX}"
    if pickled := sorted(path.name for path in directory.glob("*_model*.bin")):
        return f"{wanted}, only {pickled[0]}: safetensors are needed, save it with save_pretrained first"
    return f"{wanted}: give a directory with safetensors weights"


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One tensor of a header; byte offsets count from the end of the header."""

    name: str
    info: TensorInfo
    begin: int
    end: int


def _read_header(file: Path) -> list[tuple[str, TensorInfo, int]]:
    """Name, info and absolute byte offset of each tensor in a file, checked against the file's size.

    Like the safetensors package, this checks that the tensors cover every byte exactly once. So wrong shapes, dtypes
    and offsets are found, and no tensor contains another one's bytes.
    """
    size = file.stat().st_size
    if size < 8:
        raise TideError(f"{file} is cut short: {size} bytes, expected 8 and a header: {GET_AGAIN}")
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, _HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes does not fit its {size} bytes")
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_once)
        entries = _entries(header)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TideError(f"{file} is not a readable safetensors file ({first_line(error)}): {GET_AGAIN}") from error
    expected = 8 + length + max((entry.end for entry in entries), default=0)
    if size < expected:
        raise TideError(f"{file} is cut short: {size} bytes, expected {expected}: {GET_AGAIN}")
    if size > expected:
        raise TideError(f"{file} is damaged: {size} bytes, expected {expected} by its header: {GET_AGAIN}")
    return [(entry.name, entry.info, 8 + length + entry.begin) for entry in entries]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a repeated key."""
    values = dict(pairs)
    if len(values) != len(pairs):
        ((twice, _),) = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"it says {_shown(twice)} twice")
    return values


def _entries(header: dict[str, Any]) -> list[_Entry]:
    """The tensors of a header, in its order. Raises the errors that `_read_header` reports."""
    notes = header.get("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise ValueError("__metadata__ is not an object of strings")
    entries = [_entry(name, values) for name, values in header.items() if name != "__metadata__"]
    # In the order of offsets, each tensor must begin where the one before ends.
    end, before = 0, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != end:
            wrong = "overlap" if entry.begin < end else "have a gap between them"
            raise ValueError(f"{before} and {_shown(entry.name)} {wrong}")
        end, before = entry.end, _shown(entry.name)
    return entries


def _entry(name: str, values: dict[str, Any]) -> _Entry:
    """One tensor of a header, checked by itself. Raises the errors that `_read_header` reports."""
    shape, dtype, (begin, end) = values["shape"], values["dtype"], values["data_offsets"]
    numbers = [*shape, begin, end]
    if len(shape) > _AXES or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        said = f"shape {_shown(shape)} at bytes {_shown(begin)} to {_shown(end)}"
        raise ValueError(f"{_shown(name)} has {said}, expected whole numbers, 0 or more")
    if dtype not in _BITS:
        raise ValueError(f"{_shown(name)} has dtype {_shown(dtype)}, expected one such as F32")
    if end < begin or 8 * (end - begin) != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"{_shown(name)} has {end - begin} bytes for shape {_shown(shape)} {dtype}")
    return _Entry(name, TensorInfo(tuple(shape), dtype), begin, end)


def _shown(value: Any) -> str:
    """A value from a file, shortened and printable, for an error message."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return shorten(text, 45)


def _unreadable(name: str, file: Path, error: BaseException) -> str:
    return f"{name} cannot be read from {file} ({first_line(error)}): {GET_AGAIN}"


def cast_in_range(array: np.ndarray, dtype: np.dtype, source: str) -> np.ndarray:
    """`array` in `dtype`.

    Raises:
      TideError: tensor `source` holds NaN, infinity or numbers too large for trained weights, or it overflows `dtype`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype, copy=False)
    if _magnitude(cast) <= _LARGEST:
        return cast
    if not np.isfinite(array).all():
        raise TideError(f"tensor {source} holds NaN or infinity: the checkpoint is damaged, {GET_AGAIN}")
    if not np.isfinite(cast).all():
        raise TideError(f"tensor {source} overflows {dtype.name}: use bfloat16 or float32")
    found = f"a number as large as {_magnitude(cast):.1e}, expected none above {_LARGEST:.0e}"
    raise TideError(f"tensor {source} holds {found}: the checkpoint is damaged, {GET_AGAIN}")


def _magnitude(array: np.ndarray) -> float:
    """The largest magnitude of an array of floats, infinity if one is NaN; allocates nothing of the array's size."""
    if not array.size:
        return 0.0
    # As integers, the bits of floats have the order of their magnitudes, with infinity and NaN above all others. So the
    # signed maximum finds the largest positive number, and the unsigned maximum the largest negative one.
    size = array.dtype.itemsize
    signed, unsigned = array.view(f"i{size}"), array.view(f"u{size}")
    sign = 1 << (8 * size - 1)
    bits = max(int(signed.max()), int(unsigned.max()) & (sign - 1))
    largest = float(np.array(bits, f"u{size}").view(array.dtype))
    return largest if largest == largest else math.inf

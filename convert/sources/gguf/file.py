"""Reads GGUF, llama.cpp's file format: key-value pairs, a table of tensors and their data, in one file or several.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from tide_jax.errors import TideError

_FLOAT_DTYPES = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
# numpy dtypes of the value types 0 to 7 and 10 to 12; 8 is a string, 9 an array.
_SCALAR_DTYPES = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "<u8", "<i8", "<f8")
_SCALARS = dict(zip((*range(8), 10, 11, 12), _SCALAR_DTYPES, strict=True))
_PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
# No model comes near these limits. A header that claims more is refused before memory of that size is allocated.
_MAX_ITEMS, _MAX_STRING_BYTES, _MAX_NAME_BYTES, _MAX_AXES = 2**25, 2**24, 2**16, 4


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Location of a tensor: file, torch shape, storage type, absolute offset and size in bytes."""

    path: Path
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int

    @property
    def dtype(self) -> str:
        """Name, as in safetensors files, of the dtype that `read_tensor` returns."""
        return self.kind.name if self.kind in _FLOAT_DTYPES else "F32"

    def rows(self, start: int, stop: int) -> StoredTensor:
        """A range of the first axis; for a tensor with one axis only if it is not quantised."""
        width = self.size // self.shape[0]
        return dataclasses.replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            offset=self.offset + start * width,
            size=(stop - start) * width,
        )

    def item(self, index: int) -> StoredTensor:
        """One entry of the first axis, without that axis."""
        return dataclasses.replace(self.rows(index, index + 1), shape=self.shape[1:])


class _Cursor:
    """Reads little-endian values in sequence; raises ValueError if the file is too short or inconsistent."""

    def __init__(self, data: np.ndarray, position: int) -> None:
        self.data = data
        self.position = position
        self.items = _MAX_ITEMS

    def count(self, what: str) -> int:
        """Reads how many items follow. Their sum over a header is limited, because each becomes a Python object."""
        count = self.integer(8)
        self.items -= count
        if self.items < 0:
            raise ValueError(f"it claims to hold {count} {what}")
        return count

    def values(self, dtype: str, count: int) -> np.ndarray:
        raw = self.take(count * np.dtype(dtype).itemsize)
        return np.frombuffer(raw, dtype)

    def take(self, size: int) -> bytes:
        if self.position + size > len(self.data):
            raise ValueError("it ends inside its header")
        raw = self.data[self.position : self.position + size].tobytes()
        self.position += size
        return raw

    def integer(self, width: int = 4) -> int:
        return int.from_bytes(self.take(width), "little")

    def string(self, longest: int = _MAX_STRING_BYTES) -> str:
        if (size := self.integer(8)) > longest:
            raise ValueError(f"it claims to hold a string of {size} bytes")
        return self.take(size).decode("utf-8")

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.FLOAT32:
            # The shortest decimal of this float32 is the intended number: 1e-05, not 9.999999747378752e-06.
            return float(str(self.values("<f4", 1)[0]))
        if kind != GGUFValueType.ARRAY:
            return self.values(_SCALARS[kind], 1).item()
        item, count = GGUFValueType(self.integer()), self.count("values")
        if item == GGUFValueType.ARRAY:
            raise ValueError("it holds an array of arrays")
        if item == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        return self.values(_SCALARS[item], count).tolist()

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Reads name, torch shape, number of the storage type, and offset from the start of the data section."""
        name = self.string(_MAX_NAME_BYTES)
        if not 1 <= (axes := self.integer()) <= _MAX_AXES:
            raise ValueError(f"tensor {shorten(name)} has {axes} axes, expected 1 to {_MAX_AXES}")
        extents = self.values("<u8", axes).tolist()
        if min(extents) < 1:
            raise ValueError(f"tensor {shorten(name)} has an axis of length 0")
        return name, tuple(reversed(extents)), self.integer(), self.integer(8)

    def pairs(self, count: int) -> dict[str, Any]:
        """Reads key-value pairs."""
        pairs: dict[str, Any] = {}
        for _ in range(count):
            key = self.string(_MAX_NAME_BYTES)
            if key in pairs:
                raise ValueError(f"it has the key {shorten(key)} twice")
            pairs[key] = self.value(GGUFValueType(self.integer()))
        return pairs


def shorten(value: Any, longest: int = 60) -> str:
    """A value from a file, shortened to part of a line."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def _map_file(path: Path) -> np.ndarray:
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise TideError(f"{path} can't be read ({error}); expected a GGUF file: check the path") from error
    magic = data[:4].tobytes()
    if magic != b"GGUF":
        raise TideError(f"{path} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'; check the path")
    version = int.from_bytes(data[4:8].tobytes(), "little")
    if version not in (2, 3):
        raise TideError(
            f"{path} is GGUF version {version}, expected 2 or 3 in little-endian order: convert the model again"
        )
    return data


def read_model(path: Path) -> tuple[list[Path], dict[str, Any], dict[str, StoredTensor]]:
    """Returns the files of a model, its key-value pairs and the locations of its tensors.

    A model in parts, `<name>-00001-of-00003.gguf` and so on, may be named by any part; the first part has the pairs.

    Raises:
      TideError: not a complete GGUF model.
    """
    metadata, tensors = read_header(path)
    count = metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count < 2**16:
        raise TideError(f"{path} has split.count={shorten(count)}, expected a number of parts: get it again")
    if count <= 1:
        return [path], metadata, tensors
    paths = _part_paths(path, count)
    headers = [read_header(part) for part in paths]
    for number, (part, (pairs, _)) in enumerate(zip(paths, headers, strict=True)):
        found = pairs.get("split.no"), pairs.get("split.count")
        if found != (number, count):
            stated = f"part {shorten(found[0])} of {shorten(found[1])}"
            raise TideError(f"{part} says that it is {stated}, expected part {number} of {count}: get it again")
    merged = {name: stored for _, tensors in headers for name, stored in tensors.items()}
    tensor_count = sum(len(tensors) for _, tensors in headers)
    expected = headers[0][0].get("split.tensors.count", tensor_count)
    if len(merged) != expected or tensor_count != expected:
        raise TideError(
            f"the {count} parts of {path} hold {len(merged)} tensors, expected {shorten(expected)}: get them again"
        )
    return paths, headers[0][0], merged


def _part_paths(path: Path, count: int) -> list[Path]:
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise TideError(
            f"{path} is one of {count} parts, expected to be named like model-00001-of-{count:05}.gguf with the "
            "others beside it: give it its name back, or join them with llama-gguf-split --merge"
        )
    paths = [path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise TideError(f"{path} is one of {count} parts, expected {listed} beside it: get all parts")
    return paths


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Key-value pairs and tensor locations of one file. Raises TideError unless it is a complete GGUF file."""
    data = _map_file(path)
    cursor = _Cursor(data, position=8)
    try:
        tensor_count, pair_count = cursor.count("tensors"), cursor.count("pairs")
        metadata = cursor.pairs(pair_count)
        headers = [cursor.tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 2**20:
            raise ValueError(f"general.alignment is {shorten(alignment)}, expected a power of two")
    except (ValueError, TypeError, ArithmeticError) as error:
        raise TideError(
            f"{path} is truncated or damaged ({error}), expected a whole GGUF file: get it again"
        ) from error
    return metadata, _locate(path, headers, cursor.position, alignment, data)


def _locate(
    path: Path, headers: list[tuple[str, tuple[int, ...], int, int]], header_end: int, alignment: int, data: np.ndarray
) -> dict[str, StoredTensor]:
    """Locates the tensors. As in llama.cpp, each must follow the previous one with only zero padding between them.

    This check detects a damaged offset, shape or storage type, and prevents reading a tensor from another one's bytes.
    """
    file_size = len(data)

    def skip_padding(position: int, previous: str) -> int:
        end = -(-position // alignment) * alignment
        if data[position:end].any():
            raise TideError(
                f"{path} is damaged: bytes {position} to {end} after {previous} are not zero, expected padding: "
                "get it again"
            )
        return end

    position = start = skip_padding(header_end, "its header")
    tensors: dict[str, StoredTensor] = {}
    for name, shape, number, offset in headers:
        kind, size = _storage_of(path, name, shape, number)
        if name in tensors:
            raise TideError(f"{path} is damaged: it has two tensors {shorten(name)}, expected one: get it again")
        if start + offset != position:
            raise TideError(
                f"{path} is damaged: tensor {shorten(name)} begins at byte {start + offset}, expected {position}, "
                "right after the tensor before it: get it again"
            )
        if position + size > file_size:
            raise TideError(
                f"{path} is truncated: tensor {shorten(name)} ends at byte {position + size}, the file at {file_size}: "
                "get it again"
            )
        tensors[name] = StoredTensor(path, shape, kind, position, size)
        position = skip_padding(position + size, f"tensor {shorten(name)}")
    if file_size > position:
        raise TideError(
            f"{path} is damaged: {file_size - position} bytes follow its last tensor, expected none: get it again"
        )
    return tensors


def _storage_of(path: Path, name: str, shape: tuple[int, ...], number: int) -> tuple[GGMLQuantizationType, int]:
    """Storage type and size in bytes. Raises TideError if the type is not readable or does not fit the shape."""
    kind = _storage_type(path, name, number)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise TideError(
            f"{path} is damaged: tensor {shorten(name)} of shape {list(shape)} can't be {kind.name}, whose blocks have "
            f"{block} numbers: get it again"
        )
    return kind, math.prod(shape) // block * block_bytes


def _storage_type(path: Path, name: str, number: int) -> GGMLQuantizationType:
    try:
        kind = GGMLQuantizationType(number)
        if kind not in _FLOAT_DTYPES:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, NotImplementedError) as error:
        raise TideError(
            f"{path}: tensor {shorten(name)} is stored as {_type_name(number)}, which can't be dequantised; "
            "expected F32, F16, BF16 or a quantisation such as Q8_0 or Q4_K: use another file of this model"
        ) from error
    return kind


def _type_name(number: int) -> str:
    known = {kind.value: kind.name for kind in GGMLQuantizationType}
    return known.get(number, f"type {number}")


def read_tensor(stored: StoredTensor) -> np.ndarray:
    """Reads one tensor: floating-point types as stored, others dequantised to float32.

    Raises:
      TideError: the file has disappeared or shrunk.
    """
    # A plain read: mapped pages would count as used memory, and only one tensor at a time may be held.
    try:
        raw = np.fromfile(stored.path, np.uint8, stored.size, offset=stored.offset)
    except OSError as error:
        raise TideError(f"{stored.path} can't be read any more ({error}): put it back") from error
    if raw.size != stored.size:
        raise TideError(f"{stored.path} became shorter after it was opened: do not change it during a conversion")
    if stored.kind in _FLOAT_DTYPES:
        return raw.view(_FLOAT_DTYPES[stored.kind]).reshape(stored.shape)
    return dequantize(raw.reshape(*stored.shape[:-1], -1), stored.kind)

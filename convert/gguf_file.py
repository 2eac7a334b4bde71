"""GGUF, llama.cpp's file format: key-value pairs, a table of tensors, and the tensors' data, in one file or several.

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

_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
# numpy dtypes of the value types 0 to 7 and 10 to 12; 8 is a string, 9 an array.
_SCALAR_DTYPES = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "<u8", "<i8", "<f8")
_SCALARS = dict(zip((*range(8), 10, 11, 12), _SCALAR_DTYPES, strict=True))
_PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, torch shape, storage type, absolute offset and size in bytes."""

    path: Path
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int

    @property
    def dtype(self) -> str:
        """Name, as safetensors files have it, of the dtype `read_tensor` returns."""
        return self.kind.name if self.kind in _PLAIN else "F32"

    def rows(self, start: int, stop: int) -> StoredTensor:
        """A range of the first axis; of a tensor with one axis only if it is not quantised."""
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
    """Reads little-endian values one after the other; raises ValueError where the file ends too early."""

    def __init__(self, data: np.ndarray, position: int) -> None:
        self.data = data
        self.position = position

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

    def string(self) -> str:
        return self.take(self.integer(8)).decode("utf-8")

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.FLOAT32:
            # The shortest decimal of this float32 is the number that was meant: 1e-05, not 9.999999747378752e-06.
            return float(str(self.values("<f4", 1)[0]))
        if kind != GGUFValueType.ARRAY:
            return self.values(_SCALARS[kind], 1).item()
        item, count = GGUFValueType(self.integer()), self.integer(8)
        if item == GGUFValueType.ARRAY:
            raise ValueError("it holds an array of arrays")
        if item == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        return self.values(_SCALARS[item], count).tolist()

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, torch shape, number of the storage type, and offset from the start of the data section."""
        name = self.string()
        extents = self.values("<u8", self.integer()).tolist()
        return name, tuple(reversed(extents)), self.integer(), self.integer(8)


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
    """The files a model lies in, its key-value pairs and where its tensors lie.

    A model in parts, `<name>-00001-of-00003.gguf` and so on, is named by any of them; the first has the pairs.

    Raises:
      TideError: anything but a whole GGUF model.
    """
    metadata, tensors = read_header(path)
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return [path], metadata, tensors
    paths = _part_paths(path, count)
    headers = [read_header(part) for part in paths]
    for number, (part, (pairs, _)) in enumerate(zip(paths, headers, strict=True)):
        found = pairs.get("split.no"), pairs.get("split.count")
        if found != (number, count):
            raise TideError(f"{part} says it is part {found[0]} of {found[1]}, expected {number} of {count}")
    merged = {name: stored for _, tensors in headers for name, stored in tensors.items()}
    expected = headers[0][0].get("split.tensors.count", len(merged))
    if len(merged) != expected:
        raise TideError(f"the {count} parts of {path} hold {len(merged)} tensors, expected {expected}: get them again")
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
        raise TideError(f"{path} is one of {count} parts, expected {', '.join(missing)} beside it: get all parts")
    return paths


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Key-value pairs and tensor locations of one file. Raises TideError for anything but a whole GGUF file."""
    data = _map_file(path)
    cursor = _Cursor(data, position=8)
    try:
        tensor_count, pair_count = cursor.integer(8), cursor.integer(8)
        metadata = {}
        for _ in range(pair_count):
            key = cursor.string()
            metadata[key] = cursor.value(GGUFValueType(cursor.integer()))
        headers = [cursor.tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        start = math.ceil(cursor.position / alignment) * alignment
    except (ValueError, TypeError, ArithmeticError) as error:
        raise TideError(
            f"{path} is truncated or damaged ({error}), expected a whole GGUF file: get it again"
        ) from error
    tensors = {
        name: _locate(path, name, shape, kind, start + offset, len(data)) for name, shape, kind, offset in headers
    }
    return metadata, tensors


def _locate(path: Path, name: str, shape: tuple[int, ...], number: int, offset: int, file_size: int) -> StoredTensor:
    kind = _storage_type(path, name, number)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
        raise TideError(
            f"{path} is damaged: tensor {name} of shape {shape} can't be {kind.name}, blocks of {block}: get it again"
        )
    size = math.prod(shape) // block * block_bytes
    if offset + size > file_size:
        raise TideError(
            f"{path} is truncated: tensor {name} ends at byte {offset + size}, the file at {file_size}: get it again"
        )
    return StoredTensor(path, shape, kind, offset, size)


def _storage_type(path: Path, name: str, number: int) -> GGMLQuantizationType:
    try:
        kind = GGMLQuantizationType(number)
        if kind not in _PLAIN:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, NotImplementedError) as error:
        raise TideError(
            f"{path}: tensor {name} is stored as {_type_name(number)}, which can't be dequantised; "
            "expected F32, F16, BF16 or a quantisation such as Q8_0 or Q4_K: use another file of this model"
        ) from error
    return kind


def _type_name(number: int) -> str:
    known = {kind.value: kind.name for kind in GGMLQuantizationType}
    return known.get(number, f"type {number}")


def read_tensor(stored: StoredTensor) -> np.ndarray:
    """One tensor: as it is stored if that is floating point, else dequantised to float32."""
    # A plain read: mapped pages would count as memory used, and only one tensor at a time is to be held.
    raw = np.fromfile(stored.path, np.uint8, stored.size, offset=stored.offset)
    if stored.kind in _PLAIN:
        return raw.view(_PLAIN[stored.kind]).reshape(stored.shape)
    return dequantize(raw.reshape(*stored.shape[:-1], -1), stored.kind)

"""Routers on disk: one safetensors file with a SHA-256 digest over every byte, so that partial files are detected.

Down-projections are 99.9% of a router. They are stored as int8 with one scale for each column if that is exact;
`round_columns` rounds trained weights so that it is. A router file for 32 layers of width 4096 with the default
settings (an exit point every 4 layers, bottleneck 128) is 3.7 MB.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load

from tide_jax.errors import TideError
from tide_jax.temporaries import temporary_file

FORMAT, VERSION = "tide_jax.routers", "3"
_NO_DIGEST = "0" * 64
_LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
_NAMES = {np.dtype(np.int8): "I8", np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}


def round_columns(weights: Float[np.ndarray, "D H"]) -> Float[np.ndarray, "D H"]:
    """Rounds each column to 8 bits, float32 out.

    Rounding again changes nothing: the scale has 8 significant bits, and the column's largest entry becomes exactly 127
    scales, so the scale can be recovered from the result.
    """
    weights = np.asarray(weights, np.float32)
    peak = np.abs(weights).max(axis=0)
    scale = _scale(peak)
    rounded = np.clip(np.rint(weights / scale), -127, 127)
    top = (np.abs(weights).argmax(axis=0), np.arange(weights.shape[1]))
    rounded[top] = np.where(peak > 0, np.copysign(127, weights[top]), 0)
    return (rounded * scale).astype(np.float32)


def round_half(weights: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Rounds to float16 values, float32 out."""
    return np.asarray(weights, np.float16).astype(np.float32)


def _scale(peak: np.ndarray) -> np.ndarray:
    scale = (peak / np.float32(127)).astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.where(scale > 0, scale, np.float32(1))


def encode(tensors: dict[str, np.ndarray], metadata: dict[str, Any]) -> bytes:
    """Content of a router file; equal arguments give equal bytes.

    The file is a safetensors header with sorted keys, metadata and a digest of the whole file, followed by the tensors.
    A tensor is stored as int8 columns (two axes) or float16 if that is exact, otherwise as float32.
    """
    stored: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        stored |= _compact(name, np.asarray(tensor, np.float32))
    # Write the header with zeros for the digest, which is filled in last.
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "version": VERSION,
            "sha256": _NO_DIGEST,
            "metadata": json.dumps(metadata, sort_keys=True),
        }
    }
    begin, body = 0, []
    # Widest dtype first, so that every tensor is aligned.
    for name in sorted(stored, key=lambda name: (-stored[name].dtype.itemsize, name)):
        body.append(stored[name].tobytes())
        end = begin + len(body[-1])
        described = {"dtype": _NAMES[stored[name].dtype], "shape": stored[name].shape, "data_offsets": [begin, end]}
        header[name], begin = described, end
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = b"".join([len(text).to_bytes(8, "little"), text, *body])
    return content.replace(_digest_field(_NO_DIGEST), _digest_field(hashlib.sha256(content).hexdigest()), 1)


def check_destination(path: Path) -> None:
    """Raises TideError if a rename would replace something that is not a file: a folder, a device, a pipe."""
    if path.is_dir():
        raise TideError(f"can't write {path}: it is a directory, expected a file")
    if path.exists() and not path.is_file():
        raise TideError(f"can't write {path}: it is a device or a pipe, expected a file; choose another place")


def write(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, then renames it: a kill or a full disk leaves the earlier file.

    Raises:
      TideError: the file can't be written.
    """
    path = Path(os.path.realpath(path))  # replace a link's target, not the link
    check_destination(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(path.parent, path.name) as (temporary, handle):
            with os.fdopen(os.dup(handle), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(handle)
            os.replace(temporary, path)
    except OSError as error:
        raise TideError(f"can't write {path} ({error.strerror or error}); choose a writable place with room") from error


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads tensors (float32) and metadata of a router file.

    Raises:
      TideError: the file is missing, damaged, holds no routers or has another format version.
    """
    if not os.path.isfile(path):
        raise TideError(f"no router file at {path}; make one with 'tide-jax calibrate'")
    # Read the header first: a large file of another kind is not read whole.
    try:
        with path.open("rb") as file:
            start = _read_header(file)
            header = json.loads(start[8:])["__metadata__"]
            if header["format"] == FORMAT and header["version"] == VERSION:
                start += file.read()
    except KeyError:
        header = {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise TideError(f"{path} is damaged or no safetensors file ({_reason(error)}); calibrate again") from error
    if header.get("format") != FORMAT:
        raise TideError(f"{path} is a safetensors file but holds no routers; pass the file 'tide-jax calibrate' wrote")
    if (version := header.get("version")) != VERSION:
        shown = " ".join(str(version).split())[:20]
        raise TideError(f"{path} has router format {shown}, this version reads {VERSION}; calibrate again")
    if not _is_intact(start, header.get("sha256")):
        raise TideError(f"{path} is damaged: it does not hold what was saved; calibrate again")
    try:
        stored = load(start)
        tensors = {name: _expand(name, stored) for name in stored if not name.endswith(_SCALE)}
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise TideError(f"{path} is damaged ({_reason(error)}); calibrate again") from error
    return tensors, _metadata(path, header)


def _read_header(file: BinaryIO) -> bytes:
    """Bytes of a file up to its tensors. Raises ValueError if the header is incomplete or too long."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > _LONGEST_HEADER:
        raise ValueError("its header is cut off or too long")
    return start + file.read(length)


def _is_intact(content: bytes, digest: Any) -> bool:
    """Whether `digest` matches the file's content, hashed with zeros in place of the digest."""
    field = _digest_field(str(digest))
    if content.count(field) != 1:
        return False
    return hashlib.sha256(content.replace(field, _digest_field(_NO_DIGEST))).hexdigest() == digest


def _digest_field(digest: str) -> bytes:
    """Bytes of the header's digest field; metadata can't contain them, since its quotes are escaped."""
    return f'"sha256":"{digest}"'.encode()


def _metadata(path: Path, header: dict[str, str]) -> dict[str, Any]:
    try:
        metadata = json.loads(header["metadata"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise TideError(f"{path} is damaged: its metadata can't be read; calibrate again") from error
    if not isinstance(metadata, dict):
        raise TideError(f"{path} is damaged: its metadata is no JSON object; calibrate again")
    return metadata


_SCALE = ".scale"


def _compact(name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
    if tensor.ndim == 2 and tensor.size and np.isfinite(tensor).all():
        scale = _scale(np.abs(tensor).max(axis=0))
        rounded = np.rint(tensor / scale)
        if np.abs(rounded).max() <= 127 and np.array_equal(rounded * scale, tensor):
            return {name: rounded.astype(np.int8), name + _SCALE: scale}
    with np.errstate(over="ignore"):
        half = tensor.astype(np.float16)
    return {name: half if np.array_equal(half.astype(np.float32), tensor) else tensor}


def _expand(name: str, stored: dict[str, np.ndarray]) -> np.ndarray:
    """Inverse of `_compact` for one tensor. Raises ValueError for a dtype or scale that `_compact` never writes."""
    tensor, scale = stored[name], stored.get(name + _SCALE)
    if tensor.dtype not in _NAMES:
        raise ValueError(f"tensor {name} is of {tensor.dtype}")
    if scale is None:
        return tensor.astype(np.float32)
    if tensor.ndim != 2 or scale.shape != tensor.shape[1:] or scale.dtype not in _NAMES:
        raise ValueError(f"the scale of tensor {name} does not fit it")
    return tensor.astype(np.float32) * scale.astype(np.float32)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__

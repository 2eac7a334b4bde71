"""Routers on disk: one safetensors file, and affine heads in a second one that the first names by digest.

Down-projections, all but a thousandth of a router, are stored as int8 with one scale per column when that is exact;
`round_columns` rounds trained weights so that it is. A router file for 32 layers of width 4096 with the default
settings (a checkpoint every 4 layers, bottleneck 128) is 3.7 MB.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from tide_jax.errors import TideError

FORMAT, VERSION = "tide_jax.routers", "1"


def round_columns(weights: Float[np.ndarray, "D H"]) -> Float[np.ndarray, "D H"]:
    """Rounds each column to 8 bits, float32 out. Rounding again changes nothing: the scale has 8 significant bits, and
    the largest entry is made exactly 127 scales, so that the scale can be read off the result."""
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
    """The content of a file: a safetensors header with metadata and a digest of the tensors, then the tensors.

    Tensors whose values int8 columns (two axes) or float16 hold exactly are stored so; the rest as float32.
    """
    stored: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        stored |= _compact(name, np.asarray(tensor, np.float32))
    header = {"format": FORMAT, "version": VERSION, "sha256": _digest(stored)}
    return to_bytes(stored, metadata=header | {"metadata": json.dumps(metadata, sort_keys=True)})


def write(files: dict[Path, bytes]) -> None:
    """Writes files that belong together: all to temporary names first, so that a full disk leaves what was there.

    Raises:
      TideError: a file can't be written.
    """
    temporaries: dict[Path, Path] = {}
    path = next(iter(files))
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            temporaries[path] = Path(name)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            temporaries[path].chmod(0o644)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    except OSError as error:
        raise TideError(f"can't write {path} ({error.strerror or error}); choose a writable place with room") from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors (float32) and metadata of a file made by `write`.

    Raises:
      TideError: the file is missing, damaged, of another kind or of another version.
    """
    if not path.is_file():
        raise TideError(f"no router file at {path}; make one with 'tide-jax calibrate'")
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise TideError(f"{path} is damaged or no safetensors file ({error}); calibrate again") from error
    if header.get("format") != FORMAT:
        raise TideError(f"{path} is a safetensors file but holds no routers; pass the file 'tide-jax calibrate' wrote")
    if (version := header.get("version")) != VERSION:
        raise TideError(f"{path} has router format {version}, this version reads {VERSION}; calibrate again")
    if header.get("sha256") != _digest(stored):
        raise TideError(f"{path} is damaged: its tensors are not those that were saved; calibrate again")
    return {n: _expand(n, stored) for n in stored if not n.endswith(_SCALE)}, _metadata(path, header)


def _metadata(path: Path, header: dict[str, str]) -> dict[str, Any]:
    try:
        metadata = json.loads(header["metadata"])
    except (KeyError, ValueError, RecursionError) as error:
        raise TideError(f"{path} is damaged: its metadata can't be read; calibrate again") from error
    if not isinstance(metadata, dict):
        raise TideError(f"{path} is damaged: its metadata is no JSON object; calibrate again")
    return metadata


def _digest(stored: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(stored.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()


_SCALE = ".scale"


def _compact(name: str, tensor: np.ndarray) -> dict[str, np.ndarray]:
    if tensor.ndim == 2:
        scale = _scale(np.abs(tensor).max(axis=0))
        rounded = np.rint(tensor / scale)
        if np.abs(rounded).max() <= 127 and np.array_equal(rounded * scale, tensor):
            return {name: rounded.astype(np.int8), name + _SCALE: scale}
    with np.errstate(over="ignore"):
        half = tensor.astype(np.float16)
    return {name: half if np.array_equal(half.astype(np.float32), tensor) else tensor}


def _expand(name: str, stored: dict[str, np.ndarray]) -> np.ndarray:
    tensor = stored[name].astype(np.float32)
    return tensor * stored[name + _SCALE] if name + _SCALE in stored else tensor

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


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Writes tensors and metadata to `path`, replacing it in one step.

    Tensors whose values int8 columns (two axes) or float16 hold exactly are stored so; the rest as float32.

    Raises:
      TideError: the file can't be written.
    """
    stored: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        stored |= _compact(name, np.asarray(tensor, np.float32))
    header = {"format": FORMAT, "version": VERSION, "metadata": json.dumps(metadata, sort_keys=True)}
    _replace(path, to_bytes(stored, metadata=header))


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
        if header.get("format") == FORMAT:
            metadata = json.loads(header["metadata"])
            version = header.get("version")
        else:
            metadata, version = None, None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise TideError(f"{path} is damaged or no safetensors file ({error}); calibrate again") from error
    if metadata is None:
        raise TideError(f"{path} is a safetensors file but holds no routers; pass the file 'tide-jax calibrate' wrote")
    if version != VERSION:
        raise TideError(f"{path} has router format {version}, this version reads {VERSION}; calibrate again")
    return {n: _expand(n, stored) for n in stored if not n.endswith(_SCALE)}, metadata


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _replace(path: Path, content: bytes) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise TideError(f"can't write {path} ({error.strerror or error}); choose a writable place with room") from error

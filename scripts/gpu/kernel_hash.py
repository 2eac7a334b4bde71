"""Hash that ties a result to its kernel sources."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def kernel_hash(root: Path = ROOT) -> str:
    """SHA-256 of every ``pallas_kernels/**/*.py`` below `root`: names and bytes, in the order of names."""
    digest = hashlib.sha256()
    for path in sorted((root / "pallas_kernels").rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()

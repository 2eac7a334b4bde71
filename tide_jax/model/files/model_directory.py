"""Finds the files of a model's directory, even after an interrupted replacement."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

COMMITTED = ".tide_jax.committed"
"""Name of a folder inside a model's directory that holds a complete new model.

While it exists, it is the model. One rename creates it, and at that moment the new model replaces the old one
(`convert.output.replacement`).
"""


def model_directory(source: str | Path) -> Path:
    """The folder with the model's files: `source` itself, or its committed folder during a replacement."""
    directory = Path(source).expanduser()
    committed = directory / COMMITTED
    return committed if os.path.isdir(committed) else directory


def model_version(source: str | Path) -> tuple[int, ...] | None:
    """A value that changes when a directory's model is replaced; None if it has no config.json."""
    try:
        found = os.stat(model_directory(source) / "config.json")
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def is_inside(name: str) -> bool:
    """Whether a relative file name found in another file stays inside that file's folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name

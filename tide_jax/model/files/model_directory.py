"""Where the files of a model's directory are, when its replacement was cut short."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

COMMITTED = ".tide_jax.committed"
"""Folder of a complete model in the directory that it is about to fill. While it is there, it is the model: making it,
by one rename, is the moment at which a new model takes the place of an old one (`convert.output.replacement`)."""


def model_directory(source: str | Path) -> Path:
    """The folder whose files are the model in directory `source`: that one, but for moments."""
    directory = Path(source).expanduser()
    committed = directory / COMMITTED
    return committed if os.path.isdir(committed) else directory


def model_version(source: str | Path) -> tuple[int, ...] | None:
    """Tells whether a directory's model was replaced between two calls; None where it has no config.json."""
    try:
        found = os.stat(model_directory(source) / "config.json")
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def is_inside(name: str) -> bool:
    """Whether a relative file name that another file gives stays in that file's folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name

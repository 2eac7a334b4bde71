"""Facts about the machine that measuring scripts report beside their numbers, and how they save reports."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax


def machine(*more: str) -> dict[str, Any]:
    """Describes the machine of a measurement, with the versions of `more` packages."""
    names = ("jax", "flax", "numpy", "transformers", "tide_jax", *more)
    versions = {name: __import__(name).__version__ for name in names}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["torch"] = importlib.metadata.version("torch")  # importing it takes seconds
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
    }


def reason(error: Exception) -> str:
    """Describes an error in one line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def save(path: Path | None, report: dict[str, Any]) -> None:
    """Writes a report as JSON, complete or not at all; does nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        temporary.replace(path)

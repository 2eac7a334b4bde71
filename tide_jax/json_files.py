"""Reads JSON files of a checkpoint, with errors that a user can act on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tide_jax.errors import TideError, first_line

GET_AGAIN = "download or copy it again"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises TideError if the file is missing or holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TideError(f"{path} is missing: {path.parent} is not a complete checkpoint, {GET_AGAIN}") from None
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise TideError(f"{path} cannot be read as JSON ({first_line(error)}): {GET_AGAIN}") from error
    if not isinstance(values, dict):
        raise TideError(f"{path} holds a JSON {type(values).__name__}, expected an object: {GET_AGAIN}")
    return values

"""Chat templates in the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tide_jax.errors import TideError
from tide_jax.json_files import read_json

DEFAULT = "default"
# Later files override earlier ones: the first two belong to an image processor, the last to the tokenizer.
_JSON_FILES = ("processor_config.json", "chat_template.json", "tokenizer_config.json")
_DEFAULT_FILE = "chat_template.jinja"
_NAMED_FILES = "additional_chat_templates/*.jinja"


def chat_templates(directory: Path) -> dict[str, str]:
    """All chat templates in a checkpoint's files, by name; "default" is the usual one.

    Raises:
      TideError: a file cannot be read, or a template is not text.
    """
    templates: dict[str, str] = {}
    for path in (directory / name for name in _JSON_FILES):
        if path.is_file():
            templates |= templates_by_name(read_json(path).get("chat_template"), str(path))
    files = {DEFAULT: directory / _DEFAULT_FILE} if (directory / _DEFAULT_FILE).is_file() else {}
    files |= {path.stem: path for path in sorted(directory.glob(_NAMED_FILES)) if path.is_file()}
    return templates | {name: _read_text(path) for name, path in files.items()}


def remove_template_files(directory: Path) -> None:
    """Removes the files that contain only a chat template."""
    for path in (directory / _DEFAULT_FILE, *directory.glob(_NAMED_FILES)):
        path.unlink(missing_ok=True)


def add_chat_templates(tokenizer: Any, directory: Path) -> Any:
    """Sets all chat templates of a checkpoint's files on the tokenizer. Raises TideError as `chat_templates` does."""
    if templates := chat_templates(directory):
        tokenizer.chat_template = templates if set(templates) != {DEFAULT} else templates[DEFAULT]
    return tokenizer


def templates_by_name(stored: Any, where: str) -> dict[str, str]:
    """Templates by name, from any form in which files store them: a text, an object or a list of objects.

    Raises:
      TideError: the value has another form; the message names `where`.
    """
    if stored is None or stored == "":
        return {}
    if isinstance(stored, str):
        return {DEFAULT: stored}
    if isinstance(stored, list) and all(isinstance(entry, Mapping) for entry in stored):
        stored = {entry.get("name"): entry.get("template") for entry in stored}
    if isinstance(stored, Mapping) and all(isinstance(text, str) for pair in stored.items() for text in pair):
        return dict(stored)
    raise TideError(f"{where}: chat_template is not text, expected a template or a list of named templates; correct it")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise TideError(f"{path} can't be read ({reason}), expected a chat template; replace or remove it") from error

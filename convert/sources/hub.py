"""Finds directories on disk or downloads them from the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tide_jax.errors import TideError

CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")
TOKENIZER_FILES = (
    "tokenizer*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
    "processor_config.json",
    "config.json",  # names the tokenizer's class if no other file does
)
_IGNORED_FILES = ["original/*", "consolidated*"]
_WEIGHT_FILES = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]
_HUB_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w.+/-]+))?")
_REASON_CHARACTERS = 120  # longest quote from the hub client's message, in characters


def local_directory(
    reference: str | Path,
    expected: str,
    revision: str | None = None,
    files: Sequence[str] = CHECKPOINT_FILES,
) -> Path:
    """Returns a directory on disk; downloads it first for a hub id.

    Args:
      reference: a directory, or a hub id: "org/name", or "org/name@revision".
      expected: description of the expected kind of directory, for messages.
      revision: branch, tag or commit of a hub id.
      files: patterns of the files to download.

    Raises:
      TideError: there is no such directory, on disk or on the hub, or a directory on disk is given a revision.
    """
    path = Path(reference).expanduser()
    if path.exists() and revision is not None:
        raise TideError(f"{path} is on disk and has no revisions: leave out revision={revision!r}")
    if path.is_dir():
        return path
    if path.exists():
        raise TideError(f"{path} is a file: expected {expected} or a hub id")
    found = _HUB_ID.fullmatch(str(reference))
    if found is None:
        raise TideError(f"{path} does not exist: expected {expected} or a hub id")
    if revision is not None and found["revision"] not in (None, revision):
        raise TideError(f"{reference} names one revision and revision={revision!r} another: give only one of them")
    return _download(found["repository"], revision or found["revision"], files)


def _download(repository: str, revision: str | None, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    ignored = _IGNORED_FILES if "*.safetensors" in files else _IGNORED_FILES + _WEIGHT_FILES
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(files), ignore_patterns=ignored)
        )
    except Exception as error:  # the hub client's errors share no base class, and httpx's get through too
        reason = (str(error).splitlines() or [type(error).__name__])[0][:_REASON_CHARACTERS]
        name = repository if revision is None else f"{repository}@{revision}"
        raise TideError(
            f"{name!r} is not a local path and could not be downloaded from the Hugging Face hub ({reason}): check the "
            "name and the network, or give a directory"
        ) from error

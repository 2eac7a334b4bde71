"""Reads checkpoints in Hugging Face's format: a directory with config.json, safetensors and tokenizer files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tide_jax.errors import TideError
from tide_jax.json_files import read_json
from tide_jax.model.files.checkpoint import CONFIG_KEY
from tide_jax.model.files.model_directory import model_directory
from tide_jax.model.files.shards import ShardedTensors, TensorInfo, cast_in_range
from tide_jax.tokenizer.files import read_tokenizer

_SIDE_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "processor_config.json",  # may hold a chat template
    "*.tiktoken",
    "tekken.json",
    "*.model",
    "*.py",  # the checkpoint's own code: copied, never run
)


class HuggingFaceSource:
    """A directory in the layout of `save_pretrained`: config.json, safetensors, tokenizer files.

    Raises:
      TideError: config.json or a shard is missing or malformed, or the directory is already a converted model.
    """

    def __init__(self, directory: Path) -> None:
        self.description = str(directory)
        self.directory = directory = model_directory(directory)
        self.config = read_json(directory / "config.json")
        _check_types(directory, self.config)
        if CONFIG_KEY in self.config:
            raise TideError(f"{directory} is already a converted model: load it with tide_jax.load")
        generation = directory / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        self._shards = ShardedTensors(directory)
        self.tensors: Mapping[str, TensorInfo] = self._shards.infos
        self.files = self._shards.files

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor; rounds float64 to float32."""
        if self.tensors[name].dtype == "F64":
            return cast_in_range(self._shards.read_stored(name), np.dtype(np.float32), name)
        return self._shards.read(name)

    def read_stored(self, name: str) -> np.ndarray:
        """Reads one tensor as stored, including packed integers and 8-bit floats."""
        return self._shards.read_stored(name)

    def write_side_files(self, directory: Path) -> None:
        """Copies tokenizer files and generation_config.json."""
        copy_side_files(self.directory, directory)

    def load_tokenizer(self) -> Any:
        """Returns the directory's tokenizer. Raises TideError if there is none."""
        return read_tokenizer(self.directory)


def _check_types(directory: Path, config: dict[str, Any]) -> None:
    """Raises TideError if config.json has the wrong type for a key that decides how to read the rest."""
    expected = {"model_type": (str, "a string"), "architectures": (list, "a list"), "auto_map": (dict, "an object")}
    for name, (kind, described) in expected.items():
        value = config.get(name)
        values = value if isinstance(value, list) else value.values() if isinstance(value, dict) else []
        if (value is not None and not isinstance(value, kind)) or not all(isinstance(v, (str, list)) for v in values):
            raise TideError(f"{directory}: config.json has {name}={value!r}, expected {described}; correct it")


def copy_side_files(source: Path, destination: Path) -> None:
    """Copies tokenizer files and generation_config.json between directories.

    Raises:
      TideError: a file is a link to somewhere outside `source`. Copying it would put a foreign file into a model that
        may be passed on.
    """
    for path in sorted({path for pattern in _SIDE_FILES for path in source.glob(pattern) if path.is_file()}):
        _check_link_target(path, source)
        copy = destination / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def _check_link_target(path: Path, directory: Path) -> None:
    """Raises TideError if a file is a link out of its directory; links into the repository's hub cache are fine."""
    real_directory = Path(os.path.realpath(directory))
    allowed = [real_directory]
    for folder in (
        real_directory,
        *real_directory.parents,
    ):  # .../models--org--name/snapshots/revision links to .../blobs
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            allowed.append(folder.parent.parent / "blobs")
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise TideError(
            f"{path} is a link to {target}, outside its checkpoint: replace the link by a copy, or delete it"
        )

"""Where weights come from: a Hugging Face directory, a hub repository or a GGUF file, behind one protocol."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tide_jax.checkpoint import CONFIG_KEY, tokenizer_in
from tide_jax.errors import TideError
from tide_jax.model_directory import model_directory
from tide_jax.shards import ShardedTensors, TensorInfo, read_json

__all__ = ["HuggingFaceSource", "Source", "TensorInfo", "open_source"]

_SIDE_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
    "*.model",
    "*.py",  # code a checkpoint brings: copied, never run
)
CONV1D_TYPES = ("gpt2", "openai-gpt")  # model types that store weights as [in, out]
ADAPTER_CONFIG = "adapter_config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class Source(Protocol):
    """A checkpoint in somebody else's format.

    Attributes:
      description: what it is, for messages and the conversion record.
      config: the values of its config.json, under Hugging Face's names.
      generation_config: the values of its generation_config.json, empty without one.
      tensors: shape and dtype name of every stored tensor, under Hugging Face's names and layout.
      files: the weight files, for hashing.

    A source that shows less than its files hold has `left_out`, too: the other tensors, with the reason. One whose
    tensors differ from what transformers makes of the files has `rewritten`, which is true.
    """

    description: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: list[Path]

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32, float16 or bfloat16; the source keeps no reference to it."""
        ...

    def write_side_files(self, directory: Path) -> None:
        """Puts tokenizer files and generation_config.json into `directory`."""
        ...

    def load_tokenizer(self) -> Any:
        """The checkpoint's tokenizer, a `transformers.PreTrainedTokenizerFast`."""
        ...


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
            raise TideError(f"{directory} is a converted model already: load it with tide_jax.load")
        generation = directory / "generation_config.json"
        self.generation_config = read_json(generation) if generation.is_file() else {}
        self._shards = ShardedTensors(directory)
        self.tensors: Mapping[str, TensorInfo] = self._shards.infos
        self.files = self._shards.files

    def read(self, name: str) -> np.ndarray:
        """One tensor, freshly read."""
        return self._shards.read(name)

    def read_stored(self, name: str) -> np.ndarray:
        """One tensor, packed integers and 8-bit floats too."""
        return self._shards.read_stored(name)

    def write_side_files(self, directory: Path) -> None:
        """Copies tokenizer files and generation_config.json."""
        copy_side_files(self.directory, directory)

    def load_tokenizer(self) -> Any:
        """`AutoTokenizer` over the directory. Raises TideError where it holds no tokenizer."""
        return tokenizer_in(self.directory)


def _check_types(directory: Path, config: dict[str, Any]) -> None:
    """Raises TideError where what says how to read the rest is of the wrong type."""
    expected = {"model_type": (str, "a string"), "architectures": (list, "a list"), "auto_map": (dict, "an object")}
    for name, (kind, described) in expected.items():
        value = config.get(name)
        values = value if isinstance(value, list) else value.values() if isinstance(value, dict) else []
        if (value is not None and not isinstance(value, kind)) or not all(isinstance(v, (str, list)) for v in values):
            raise TideError(f"{directory}: config.json has {name}={value!r}, expected {described}; correct it")


def copy_side_files(source: Path, destination: Path) -> None:
    """Copies tokenizer files and generation_config.json between directories.

    Raises:
      TideError: one is a link that leads out of `source`: what lies there would become part of a model to hand on.
    """
    for path in sorted({path for pattern in _SIDE_FILES for path in source.glob(pattern) if path.is_file()}):
        _check_own(path, source)
        shutil.copyfile(path, destination / path.name)


def _check_own(path: Path, directory: Path) -> None:
    """Raises TideError where a file leads out of its directory, but for links into the hub cache of its repository."""
    place = Path(os.path.realpath(directory))
    own = [place]
    for folder in (place, *place.parents):  # .../models--org--name/snapshots/revision links to .../blobs
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            own.append(folder.parent.parent / "blobs")
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(folder) for folder in own):
        raise TideError(
            f"{path} is a link to {target}, outside of its checkpoint: put a copy there if it belongs to it"
        )


def open_source(reference: str | Path) -> Source:
    """Opens a checkpoint for reading.

    Args:
      reference: a directory, a `.gguf` file (or a directory holding just one), or a Hugging Face hub id.

    Raises:
      TideError: nothing is there, or it is not a checkpoint that can be read.
    """
    path = Path(reference).expanduser()
    if path.suffix == ".gguf":
        return _open_gguf(path)
    return _open_directory(local_directory(reference, "a checkpoint directory, a .gguf file"))


def local_directory(reference: str | Path, expected: str) -> Path:
    """A directory, that of a hub id downloaded. Raises TideError, naming what was `expected`, where there is none."""
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise TideError(f"{path} is a file: expected {expected} or a hub id")
    if not _HUB_ID.fullmatch(str(reference)):
        raise TideError(f"{path} does not exist: expected {expected} or a hub id")
    return _download(str(reference))


def _open_gguf(path: Path) -> Source:
    if not path.is_file():
        raise TideError(f"{path} does not exist: expected a GGUF file")
    from convert.gguf_source import GGUFSource

    return GGUFSource(path)


def _open_directory(path: Path) -> Source:
    weights = sorted(path.glob("*.gguf"))
    models = {re.sub(r"-\d{5}-of-", "-of-", weight.name) for weight in weights}  # a model may lie in several parts
    if len(models) == 1 and not (path / "config.json").exists():
        return _open_gguf(weights[0])
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").exists():
        raise _adapter_alone(path)
    source = HuggingFaceSource(path)
    if not source.config.get("quantization_config"):
        return source
    from convert.quantised import QuantisedSource

    return QuantisedSource(source)


def _adapter_alone(path: Path) -> TideError:
    base = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path") or "the checkpoint it was trained on"
    here = " (which is there)" if Path(str(base)).expanduser().is_dir() else ""
    return TideError(f"{path} is an adapter, not a checkpoint: convert its base {base}{here}, with adapter={path}")


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"],
                ignore_patterns=["original/*", "consolidated*"],
            )
        )
    except Exception as error:  # the hub client's errors share no base class, and httpx's reach the caller too
        raise TideError(
            f"{repository!r} is no local path and could not be had from the Hugging Face hub "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}): check the name and the network, "
            "or give a directory"
        ) from error

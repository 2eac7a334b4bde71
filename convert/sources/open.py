"""Where weights come from: a Hugging Face directory, a hub repository or a GGUF file, behind one protocol."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from convert.sources.hub import TOKENIZER_FILES, local_directory
from tide_jax.errors import TideError
from tide_jax.json_files import read_json
from tide_jax.model.files.checkpoint import CONFIG_KEY
from tide_jax.model.files.model_directory import model_directory
from tide_jax.model.files.shards import ShardedTensors, TensorInfo, checked_cast
from tide_jax.tokenizer.files import tokenizer_in

__all__ = ["HuggingFaceSource", "Source", "TensorInfo", "open_source", "open_tokenizer", "steps_of"]

_SIDE_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "processor_config.json",  # it may hold a chat template
    "*.tiktoken",
    "tekken.json",
    "*.model",
    "*.py",  # code a checkpoint brings: copied, never run
)
CONV1D_TYPES = ("gpt2", "openai-gpt")  # model types that store weights as [in, out]
ADAPTER_CONFIG = "adapter_config.json"


class Source(Protocol):
    """A checkpoint in somebody else's format.

    Attributes:
      description: what it is, for messages and the conversion record.
      config: the values of its config.json, under Hugging Face's names.
      generation_config: the values of its generation_config.json, empty without one.
      tensors: shape and dtype name of every stored tensor, under Hugging Face's names and layout.
      files: the weight files, for hashing.

    A source that shows less than its files hold has `left_out`, too: the other tensors, with the reason. One whose
    tensors differ from what transformers makes of the files has `rewritten`, which is true. One that holds integers has
    `steps` (`steps_of`).
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


def steps_of(source: Source, name: str) -> np.ndarray | None:
    """What each number of a tensor is a whole multiple of, where the source holds integers with a scale for an output.

    Returns:
      float32 in the tensor's shape, a read-only view that takes no memory; None for other tensors.
    """
    steps = getattr(source, "steps", None)
    return None if steps is None else steps(name)


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
        """One tensor, freshly read; float64 is rounded to float32."""
        if self.tensors[name].dtype == "F64":
            return checked_cast(self._shards.read_stored(name), np.dtype(np.float32), name)
        return self._shards.read(name)

    def read_stored(self, name: str) -> np.ndarray:
        """One tensor, packed integers and 8-bit floats too."""
        return self._shards.read_stored(name)

    def write_side_files(self, directory: Path) -> None:
        """Copies tokenizer files and generation_config.json."""
        copy_side_files(self.directory, directory)

    def load_tokenizer(self) -> Any:
        """The directory's tokenizer. Raises TideError where it holds none."""
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
        copy = destination / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


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


def open_source(reference: str | Path, *, revision: str | None = None) -> Source:
    """Opens a checkpoint for reading.

    Args:
      reference: a directory, a `.gguf` file (or a directory holding just one), or a Hugging Face hub id: "org/name", or
        "org/name@revision".
      revision: branch, tag or commit of a hub id.

    Raises:
      TideError: nothing is there, it is not a checkpoint that can be read, or files on disk are given a revision.
    """
    if (path := _gguf_file(reference, revision)) is not None:
        return _open_gguf(path)
    return _open_directory(local_directory(reference, "a checkpoint directory, a .gguf file", revision))


def open_tokenizer(reference: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a checkpoint, or of a directory that holds nothing else; of a hub id no weights are downloaded.

    It is a `transformers.PreTrainedTokenizerFast`. Code that the checkpoint brings is not run.

    Args:
      reference: a directory, a `.gguf` file (or a directory holding just one), or a hub id.
      revision: branch, tag or commit of a hub id.

    Raises:
      TideError: there is no tokenizer, or none that can be read.
    """
    path = _gguf_file(reference, revision)
    if path is None:
        path = local_directory(reference, "a directory with a tokenizer, a .gguf file", revision, TOKENIZER_FILES)
        if (path / "tokenizer.json").is_file() or (weights := _only_gguf(path)) is None:
            return tokenizer_in(path)
        path = weights
    from convert.sources.gguf.source import tokenizer_of

    return tokenizer_of(path)


def _gguf_file(reference: str | Path, revision: str | None) -> Path | None:
    """The file, where a GGUF file is meant. Raises TideError where it is missing, or is given a revision."""
    path = Path(reference).expanduser()
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise TideError(f"{path} does not exist: expected a GGUF file")
    if revision is not None:
        raise TideError(f"{path} is on disk: revision={revision!r} is of hub ids, leave it out")
    return path


def _only_gguf(directory: Path) -> Path | None:
    """The GGUF model of a directory that holds just one, its first part if it lies in several."""
    weights = sorted(directory.glob("*.gguf"))
    models = {re.sub(r"-\d{5}-of-", "-of-", weight.name) for weight in weights}
    return weights[0] if len(models) == 1 and not (directory / "config.json").exists() else None


def _open_gguf(path: Path) -> Source:
    from convert.sources.gguf.source import GGUFSource

    return GGUFSource(path)


def _open_directory(path: Path) -> Source:
    if (weights := _only_gguf(path)) is not None:
        return _open_gguf(weights)
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").exists():
        raise _adapter_alone(path)
    source = HuggingFaceSource(path)
    if not source.config.get("quantization_config"):
        return source
    from convert.sources.quantised.source import QuantisedSource

    return QuantisedSource(source)


def _adapter_alone(path: Path) -> TideError:
    base = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path") or "the checkpoint it was trained on"
    here = " (which is there)" if Path(str(base)).expanduser().is_dir() else ""
    return TideError(f"{path} is an adapter, not a checkpoint: convert its base {base}{here}, with adapter={path}")

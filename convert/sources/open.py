"""Opens a checkpoint with the reader of its format: a directory, a hub repository or a GGUF file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from convert.sources.base import ADAPTER_CONFIG, Source
from convert.sources.gguf.source import GGUFSource, tokenizer_of
from convert.sources.hub import TOKENIZER_FILES, local_directory
from convert.sources.huggingface import HuggingFaceSource
from convert.sources.quantised.source import QuantisedSource
from tide_jax.errors import TideError
from tide_jax.json_files import read_json
from tide_jax.tokenizer.files import read_tokenizer


def open_source(reference: str | Path, *, revision: str | None = None) -> Source:
    """Opens a checkpoint for reading.

    Args:
      reference: a directory, a `.gguf` file (or a directory holding just one), or a Hugging Face hub id: "org/name", or
        "org/name@revision".
      revision: branch, tag or commit of a hub id.

    Raises:
      TideError: there is no checkpoint, it cannot be read, or files on disk are given a revision.
    """
    if (path := _gguf_file(reference, revision)) is not None:
        return GGUFSource(path)
    return _open_directory(local_directory(reference, "a checkpoint directory, a .gguf file", revision))


def open_tokenizer(reference: str | Path, *, revision: str | None = None) -> Any:
    """Returns a checkpoint's tokenizer as a `transformers.PreTrainedTokenizerFast`, without downloading weights.

    The directory may hold just a tokenizer. Code inside the checkpoint is not run.

    Args:
      reference: a directory, a `.gguf` file (or a directory holding just one), or a hub id.
      revision: branch, tag or commit of a hub id.

    Raises:
      TideError: there is no tokenizer, or it cannot be read.
    """
    path = _gguf_file(reference, revision)
    if path is None:
        path = local_directory(reference, "a directory with a tokenizer, a .gguf file", revision, TOKENIZER_FILES)
        if (path / "tokenizer.json").is_file() or (weights := _single_gguf(path)) is None:
            return read_tokenizer(path)
        path = weights
    return tokenizer_of(path)


def _gguf_file(reference: str | Path, revision: str | None) -> Path | None:
    """The file if `reference` names a GGUF file, else None. Raises TideError if it is missing or given a revision."""
    path = Path(reference).expanduser()
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise TideError(f"{path} does not exist: expected a GGUF file")
    if revision is not None:
        raise TideError(f"{path} is on disk and has no revisions: leave out revision={revision!r}")
    return path


def _single_gguf(directory: Path) -> Path | None:
    """The only GGUF model of a directory, or its first part; None if there is no such file or several."""
    weights = sorted(directory.glob("*.gguf"))
    models = {re.sub(r"-\d{5}-of-", "-of-", weight.name) for weight in weights}
    return weights[0] if len(models) == 1 and not (directory / "config.json").exists() else None


def _open_directory(path: Path) -> Source:
    if (weights := _single_gguf(path)) is not None:
        return GGUFSource(weights)
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").exists():
        raise _adapter_error(path)
    source = HuggingFaceSource(path)
    return QuantisedSource(source) if source.config.get("quantization_config") else source


def _adapter_error(path: Path) -> TideError:
    base = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path") or "the checkpoint it was trained on"
    hint = " (which is a directory here)" if Path(str(base)).expanduser().is_dir() else ""
    return TideError(f"{path} is an adapter, not a checkpoint: convert its base {base}{hint}, with adapter={path}")

"""The text decoder inside a multimodal checkpoint, shown as a checkpoint of its own."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.configuration.settings import configuration
from convert.configuration.sizes import check_sizes
from convert.sources.base import Source, steps_of
from tide_jax.errors import TideError
from tide_jax.model.files.shards import TensorInfo

logger = logging.getLogger(__name__)
_TEXT = re.compile(r"(?:^|(?<=\.))(?:language_model|text_model)\.(?:model\.)?")
_HEAD = re.compile(r"(?:language_model\.)?lm_head\.(?:weight|bias)")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OTHER = re.compile(
    r"(model\.)?(vision|visual|image|video|audio|speech|vq|mm_|multi_modal|multimodal|merger|connector).*"
)


def text_decoder(source: Source) -> Source:
    """The decoder of a checkpoint that reads images or sound, too; the source itself where it reads text only.

    Raises:
      TideError: a count of the configuration is out of its bounds.
    """
    try:
        check_sizes(source.config)
    except TideError as error:
        raise TideError(f"{source.description}: {error}") from error
    text = _text_config(source)
    return source if text is None else TextSource(source, text)


class TextSource:
    """The text decoder of a multimodal checkpoint, with the names it has when it stands alone.

    Attributes:
      left_out: the tensors of the other parts, with the reason.
    """

    def __init__(self, whole: Source, text_config: dict[str, Any]) -> None:
        self._whole = whole
        self.files, self.generation_config = whole.files, whole.generation_config
        self._stored = _text_names(whole.tensors)
        reason = f"belongs to another part of the multimodal {whole.config['model_type']}"
        self.rewritten = getattr(whole, "rewritten", False)
        others = {name: reason for name in whole.tensors if name not in set(self._stored.values())}
        self.left_out: dict[str, str] = getattr(whole, "left_out", {}) | others
        self.tensors: Mapping[str, TensorInfo] = {name: whole.tensors[stored] for name, stored in self._stored.items()}
        self.config = text_config
        self.description = f"{whole.description} (the text decoder of {whole.config['model_type']})"
        logger.info("%s: %d tensors of other parts are left out", self.description, len(self.left_out))

    def read(self, name: str) -> np.ndarray:
        """One tensor, freshly read."""
        if name not in self._stored:
            raise TideError(f"{self.description} has no tensor {name}")
        return self._whole.read(self._stored[name])

    def steps(self, name: str) -> np.ndarray | None:
        """As `convert.sources.open.steps_of`."""
        return steps_of(self._whole, self._stored[name])

    def write_side_files(self, directory: Path) -> None:
        """Copies tokenizer files and generation_config.json."""
        self._whole.write_side_files(directory)

    def load_tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return self._whole.load_tokenizer()


def _text_config(source: Source) -> dict[str, Any] | None:
    """The text part of a composite configuration; None where the whole is a text model, not known or not valid."""
    from transformers import CONFIG_MAPPING

    model_type = source.config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        return None
    try:
        whole = configuration(CONFIG_MAPPING[model_type], source.config)
    except Exception:  # its validators raise several unrelated classes; who reads the configuration next reports them
        return None
    if whole.is_encoder_decoder:
        return None
    text = whole.get_text_config(decoder=True)
    if text is whole or not hasattr(text, "to_dict"):
        return None
    # transformers' generate asks the whole configuration for these first, and the text part for what is left unset.
    outer = whole.to_dict()
    ends = {name: outer[name] for name in _TOKEN_IDS if outer.get(name) is not None}
    # The head belongs to the whole, and older checkpoints say it of the text part alone. Where the two disagree, a head
    # that is stored decides (see `convert.tied`); one that neither ties has to be stored.
    tied = any(getattr(part, "tie_word_embeddings", False) for part in (whole, text))
    return text.to_dict() | ends | {"tie_word_embeddings": bool(tied)}


def _text_names(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Names of the text decoder's tensors when it stands alone, and those they are stored under."""
    if any(_TEXT.search(name) for name in tensors):
        return {_alone(name): name for name in tensors if _TEXT.search(name) or _HEAD.fullmatch(name)}
    return {name: name for name in tensors if not _OTHER.fullmatch(name)}


def _alone(name: str) -> str:
    """``model.language_model.layers.0...`` and ``language_model.model.layers.0...`` as ``model.layers.0...``."""
    found = _TEXT.search(name)
    if found is None or _HEAD.fullmatch(name):
        return name.removeprefix("language_model.")
    return f"model.{name[found.end() :]}"

"""Presents the text decoder inside a multimodal checkpoint as a separate checkpoint."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.configuration.settings import build_configuration
from convert.configuration.sizes import check_sizes
from convert.sources.base import Source, steps_of
from tide_jax.errors import TideError
from tide_jax.model.files.shards import TensorInfo

logger = logging.getLogger(__name__)
_TEXT_PREFIX = re.compile(r"(?:^|(?<=\.))(?:language_model|text_model)\.(?:model\.)?")
_HEAD_NAME = re.compile(r"(?:language_model\.)?lm_head\.(?:weight|bias)")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OTHER_PARTS = re.compile(
    r"(model\.)?(vision|visual|image|video|audio|speech|vq|mm_|multi_modal|multimodal|merger|connector).*"
)


def text_decoder(source: Source) -> Source:
    """Returns the text decoder of a checkpoint that also reads images or sound; a text-only source stays as it is.

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
    """The text decoder of a multimodal checkpoint, under the names of a stand-alone decoder.

    Attributes:
      ignored: the tensors of the other parts, with the reason.
    """

    def __init__(self, whole: Source, text_config: dict[str, Any]) -> None:
        self._whole = whole
        self.files, self.generation_config = whole.files, whole.generation_config
        self._stored = _text_names(whole.tensors)
        reason = f"belongs to another part of the multimodal {whole.config['model_type']}"
        self.rewritten = getattr(whole, "rewritten", False)
        others = {name: reason for name in whole.tensors if name not in set(self._stored.values())}
        self.ignored: dict[str, str] = getattr(whole, "ignored", {}) | others
        self.tensors: Mapping[str, TensorInfo] = {name: whole.tensors[stored] for name, stored in self._stored.items()}
        self.config = text_config
        self.description = f"{whole.description} (the text decoder of {whole.config['model_type']})"
        logger.info("%s: %d tensors of other parts are left out", self.description, len(self.ignored))

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        if name not in self._stored:
            raise TideError(f"{self.description} has no tensor {name}")
        return self._whole.read(self._stored[name])

    def steps(self, name: str) -> np.ndarray | None:
        """As `convert.sources.base.steps_of`."""
        return steps_of(self._whole, self._stored[name])

    def write_side_files(self, directory: Path) -> None:
        """Copies tokenizer files and generation_config.json."""
        self._whole.write_side_files(directory)

    def load_tokenizer(self) -> Any:
        """Returns the checkpoint's tokenizer."""
        return self._whole.load_tokenizer()


def _text_config(source: Source) -> dict[str, Any] | None:
    """Text part of a composite configuration; None if the whole is a text model, unknown or invalid."""
    from transformers import CONFIG_MAPPING

    model_type = source.config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        return None
    try:
        whole = build_configuration(CONFIG_MAPPING[model_type], source.config)
    except Exception:  # unrelated classes, from its validators; the next reader of the configuration reports them
        return None
    if whole.is_encoder_decoder:
        return None
    text = whole.get_text_config(decoder=True)
    if text is whole or not hasattr(text, "to_dict"):
        return None
    # transformers' generate reads these from the whole configuration first, and from the text part if unset.
    outer = whole.to_dict()
    token_ids = {name: outer[name] for name in _TOKEN_IDS if outer.get(name) is not None}
    # The head belongs to the whole, but older checkpoints mark it as tied only in the text part. If the two disagree, a
    # stored head decides (see `convert.tied`); a head that neither ties must be stored.
    tied = any(getattr(part, "tie_word_embeddings", False) for part in (whole, text))
    return text.to_dict() | token_ids | {"tie_word_embeddings": bool(tied)}


def _text_names(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Maps names of the stand-alone text decoder's tensors to their stored names."""
    if any(_TEXT_PREFIX.search(name) for name in tensors):
        return {
            _decoder_name(name): name for name in tensors if _TEXT_PREFIX.search(name) or _HEAD_NAME.fullmatch(name)
        }
    return {name: name for name in tensors if not _OTHER_PARTS.fullmatch(name)}


def _decoder_name(name: str) -> str:
    """Returns the name that a tensor has in the text decoder alone.

    ``model.language_model.layers.0...`` and ``language_model.model.layers.0...`` become ``model.layers.0...``.
    """
    found = _TEXT_PREFIX.search(name)
    if found is None or _HEAD_NAME.fullmatch(name):
        return name.removeprefix("language_model.")
    return f"model.{name[found.end() :]}"

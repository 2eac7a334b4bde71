"""Reads checkpoints in GGUF, llama.cpp's file format, one tensor at a time.

`GGUFSource` presents such a file as a Hugging Face checkpoint: configuration, tensor names, orientation and tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.sources.gguf import tokenizer as gguf_tokenizer
from convert.sources.gguf.architectures import ARCHITECTURES, Architecture
from convert.sources.gguf.file import StoredTensor, read_model, shorten
from convert.sources.gguf.hyperparameters import Hyperparameters
from convert.sources.gguf.tensors import Place, arrange, complete_names, layer_of
from tide_jax.errors import TideError
from tide_jax.model.files.shards import TensorInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Read with the hyperparameters.
_ROTARY_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class GGUFSource:
    """Presents a GGUF file as a Hugging Face checkpoint; see `convert.sources.base.Source`.

    Attributes:
      description: file, architecture and storage types.
      config: config.json of the matching transformers model.
      generation_config: token ids to begin, end and pad with.
      tensors: shape (torch's ``[out, in]``) and dtype name of the result of `read`, under Hugging Face names.
      files: the file, or the parts of a model that was split.

    Raises:
      TideError: not a GGUF file, damaged, a part of a model whose other parts are missing, or an unsupported
        architecture or quantisation.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.files, self._metadata, stored = read_model(path)
        name, architecture = _architecture(path, self._metadata)
        try:
            hp = Hyperparameters(path, name, self._metadata, stored)
            self.config = architecture.config(hp)
            hp.check_all_taken()
            self._constants = architecture.constants(hp)
            self._views = arrange(_places(hp, architecture, stored), self.config)
            self.generation_config = gguf_tokenizer.token_ids(self._metadata)
        except TideError:
            raise
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise TideError(
                f"{path} has invalid metadata ({shorten(str(error))}), expected a language model: get it again"
            ) from error
        self.tensors: Mapping[str, TensorInfo] = {key: view.info for key, view in self._views.items()} | {
            key: TensorInfo(values.shape, "F32") for key, values in self._constants.items()
        }
        self.config |= self.generation_config | {"architectures": [_model_class(self.config["model_type"])]}
        kinds = sorted({value.kind.name for value in stored.values()})
        self.description = f"{path} (GGUF, {name}, {len(self.tensors)} tensors in {', '.join(kinds)})"

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor: float32, float16 or bfloat16 as stored, float32 if it was quantised.

        Raises:
          TideError: the file has no tensor of that name.
        """
        if name in self._constants:
            return self._constants[name].copy()
        if name not in self._views:
            raise TideError(f"{self.files[0]} has no tensor {name}, expected one of its {len(self.tensors)} names")
        return self._views[name].read(self.config)

    def load_tokenizer(self) -> PreTrainedTokenizerFast:
        """Returns the tokenizer in the file. Raises TideError if its kind is not supported."""
        tokenizer = gguf_tokenizer.load_tokenizer(self._metadata, self.config["max_position_embeddings"])
        tokenizer.name_or_path = str(self.files[0])
        return tokenizer

    def write_side_files(self, directory: Path) -> None:
        """Writes tokenizer files and generation_config.json. Raises TideError as `load_tokenizer`."""
        self.load_tokenizer().save_pretrained(directory)
        text = json.dumps(self.generation_config, indent=2) + "\n"
        (directory / "generation_config.json").write_text(text, encoding="utf-8")


def tokenizer_of(path: Path) -> PreTrainedTokenizerFast:
    """Returns the tokenizer in a GGUF file, which may hold only that. Raises TideError if it is not supported."""
    _, metadata, _ = read_model(path)
    context = f"{metadata.get('general.architecture')}.context_length"
    tokenizer = gguf_tokenizer.load_tokenizer(metadata, metadata.get(context))
    tokenizer.name_or_path = str(path)
    return tokenizer


def _architecture(path: Path, metadata: Mapping[str, Any]) -> tuple[str, Architecture]:
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise TideError(
            f"{path} has the GGUF architecture {shorten(repr(name))}, expected {', '.join(list(ARCHITECTURES)[:6])} "
            f"or one of {len(ARCHITECTURES) - 6} more; use the model's Hugging Face checkpoint instead"
        )
    return name, ARCHITECTURES[name]


def _model_class(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


def _places(
    hp: Hyperparameters, architecture: Architecture, stored: Mapping[str, StoredTensor]
) -> dict[str, tuple[Place, StoredTensor]]:
    """Place of each stored tensor in the checkpoint. Raises TideError for tensors unknown to the architecture."""
    block, top = (
        names if isinstance(names, Mapping) else names(hp) for names in (architecture.block, architecture.top)
    )
    places = {}
    for name, tensor in stored.items():
        layer, rest = layer_of(name)
        if rest in _ROTARY_TABLES or (layer is not None and layer >= hp.layers and hp.extra_layers):
            continue
        names, prefix = (top, "") if layer is None else (block, f"{architecture.layers}.{layer}.")
        module, dot, kind = rest.rpartition(".")
        if rest in names:
            places[name] = complete_names(names[rest], prefix, ""), tensor
        elif module in names:
            places[name] = complete_names(names[module], prefix, dot + kind), tensor
        else:
            raise TideError(
                f"{hp.path}: tensor {shorten(name)} is not known in the architecture {hp.architecture}; "
                "use the model's Hugging Face checkpoint instead"
            )
    return places

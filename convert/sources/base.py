"""The interface of every source of weights, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tide_jax.model.files.shards import TensorInfo

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's
CONV1D_TYPES = ("gpt2", "openai-gpt")  # model types that store weights as [in, out]


class Source(Protocol):
    """A checkpoint in another package's format.

    Attributes:
      description: description for messages and the conversion record.
      config: values of its config.json, under Hugging Face's names.
      generation_config: values of its generation_config.json, empty if there is none.
      tensors: shape and dtype name of every stored tensor, under Hugging Face's names and layout.
      files: the weight files, for hashing.

    Some sources have more attributes. `whole` is a source with the names that transformers knows. `ignored` maps the
    tensors in the files that the source hides to the reason. `rewritten` is true if the tensors differ from those that
    transformers reads from the files. `steps` exists if the source holds integers (`steps_of`).
    """

    description: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    files: list[Path]

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor as float32, float16 or bfloat16; the source keeps no reference to it."""
        ...

    def write_side_files(self, directory: Path) -> None:
        """Writes tokenizer files and generation_config.json into `directory`."""
        ...

    def load_tokenizer(self) -> Any:
        """Returns the checkpoint's tokenizer, a `transformers.PreTrainedTokenizerFast`."""
        ...


def steps_of(source: Source, name: str) -> np.ndarray | None:
    """Returns the step of each number in a tensor, if the source holds integers with one scale per output.

    A number is a whole multiple of its step.

    Returns:
      float32 in the tensor's shape, a read-only view that takes no memory; None for other tensors.
    """
    steps = getattr(source, "steps", None)
    return None if steps is None else steps(name)

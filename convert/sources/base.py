"""What a source of weights offers, whatever format it reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tide_jax.model.files.shards import TensorInfo

ADAPTER_CONFIG = "adapter_config.json"  # of PEFT
CONV1D_TYPES = ("gpt2", "openai-gpt")  # model types that store weights as [in, out]


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

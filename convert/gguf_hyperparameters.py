"""What a GGUF file says about its model, each value asked for once, so that nothing it says is overlooked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.gguf_file import StoredTensor, read_tensor
from tide_jax.errors import TideError


class Hyperparameters:
    """The `<architecture>.*` values of a file, and which tensors it has.

    Attributes:
      path: the file, for messages.
      architecture: its architecture.
      layers: decoder layers, without those that only predict tokens further ahead.
      extra_layers: the latter, which follow the former.
    """

    def __init__(
        self, path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
    ) -> None:
        self.path = path
        self.architecture = architecture
        self.metadata = metadata
        self.tensors = tensors
        prefix = f"{architecture}."
        self._left = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
        self.extra_layers = self.take("nextn_predict_layers", 0)
        self.layers = self.need("block_count") - self.extra_layers

    def take(self, key: str, default: Any = None) -> Any:
        """A value, one number where the file lists the same one for each layer; TideError where they differ."""
        value = self._left.pop(key, default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise self.refuse(f"{key} differs between layers, expected one value")
        return value[0]

    def peek(self, key: str) -> Any:
        """A value without taking it, None without one."""
        return self._left.get(key)

    def take_list(self, key: str) -> Any:
        """A value that may be a list."""
        return self._left.pop(key, None)

    def need(self, key: str) -> Any:
        """A value every file has. Raises TideError without it."""
        value = self.take(key)
        if value is None:
            raise TideError(f"{self.path} lacks {self.architecture}.{key}, expected in every such file: get it again")
        return value

    def expect(self, key: str, *values: Any) -> None:
        """Raises TideError if the file has another value than one of `values`."""
        if (found := self.take(key, values[0])) not in values:
            raise self.refuse(f"{key}={found!r}: not supported, expected {' or '.join(map(repr, values))}")

    def ignore(self, *keys: str) -> None:
        """Values that say nothing new."""
        for key in keys:
            self.take_list(key)

    def has(self, *names: str) -> bool:
        """Whether the first layer, or any layer for names with ``*``, has one of these tensors."""
        layers = range(self.layers)
        return any(
            any(f"blk.{layer}.{name[1:]}" in self.tensors for layer in layers)
            if name.startswith("*")
            else f"blk.0.{name}" in self.tensors
            for name in names
        )

    def vector(self, name: str) -> np.ndarray | None:
        """A small tensor's values, None where the file has none of that name."""
        stored = self.tensors.get(name)
        return None if stored is None else read_tensor(stored)

    def refuse(self, what: str) -> TideError:
        """The error for a value that is not supported."""
        return TideError(f"{self.path}: {self.architecture}.{what}; use the model's Hugging Face checkpoint instead")

    def check_all_taken(self) -> None:
        """Raises TideError if the file says something nobody asked for."""
        if self._left:
            raise self.refuse(f"{', '.join(sorted(self._left))}: not supported, expected only known settings")

"""What a GGUF file says about its model, each value asked for once, so that nothing it says is overlooked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.sources.gguf.defaults import default
from convert.sources.gguf.file import StoredTensor, read_tensor, shown
from convert.sources.gguf.kinds import check
from convert.sources.gguf.tensors import layer_of
from tide_jax.errors import TideError


class Hyperparameters:
    """The `<architecture>.*` values of a file, and which tensors it has.

    What the file leaves out has llama.cpp's default: see `convert.sources.gguf.defaults`.

    Attributes:
      path: the file, for messages.
      architecture: its architecture.
      metadata: all key-value pairs of the file.
      tensors: where its tensors lie.
      layers: decoder layers, without those that only predict tokens further ahead.
      extra_layers: the latter, which follow the former.

    Raises:
      TideError: a value of the wrong type or outside any model's range.
    """

    def __init__(
        self, path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
    ) -> None:
        check(path, architecture, metadata)
        self.path = path
        self.architecture = architecture
        self.metadata = metadata
        self.tensors = tensors
        prefix = f"{architecture}."
        self._said = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
        self._asked: set[str] = set()
        self.extra_layers = self.take("nextn_predict_layers")
        self.layers = self.take("block_count") - self.extra_layers
        if self.layers < 1:
            raise self.refuse(f"nextn_predict_layers={self.extra_layers}: expected fewer than block_count")

    def take(self, key: str) -> Any:
        """A value, one number where the file lists the same one for each layer.

        Raises:
          TideError: it differs between layers, or the file leaves out what every such file has.
        """
        self._asked.add(key)
        return self.peek(key)

    def take_list(self, key: str) -> Any:
        """A value that may be a list, one entry for each layer."""
        self._asked.add(key)
        return self._said[key] if key in self._said else default(self, key)

    def once(self, key: str, instead: Any = None) -> Any:
        """`take`, but `instead` of what somebody has asked for before."""
        return instead if key in self._asked else self.take(key)

    def peek(self, key: str) -> Any:
        """`take` without taking it."""
        value = self._said[key] if key in self._said else default(self, key)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise self.refuse(f"{key} differs between layers, expected one value")
        return value[0]

    def given(self, key: str) -> Any:
        """What the file itself says, without taking it; None where it does not."""
        return self._said.get(key)

    def expect(self, key: str, *values: Any) -> None:
        """Raises TideError if the file has, or means by leaving it out, another value than one of `values`."""
        if (found := self.take(key)) not in values:
            raise self.refuse(f"{key}={shown(found)}: not supported, expected {' or '.join(map(repr, values))}")

    def ignore(self, *keys: str) -> None:
        """Values that say nothing new."""
        self._asked.update(keys)

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

    def lacks(self, key: str) -> TideError:
        """The error for a key without which nobody can say what the model computes."""
        return TideError(f"{self.path} lacks {self.architecture}.{key}, expected in every such file: get it again")

    def required(self, key: str) -> Any:
        """Raises TideError: for a default that the file's other values do not give."""
        raise self.lacks(key)

    def refuse(self, what: str) -> TideError:
        """The error for a value that is not supported."""
        return TideError(f"{self.path}: {self.architecture}.{what}; use the model's Hugging Face checkpoint instead")

    def check_all_taken(self) -> None:
        """Raises TideError if the file says something nobody asked for, or has other layers than it says."""
        if left := sorted(self._said.keys() - self._asked):
            keys = ", ".join(shown(key) for key in left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            raise self.refuse(f"{keys}: not supported, expected only known settings")
        numbers = {layer_of(name)[0] for name in self.tensors} - {None}
        # A file may leave out the layers that predict tokens further ahead.
        if not self.layers <= len(numbers) <= self.layers + self.extra_layers:
            said = self.layers + self.extra_layers
            raise TideError(
                f"{self.path} has tensors of {len(numbers)} layers, expected block_count={said}: get it again"
            )

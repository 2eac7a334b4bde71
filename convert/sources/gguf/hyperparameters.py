"""Values of a GGUF file about its model. Each is requested once, so that no value is overlooked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.sources.gguf.defaults import default_value
from convert.sources.gguf.file import StoredTensor, read_tensor, shorten
from convert.sources.gguf.kinds import check_values
from convert.sources.gguf.tensors import layer_of
from tide_jax.errors import TideError


class Hyperparameters:
    """The `<architecture>.*` values of a file, and its tensors.

    Values missing from the file have llama.cpp's default: see `convert.sources.gguf.defaults`.

    Attributes:
      path: the file, for messages.
      architecture: its architecture.
      metadata: all key-value pairs of the file.
      tensors: locations of its tensors.
      layers: number of decoder layers, without those that only predict tokens further ahead.
      extra_layers: number of the latter, which follow the former.

    Raises:
      TideError: a value has the wrong type or is outside any model's range.
    """

    def __init__(
        self, path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
    ) -> None:
        check_values(path, architecture, metadata)
        self.path = path
        self.architecture = architecture
        self.metadata = metadata
        self.tensors = tensors
        prefix = f"{architecture}."
        self._stated = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
        self._taken: set[str] = set()
        self.extra_layers = self.take("nextn_predict_layers")
        self.layers = self.take("block_count") - self.extra_layers
        if self.layers < 1:
            raise self.unsupported_error(f"nextn_predict_layers={self.extra_layers}: expected fewer than block_count")

    def take(self, key: str) -> Any:
        """Takes a value; a list with one entry per layer counts as one number if all are equal.

        Raises:
          TideError: it differs between layers, or the file lacks a required key.
        """
        self._taken.add(key)
        return self.peek(key)

    def take_list(self, key: str) -> Any:
        """Takes a value that may be a list with one entry per layer."""
        self._taken.add(key)
        return self._stated[key] if key in self._stated else default_value(self, key)

    def take_once(self, key: str, default: Any = None) -> Any:
        """`take`, but returns `default` if the key was already taken."""
        return default if key in self._taken else self.take(key)

    def peek(self, key: str) -> Any:
        """Returns the value of `take` without marking the key as taken."""
        value = self._stated[key] if key in self._stated else default_value(self, key)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise self.unsupported_error(f"{key} differs between layers, expected one value")
        return value[0]

    def stated_value(self, key: str) -> Any:
        """The file's own value, without taking it; None if it has none."""
        return self._stated.get(key)

    def expect(self, key: str, *values: Any) -> None:
        """Raises TideError if the file's value, or the default of a missing key, is not one of `values`."""
        if (found := self.take(key)) not in values:
            raise self.unsupported_error(
                f"{key}={shorten(found)}: not supported, expected {' or '.join(map(repr, values))}"
            )

    def ignore(self, *keys: str) -> None:
        """Marks keys as taken that carry no new information."""
        self._taken.update(keys)

    def has(self, *names: str) -> bool:
        """Whether the first layer has one of these tensors; for names with ``*``, whether any layer has one."""
        layers = range(self.layers)
        return any(
            any(f"blk.{layer}.{name[1:]}" in self.tensors for layer in layers)
            if name.startswith("*")
            else f"blk.0.{name}" in self.tensors
            for name in names
        )

    def vector(self, name: str) -> np.ndarray | None:
        """A small tensor's values, None if the file has no tensor of that name."""
        stored = self.tensors.get(name)
        return None if stored is None else read_tensor(stored)

    def missing_key_error(self, key: str) -> TideError:
        """The error for a missing key that the model's computation depends on."""
        return TideError(f"{self.path} lacks {self.architecture}.{key}, which every such file has: get it again")

    def raise_missing_key(self, key: str) -> Any:
        """Raises TideError; for defaults that can't be derived from the file's other values."""
        raise self.missing_key_error(key)

    def unsupported_error(self, what: str) -> TideError:
        """The error for a value that is not supported."""
        return TideError(f"{self.path}: {self.architecture}.{what}; use the model's Hugging Face checkpoint instead")

    def check_all_taken(self) -> None:
        """Raises TideError if a value of the file was never taken, or its number of layers is not the stated one."""
        if unknown := sorted(self._stated.keys() - self._taken):
            keys = ", ".join(shorten(key) for key in unknown[:3]) + (
                f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            )
            raise self.unsupported_error(f"{keys}: not supported, expected only known settings")
        numbers = {layer_of(name)[0] for name in self.tensors} - {None}
        # A file may lack the layers that predict tokens further ahead.
        if not self.layers <= len(numbers) <= self.layers + self.extra_layers:
            stated = self.layers + self.extra_layers
            raise TideError(
                f"{self.path} has tensors of {len(numbers)} layers, expected block_count={stated}: get it again"
            )

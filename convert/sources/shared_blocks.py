"""Gives each layer its own copy of a block that layers share in a checkpoint, with the layer's adapters merged in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.families import FAMILIES
from convert.families.base import SharedBlocks
from convert.sources.base import Source, steps_of
from tide_jax.checks import whole_number
from tide_jax.errors import TideError
from tide_jax.model.files.shards import TensorInfo


def with_own_blocks(source: Source) -> Source:
    """Returns a checkpoint whose layers share no block; most families share none, and their sources stay as they are.

    Raises:
      TideError: the number of blocks is no positive integer.
    """
    model_type = source.config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or family.shared_blocks is None:
        return source
    return OwnBlocksSource(source, family.shared_blocks)


class _Origin(NamedTuple):
    """Where a tensor comes from: a stored tensor, and the names of a low-rank adapter's matrices [r, in], [out, r]."""

    stored: str
    adapter: tuple[str, str] | None = None


class OwnBlocksSource:
    """A checkpoint whose layers share no block; see `convert.sources.base.Source`.

    A checkpoint stores a block once, in the first layer that uses it, and transformers ties the others to it. As it
    does, a checkpoint with ``tie_word_embeddings=False`` ties nothing, so layers that store a block have their own.

    Attributes:
      whole: the checkpoint as it is.
    """

    def __init__(self, whole: Source, blocks: SharedBlocks) -> None:
        self.whole = whole
        self.description, self.config = whole.description, whole.config
        self.generation_config, self.files = whole.generation_config, whole.files
        self.rewritten = getattr(whole, "rewritten", False)
        self.ignored: dict[str, str] = getattr(whole, "ignored", {})
        self._origins = _origins(whole, blocks)
        self.tensors: Mapping[str, TensorInfo] = {
            name: whole.tensors[origin.stored] for name, origin in self._origins.items()
        }

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor; with an adapter, the sum in float32."""
        if name not in self._origins:
            raise TideError(f"{self.description} has no tensor {name}")
        origin = self._origins[name]
        tensor = self.whole.read(origin.stored)
        if origin.adapter is None:
            return tensor
        down, up = (self.whole.read(part).astype(np.float32) for part in origin.adapter)
        return tensor.astype(np.float32) + up @ down

    def untied(self) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """The checkpoint as a model that ties nothing: each layer's copy, and zeros for its adapters.

        Returns:
          config.json and tensors; None if no adapter is merged.
        """
        adapters = [(name, origin) for name, origin in self._origins.items() if origin.adapter is not None]
        if not adapters:
            return None
        tensors = {name: self.read(name) for name in self.tensors}
        for name, origin in adapters:
            first, own = (_block_start(each) for each in (origin.stored, name))
            for part in origin.adapter or ():
                tensors[own + part.removeprefix(first)] = np.zeros(self.whole.tensors[part].shape, np.float32)
        if not any(name.startswith("lm_head.") for name in tensors):
            tensors["lm_head.weight"] = self.read(
                next(name for name in tensors if name.endswith("embed_tokens.weight"))
            )
        return self.config | {"tie_word_embeddings": False}, tensors

    def steps(self, name: str) -> np.ndarray | None:
        """As `convert.sources.base.steps_of`; None for tensors with an adapter."""
        origin = self._origins[name]
        return None if origin.adapter is not None else steps_of(self.whole, origin.stored)

    def write_side_files(self, directory: Path) -> None:
        """Copies tokenizer files and generation_config.json."""
        self.whole.write_side_files(directory)

    def load_tokenizer(self) -> Any:
        """Returns the checkpoint's tokenizer."""
        return self.whole.load_tokenizer()


def _origins(source: Source, blocks: SharedBlocks) -> dict[str, _Origin]:
    """Where each tensor comes from."""
    count = 1
    if blocks.count is not None:
        count = whole_number(f"{source.description}: {blocks.count}", source.config.get(blocks.count, 1), 1)
    # Layers with a block, and what each layer stores of one.
    layers, stored, origins = set[int](), dict[int, list[re.Match[str]]](), dict[str, _Origin]()
    inside = re.compile(rf"(?P<start>{_LAYER}{re.escape(blocks.module)}\.)(?P<part>.+)")
    for name in source.tensors:
        if found := inside.fullmatch(name):
            stored.setdefault(int(found["layer"]), []).append(found)
            continue
        origins[name] = _Origin(name)
        if found := re.fullmatch(_LAYER + re.escape(blocks.beside), name):
            layers.add(int(found["layer"]))
    turns, tied = sorted(layers), source.config.get("tie_word_embeddings", True)
    for number, layer in enumerate(turns):
        # Layers use the blocks in turn, and the first layer that uses a block stores it.
        first = layer if layer in stored and not tied else turns[number % count]
        if first not in stored:
            raise TideError(
                f"{source.description}: layer {first} does not store {blocks.module}, expected it there for layers "
                f"{', '.join(map(str, turns[number % count :: count]))}; get the checkpoint again"
            )
        for found in stored[first]:
            if not _is_adapter(found["part"], blocks):
                own = f"{found['prefix']}{layer}.{blocks.module}.{found['part']}"
                origins[own] = _Origin(found[0], _adapter(source, blocks, found["start"], found["part"], number))
    return origins


_LAYER = r"(?P<prefix>(?:.*\.)?layers\.)(?P<layer>\d+)\."


def _block_start(name: str) -> str:
    """What a layer's tensors begin with."""
    found = re.match(_LAYER, name)
    return "" if found is None else found[0]


def _is_adapter(part: str, blocks: SharedBlocks) -> bool:
    return any(part.startswith(f"{adapters.names}.") for adapters in blocks.adapters)


def _adapter(source: Source, blocks: SharedBlocks, start: str, part: str, number: int) -> tuple[str, str] | None:
    """Names of the two matrices that a layer adds to a part of its block; None for parts without an adapter.

    Raises:
      TideError: a matrix is missing, or the two do not multiply to the part.
    """
    module, _, kind = part.rpartition(".")
    adapters = next((each for each in blocks.adapters if each.module == module and kind == "weight"), None)
    if adapters is None or (adapters.flag is not None and not source.config.get(adapters.flag)):
        return None
    names = tuple(f"{start}{adapters.names}.{number}.{i}.weight" for i in range(2))
    down, up = (source.tensors[name].shape if name in source.tensors else None for name in names)
    wanted = source.tensors[start + part].shape
    if down is None or up is None or len(down) != 2 or len(up) != 2 or (up[0], down[1], down[0]) != (*wanted, up[1]):
        found = " and ".join("nothing" if shape is None else str(list(shape)) for shape in (down, up))
        raise TideError(
            f"{source.description}: the adapter {names[0]} and its pair are {found}, expected two matrices that "
            f"multiply to {list(wanted)}; get the checkpoint again"
        )
    return names[0], names[1]

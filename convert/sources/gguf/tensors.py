"""Places of a GGUF file's tensors in a Hugging Face checkpoint, and the inverse of llama.cpp's arrangements."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from convert.sources.gguf.file import StoredTensor, read_tensor
from tide_jax.model.files.shards import TensorInfo

Config = Mapping[str, Any]
Undo = Callable[[np.ndarray, Config], np.ndarray]
_MAX_ENTRIES = 2**16  # limit for experts or heads of a layer, far above any model's


def keep_layout(a: np.ndarray, c: Config) -> np.ndarray:
    """The unchanged tensor."""
    return a


@dataclasses.dataclass(frozen=True)
class To:
    """Destination of one stored tensor.

    Attributes:
      name: name of the checkpoint's tensor or module. ``{i}`` stands for the index along axis 0, whose entries become
        separate tensors.
      undo: restores the checkpoint's arrangement, given config.json's values.
    """

    name: str
    undo: Undo = keep_layout


@dataclasses.dataclass(frozen=True)
class PartOf:
    """Destination of a stored tensor that is joined with others to one tensor of the checkpoint.

    Attributes:
      name: name of the checkpoint's tensor or module.
      index: position among the parts.
      axis: axis along which parts are joined, within one entry of the stack.
      undo: restores the checkpoint's arrangement of one entry.
      stacked: axis 0 of the stored tensors is a stack, of experts or heads.
      alternating: the parts alternate along the axis instead of being concatenated.
      flat: the checkpoint's tensor concatenates the stack's entries along axis 0.
    """

    name: str
    index: int
    axis: int = 0
    undo: Undo = keep_layout
    stacked: bool = True
    alternating: bool = False
    flat: bool = False


@dataclasses.dataclass(frozen=True)
class Split:
    """Destination of a stored tensor that concatenates several tensors of the checkpoint along axis 0.

    Attributes:
      names: names of the checkpoint's modules.
      sizes: number of rows of each, given config.json's values.
    """

    names: tuple[str, ...]
    sizes: Callable[[Config], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Woven:
    """Destination of a stored tensor whose rows the checkpoint has group by group, beside those of other tensors.

    Attributes:
      name: name of the checkpoint's tensor or module.
      index: position among the tensors that are joined.
      groups: number of groups, given config.json's values.
      sizes: rows in one group of each of the tensor's blocks, which are stored one after the other, given the same.
    """

    name: str
    index: int
    groups: Callable[[Config], int]
    sizes: Callable[[Config], tuple[int, ...]]


Place = str | To | PartOf | Split | Woven


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Content of `slot` in a checkpoint's tensor, from one stored tensor or a range of it."""

    stored: StoredTensor
    undo: Undo
    slot: tuple[int | slice, ...] = ()

    def read(self, config: Config) -> np.ndarray:
        return self.undo(read_tensor(self.stored), config)

    def shape(self, config: Config) -> tuple[int, ...]:
        return self.undo(np.broadcast_to(np.zeros((), np.int8), self.stored.shape), config).shape


@dataclasses.dataclass(frozen=True)
class View:
    """A checkpoint's tensor, composed of stored tensors in GGUF files.

    Attributes:
      info: its shape and dtype name.
      pieces: the stored tensors or ranges it consists of.
      joined: shape of all pieces together, before the reshape to the tensor's shape.
    """

    info: TensorInfo
    pieces: tuple[_Piece, ...]
    joined: tuple[int, ...]

    def read(self, config: Config) -> np.ndarray:
        """Reads the tensor with one stored piece in memory at a time."""
        if len(self.pieces) == 1:
            return self.pieces[0].read(config).reshape(self.info.shape)
        first = self.pieces[0].read(config)
        out = np.empty(self.joined, first.dtype if self.info.dtype != "F32" else np.float32)
        out[self.pieces[0].slot] = first
        for piece in self.pieces[1:]:
            out[piece.slot] = piece.read(config)
        return out.reshape(self.info.shape)


def arrange(places: Mapping[str, tuple[Place, StoredTensor]], config: Config) -> dict[str, View]:
    """Returns the checkpoint's tensors, given each stored tensor's place with complete names.

    Raises:
      ValueError: parts do not fit together.
    """
    views: dict[str, View] = {}
    parts: dict[str, list[tuple[PartOf, StoredTensor]]] = {}
    woven: dict[str, list[tuple[Woven, StoredTensor]]] = {}
    for place, stored in places.values():
        if isinstance(place, PartOf):
            parts.setdefault(place.name, []).append((place, stored))
        elif isinstance(place, Woven):
            woven.setdefault(place.name, []).append((place, stored))
        elif isinstance(place, Split):
            views |= _split_rows(place, stored, config)
        else:
            views |= _move(To(place) if isinstance(place, str) else place, stored, config)
    views |= {name: _weave(found, config) for name, found in woven.items()}
    return views | {name: _join(found, config) for name, found in parts.items()}


def _move(place: To, stored: StoredTensor, config: Config) -> dict[str, View]:
    if "{i}" not in place.name:
        return {place.name: _whole_view(stored, place.undo, config)}
    if stored.shape[0] > _MAX_ENTRIES:
        raise ValueError(f"{place.name} has {stored.shape[0]} entries, expected at most {_MAX_ENTRIES}")
    return {
        place.name.replace("{i}", str(index)): _whole_view(stored.item(index), place.undo, config)
        for index in range(stored.shape[0])
    }


def _whole_view(stored: StoredTensor, undo: Undo, config: Config) -> View:
    piece = _Piece(stored, undo)
    shape = piece.shape(config)
    return View(TensorInfo(shape, stored.dtype), (piece,), shape)


def _split_rows(place: Split, stored: StoredTensor, config: Config) -> dict[str, View]:
    sizes = place.sizes(config)
    if sum(sizes) != stored.shape[0]:
        raise ValueError(f"{', '.join(place.names)} have {stored.shape[0]} rows together, expected {sum(sizes)}")
    ends = np.cumsum(sizes).tolist()
    return {
        name: _whole_view(stored.rows(end - size, end), keep_layout, config)
        for name, size, end in zip(place.names, sizes, ends, strict=True)
    }


def _join(found: list[tuple[PartOf, StoredTensor]], config: Config) -> View:
    found = sorted(found, key=lambda part: part[0].index)
    first = found[0][0]
    stack = found[0][1].shape[0] if first.stacked else 1
    if stack > _MAX_ENTRIES:
        # The shape of one entry of the stack: the parts joined along their axis.
        raise ValueError(f"{first.name} has {stack} entries, expected at most {_MAX_ENTRIES}")
    shapes = [_entry(part, stored, 0).shape(config) for part, stored in found]
    lengths = [shape[first.axis] for shape in shapes]
    entry = (*shapes[0][: first.axis], sum(lengths), *shapes[0][first.axis + 1 :])
    pieces = []
    # Each entry of each part goes to its slot in the stack.
    for number, (part, stored) in enumerate(found):
        if first.stacked and stored.shape[0] != stack:
            raise ValueError(
                f"the parts of {part.name} have {stack} and {stored.shape[0]} entries, expected equal numbers"
            )
        start = sum(lengths[:number])
        along = slice(number, None, len(found)) if part.alternating else slice(start, start + lengths[number])
        inside = (*[slice(None)] * part.axis, along)
        pieces += [dataclasses.replace(_entry(part, stored, index), slot=(index, *inside)) for index in range(stack)]
    joined = (stack, *entry)
    shape = entry if not first.stacked else (stack * entry[0], *entry[1:]) if first.flat else joined
    dtypes = {stored.dtype for _, stored in found}
    return View(TensorInfo(shape, dtypes.pop() if len(dtypes) == 1 else "F32"), tuple(pieces), joined)


def _weave(found: list[tuple[Woven, StoredTensor]], config: Config) -> View:
    pieces: list[_Piece] = []
    groups, width = found[0][0].groups(config), 0
    # A block's rows for one group go to the same place within every group.
    for place, stored in sorted(found, key=lambda part: part[0].index):
        first = 0
        for size in place.sizes(config):
            slots = [(group, slice(width, width + size)) for group in range(groups)]
            starts = range(first, first + groups * size, size)
            pieces += [
                _Piece(stored.rows(start, start + size), keep_layout, slot)
                for start, slot in zip(starts, slots, strict=True)
            ]
            first, width = first + groups * size, width + size
        if first != stored.shape[0]:
            raise ValueError(f"{place.name} has parts of {stored.shape[0]} rows, expected {first}")
    rest = found[0][1].shape[1:]
    dtypes = {stored.dtype for _, stored in found}
    info = TensorInfo((groups * width, *rest), dtypes.pop() if len(dtypes) == 1 else "F32")
    return View(info, tuple(pieces), (groups, width, *rest))


def _entry(part: PartOf, stored: StoredTensor, index: int) -> _Piece:
    return _Piece(stored.item(index) if part.stacked else stored, part.undo)


def complete_names(place: Place, prefix: str, suffix: str) -> Place:
    """Adds `prefix` to a place's names, and `suffix` if they are names of modules."""
    if isinstance(place, str):
        return f"{prefix}{place}{suffix}"
    if isinstance(place, Split):
        return dataclasses.replace(place, names=tuple(f"{prefix}{name}{suffix}" for name in place.names))
    return dataclasses.replace(place, name=f"{prefix}{place.name}{suffix}")


_LAYER = re.compile(r"blk\.(\d+)\.(.*)")


def layer_of(name: str) -> tuple[int | None, str]:
    """Layer of a stored tensor (None outside layers), and its name there."""
    match = _LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)

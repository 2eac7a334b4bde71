"""Weight maps as data: which source tensor fills which slot of which parameter, and a proof that everything fits.

A rule matches source tensor names; its targets say where the tensor goes. Several tensors may fill slots of one
parameter (keys and values share a kernel), and one tensor may fill several parameters (a fused projection).
`plan_conversion` plans a whole conversion from names and shapes alone, before any weight is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from tide_jax.errors import TideError, join_problems
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.decoder import abstract_parameters
from tide_jax.model.files.shards import TensorInfo

_PROBLEM_CHARACTERS = 220  # characters in an error message for the listed problems
Take = Callable[[np.ndarray, DecoderConfig], np.ndarray]
Slot = tuple[int | slice, ...]


def whole_tensor(array: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """The unchanged tensor."""
    return array


@dataclasses.dataclass(frozen=True)
class Target:
    """Destination of a source tensor, or of a part of it.

    Attributes:
      path: dotted parameter path; ``{name}`` stands for a named group of the rule's pattern.
      take: selects and arranges the part that goes there, as a view.
      slot: basic index into the parameter, written as in code (``":, :, 0"``, ``"{expert}, :, 1"``); empty for the
        whole parameter.
    """

    path: str
    take: Take = whole_tensor
    slot: str = ""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Says what happens to source tensors whose full name matches `pattern`.

    Attributes:
      pattern: regular expression with named groups.
      targets: destinations; empty if the tensors are left out.
      reason: why tensors without targets are left out.
      blank: an export writes zeros for tensors without targets, because transformers expects them.
      when: the rule applies only to configurations for which this is true.
      layers: the layers, by the pattern's group ``layer``, to which the rule applies; None for all.
      place: the model's layer for a layer of the checkpoint; None if they are the same.
      past: "layer" or "expert": the rule applies only to those past the last one, by the pattern's group of this name.
        There it overrides all other rules.
    """

    pattern: str
    targets: tuple[Target, ...] = ()
    reason: str = ""
    blank: bool = False
    when: Callable[[DecoderConfig], bool] = lambda config: True
    layers: Callable[[DecoderConfig], Collection[int]] | None = None
    place: Callable[[int], int] | None = None
    past: Literal["layer", "expert"] | None = None


def move(source: str, *targets: Target, when: Callable[[DecoderConfig], bool] | None = None) -> Rule:
    """Writes a rule as a name: ``{name}`` is a number, ``[text]`` is optional, everything else is literal.

    >>> move("[model.]layers.{layer}.norm.weight").pattern
    '(?:model\\\\.)?layers\\\\.(?P<layer>\\\\d+)\\\\.norm\\\\.weight'
    """
    pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(source))
    pattern = re.sub(r"\\\[(.*?)\\\]", r"(?:\1)?", pattern)
    return Rule(pattern, targets) if when is None else Rule(pattern, targets, when=when)


def ignore(pattern: str, reason: str, when: Callable[[DecoderConfig], bool] | None = None) -> Rule:
    """A rule that leaves out the tensors matching a regular expression, with the reason."""
    return Rule(pattern, (), reason) if when is None else Rule(pattern, (), reason, when=when)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Transfer of one source tensor, or a part of it, into one slot of one parameter."""

    source: str
    path: str
    slot: Slot
    take: Take


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion whose names and shapes fit.

    Attributes:
      shapes: shape of every parameter, in the order of writing.
      pieces: fill every slot exactly once.
      ignored: source tensors left out, with the reason.
      blank: those of them that an export writes as zeros.
    """

    shapes: dict[str, tuple[int, ...]]
    pieces: tuple[Piece, ...]
    ignored: dict[str, str]
    blank: tuple[str, ...] = ()

    def by_source(self) -> dict[str, list[Piece]]:
        """Pieces of each source tensor."""
        return _group_pieces(self.pieces, lambda piece: piece.source)

    def by_path(self) -> dict[str, list[Piece]]:
        """Pieces of each parameter."""
        return _group_pieces(self.pieces, lambda piece: piece.path)


def plan_conversion(tensors: Mapping[str, TensorInfo], rules: Sequence[Rule], config: DecoderConfig) -> Plan:
    """Matches every source tensor with a rule and every parameter with its sources, without reading data.

    Raises:
      TideError: no rule or several rules match a source tensor, nothing or several tensors fill a parameter or slot, or
        shapes do not fit. The message has the number of problems and the first of them, each with what was expected and
        what was found.
    """
    shapes = abstract_parameters(config)
    compiled = [(re.compile(rule.pattern), rule) for rule in rules if rule.when(config)]
    problems: list[str] = []
    pieces: list[Piece] = []
    ignored: dict[str, str] = {}
    blank: list[str] = []
    # Each source tensor needs exactly one rule, and each target of the rule must accept its shape.
    for name, info in tensors.items():
        matches = _matches(name, compiled, config)
        if len(matches) != 1:
            found = "is unknown to this family" if not matches else f"matches {len(matches)} rules"
            problems.append(f"source tensor {name} {list(info.shape)} {found}, expected one rule")
            continue
        match, rule = matches[0]
        if not rule.targets:
            ignored[name] = rule.reason
            blank += [name] if rule.blank else []
        for piece in (_piece(name, match, target, rule.place) for target in rule.targets):
            if (missing := _missing_place(piece, shapes)) is not None:
                problems.append(f"source tensor {name} {list(info.shape)} would fill {missing}")
                continue
            problems += _shape_problems(piece, info, shapes[piece.path], config)
            pieces.append(piece)
    # Each slot of each parameter needs exactly one piece.
    problems += _fill_problems(shapes, pieces)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        listed_problems = join_problems(problems, width=_PROBLEM_CHARACTERS // min(len(problems), 3))
        raise TideError(f"the checkpoint does not fit its configuration, {count}: {listed_problems}")
    return Plan(shapes, tuple(pieces), ignored, tuple(blank))


def _matches(
    name: str, rules: Sequence[tuple[re.Pattern[str], Rule]], config: DecoderConfig
) -> list[tuple[re.Match[str], Rule]]:
    """Rules that apply to a tensor."""
    found = [(match, rule) for regex, rule in rules if (match := regex.fullmatch(name))]
    matches = [(m, rule) for m, rule in found if rule.layers is None or int(m["layer"]) in rule.layers(config)]
    count = {"layer": config.num_layers, "expert": 0 if config.moe is None else config.moe.num_experts}
    past = [(m, rule) for m, rule in matches if rule.past is not None and int(m[rule.past]) >= count[rule.past]]
    return past or [(match, rule) for match, rule in matches if rule.past is None]


def _piece(name: str, match: re.Match[str], target: Target, place: Callable[[int], int] | None) -> Piece:
    groups: dict[str, Any] = match.groupdict()
    if place is not None:
        groups["layer"] = place(int(groups["layer"]))
    indices = (part.strip() for part in target.slot.format(**groups).split(",")) if target.slot else ()
    slot = tuple(slice(None) if part == ":" else int(part) for part in indices)
    return Piece(name, target.path.format(**groups), slot, target.take)


def _missing_place(piece: Piece, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Describes a piece's destination if the model has no such place; else None."""
    if piece.path not in shapes:
        return f"{piece.path}, which the model does not have"
    shape = shapes[piece.path]
    if all(isinstance(i, slice) or i < size for i, size in zip(piece.slot, shape, strict=False)):
        return None
    return f"{piece.path}{_brackets(piece.slot)}, outside {list(shape)}"


def _shape_problems(piece: Piece, info: TensorInfo, shape: tuple[int, ...], config: DecoderConfig) -> list[str]:
    """Why a tensor can't fill its slot, tested on dummy arrays that take no memory."""
    expected = _dummy(shape)[piece.slot].shape
    problem = f"source tensor {piece.source} has shape {list(info.shape)}"
    where = f"{piece.path}{_brackets(piece.slot)} {list(expected)}"
    try:
        found = piece.take(_dummy(info.shape), config).shape
    except (ValueError, IndexError):
        return [f"{problem}, expected one that can be arranged as {where}"]
    return [] if found == expected else [f"{problem}, which gives {list(found)}, expected {where}"]


def _dummy(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.zeros((), np.int8), shape)


def _fill_problems(shapes: Mapping[str, tuple[int, ...]], pieces: Iterable[Piece]) -> list[str]:
    """Parameters and slots that nothing fills, or several pieces fill."""
    by_path = _group_pieces(pieces, lambda piece: piece.path)
    problems: list[str] = []
    for path, shape in shapes.items():
        filling = by_path.get(path, [])
        count = _fill_count(shape, [piece.slot for piece in filling])
        for slot in _mask_to_slots(count > 1):
            sources = ", ".join(piece.source for piece in filling if _overlap(piece.slot, slot))
            problems.append(f"parameter {path}{_brackets(slot)} is filled more than once, by {sources}")
        for slot in _mask_to_slots(count == 0):
            expected = list(_dummy(shape)[slot].shape)
            problems.append(f"parameter {path}{_brackets(slot)} {expected} has no source tensor")
    return problems


def _fill_count(shape: tuple[int, ...], slots: Sequence[Slot]) -> np.ndarray:
    """How often each slot is filled; axes that no slot indexes collapse to size 1."""
    indexed = {axis for slot in slots for axis, index in enumerate(slot) if isinstance(index, int)}
    count = np.zeros([size if axis in indexed else 1 for axis, size in enumerate(shape)], np.int32)
    for slot in slots:
        count[slot] += 1
    return count


def _mask_to_slots(mask: np.ndarray) -> list[Slot]:
    """Converts the True entries of a fill count's mask to slots."""
    return [
        _trim(tuple(int(i) if size > 1 else slice(None) for i, size in zip(index, mask.shape, strict=True)))
        for index in np.argwhere(mask)
    ]


def _trim(slot: Slot) -> Slot:
    while slot and isinstance(slot[-1], slice):
        slot = slot[:-1]
    return slot


def _overlap(a: Slot, b: Slot) -> bool:
    return all(i == j for i, j in zip(a, b, strict=False) if isinstance(i, int) and isinstance(j, int))


def _brackets(slot: Slot) -> str:
    return "[" + ", ".join(":" if isinstance(i, slice) else str(i) for i in slot) + "]" if slot else ""


def _group_pieces(items: Iterable[Piece], key: Callable[[Piece], str]) -> dict[str, list[Piece]]:
    groups: dict[str, list[Piece]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups

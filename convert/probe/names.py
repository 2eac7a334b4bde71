"""Matches stored tensors to parameters of the reference, and derives the weight map."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from convert.probe.rules import Assignments, Slices
from convert.sources.base import Source
from convert.weights.rules import Rule, Target, ignore, move
from tide_jax.errors import TideError

_SAMPLES = 16


@dataclasses.dataclass(frozen=True)
class Places:
    """Destinations of all parameters of the reference.

    Attributes:
      weights: all parameters by name.
      layers: each layer's destinations; target paths are relative to the layer.
      slices: each layer's parts of stacked parameters.
      outside: destinations of all other parameters.
      ignored: parameters the decoder does not need, with the reason.
    """

    weights: Mapping[str, np.ndarray]
    layers: Sequence[Assignments]
    slices: Sequence[Slices]
    outside: Assignments
    ignored: Mapping[str, str]

    def find(self, parameter: str) -> tuple[int | None, tuple[Target, ...]] | None:
        """Layer (None outside layers) and targets of a parameter or part; None if it has no targets."""
        if parameter in self.outside:
            return None, tuple(self.outside[parameter])
        for layer, (assignments, slices) in enumerate(zip(self.layers, self.slices, strict=True)):
            if parameter in assignments:
                return layer, tuple(assignments[parameter])
            if parameter in slices:
                return layer, (slices[parameter][1],)
        return None


def weight_map(source: Source, places: Places) -> tuple[Rule, ...]:
    """Returns the rules for a checkpoint's tensors, one rule for all layers if the layers agree.

    Raises:
      TideError: the names of the layers' tensors lack the layer's number.
    """
    stored = match_stored_names(source, places)
    rules: list[Rule] = []
    in_layers: list[tuple[str, int, tuple[Target, ...]]] = []
    for name, parameter in stored.items():
        found = None if parameter is None else places.find(parameter)
        if found is None:
            reason = "the reference model has no such parameter" if parameter is None else places.ignored[parameter]
            rules.append(ignore(move(name).pattern, reason))
        elif found[0] is None:
            rules.append(move(name, *found[1]))
        else:
            in_layers.append((name, found[0], found[1]))
    return (*rules, *_layer_rules(in_layers))


def _layer_rules(found: Sequence[tuple[str, int, tuple[Target, ...]]]) -> list[Rule]:
    position = _number_position([(name, layer) for name, layer, _ in found])
    grouped: dict[str, dict[tuple[Target, ...], list[tuple[str, int]]]] = {}
    for name, layer, targets in found:
        parts = name.split(".")
        parts[position] = "{layer}"
        general, targets = _generalise_expert(parts, targets)
        grouped.setdefault(general, {}).setdefault(targets, []).append((name, layer))
    rules = []
    for template, kinds in grouped.items():
        if len(kinds) == 1:
            rules.append(move(template, *(_put_in_layer(target, "{layer}") for target in next(iter(kinds)))))
        else:  # tensors with the same name have different targets in different layers
            rules += [
                move(name.replace(".{expert}.", "."), *(_put_in_layer(target, str(layer)) for target in targets))
                for targets, names in kinds.items()
                for name, layer in names
            ]
    return rules


def _generalise_expert(parts: list[str], targets: tuple[Target, ...]) -> tuple[str, tuple[Target, ...]]:
    """Replaces the expert's number in a tensor's name and targets by a placeholder, if it belongs to one expert."""
    numbers = {target.slot.split(",")[0] for target in targets if target.path.startswith("mlp.experts")}
    number = numbers.pop() if len(numbers) == 1 else ""
    if number.isdigit() and parts.count(number) == 1:
        parts = ["{expert}" if part == number else part for part in parts]
        targets = tuple(
            dataclasses.replace(target, slot=",".join(["{expert}", *target.slot.split(",")[1:]])) for target in targets
        )
    return ".".join(parts), targets


def _put_in_layer(target: Target, layer: str) -> Target:
    return dataclasses.replace(target, path=f"layers.{layer}.{target.path}")


def _number_position(names: Sequence[tuple[str, int]]) -> int:
    """Which part of the tensors' names is the layer's number."""
    common = None
    for name, layer in names:
        found = {i for i, part in enumerate(name.split(".")) if part == str(layer)}
        common = found if common is None else common & found
    if not common:
        raise TideError("the names of the layers' tensors lack the layer's number, so no weight map can be written")
    return min(common)


def match_stored_names(source: Source, places: Places) -> dict[str, str | None]:
    """The parameter, or part of one, for each stored tensor, matched by name and shape, else by its numbers.

    Several parameters with equal numbers are told apart by the longest common end of the name. None marks a tensor that
    the reference does not have.
    """
    known = dict(places.weights)
    unnamed = {name: w for name, w in known.items() if name not in source.tensors}
    for slices in places.slices:
        unnamed |= {name: array for name, (array, _) in slices.items()}
    by_numbers: dict[tuple, list[str]] = {}
    for name, array in unnamed.items():
        by_numbers.setdefault(_fingerprint(array), []).append(name)
    found: dict[str, str | None] = {}
    for name, info in source.tensors.items():
        if name in known and known[name].shape == info.shape:
            found[name] = name
            continue
        tensor = source.read(name).astype(np.float32)
        equal_parameters = [p for p in by_numbers.get(_fingerprint(tensor), ()) if np.array_equal(unnamed[p], tensor)]
        found[name] = max(equal_parameters, key=lambda p: _common_end_length(p, name), default=None)
    return found


def _fingerprint(array: np.ndarray) -> tuple:
    """The shape and a few sampled numbers."""
    places = np.unravel_index(np.linspace(0, max(array.size - 1, 0), _SAMPLES).astype(int), array.shape)
    return array.shape, array[places].astype(np.float32).tobytes() if array.size else b""


def _common_end_length(a: str, b: str) -> int:
    """Length of the common end of two names."""
    return next((i for i, (x, y) in enumerate(zip(a[::-1], b[::-1], strict=False)) if x != y), min(len(a), len(b)))

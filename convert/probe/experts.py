"""Finds the parameters of a mixture's experts: stacked in parameters with three axes, or in numbered modules."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from convert.probe.rules import Assignments, Channels, Oriented, Slices
from convert.probe.trace import Trace
from convert.weights.rules import Target, whole_tensor
from tide_jax.model.activations import gated_activation


@dataclasses.dataclass(frozen=True)
class Projection:
    """One projection of all experts: `names` has one stacked parameter, or one parameter per expert.

    Attributes:
      take: arranges the projection's part as [..., in, out].
      path: parameter it fills.
      slot: destination behind the experts' axis.
    """

    names: tuple[str, ...]
    take: Channels | Oriented | None
    path: str
    slot: str

    def stack(self, weights: Mapping[str, np.ndarray]) -> np.ndarray:
        """Weights of all experts, [E, in, out]."""
        parts = [weights[name] if self.take is None else self.take(weights[name]) for name in self.names]
        return parts[0] if len(parts) == 1 else np.stack(parts)


@dataclasses.dataclass(frozen=True)
class Experts:
    """All experts of a layer; `biases` are those of gate, up and down, or empty."""

    gate: Projection
    up: Projection
    down: Projection
    biases: tuple[Projection, ...] = ()

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Every projection and bias."""
        return (self.gate, self.up, self.down, *self.biases)

    def outputs(self, trace: Trace, x: np.ndarray, activation: str, limit: float | None) -> np.ndarray:
        """Each expert's output for each token, [E, T, D]. `x` is [T, D], or [E, T, D] if the experts' inputs differ."""
        gate, up, down = (part.stack(trace.weights) for part in (self.gate, self.up, self.down))
        hidden = [np.matmul(x, gate), np.matmul(x, up)]
        biases = [bias.stack(trace.weights)[:, None] for bias in self.biases]
        if biases:
            hidden = [part + bias for part, bias in zip(hidden, biases, strict=False)]
        activated = np.asarray(gated_activation(activation, jnp.asarray(hidden[0]), jnp.asarray(hidden[1]), limit))
        out = np.matmul(activated, down)
        return out + biases[2] if biases else out


def find_experts(trace: Trace, layer: str, width: int) -> list[Experts]:
    """Every way to read a layer's parameters as experts, plausible ones first; empty if there are none."""
    parameters = {name: w for name, w in trace.weights.items() if name.startswith(f"{layer}.")}
    return [*_stacked_experts(parameters, width), *_numbered_experts(parameters, layer, width)]


def _stacked_experts(parameters: Mapping[str, np.ndarray], width: int) -> Iterator[Experts]:
    """Experts in parameters [E, ., .]."""
    cubes = {name: w for name, w in parameters.items() if w.ndim == 3 and len(w) > 1 and width in w.shape[1:]}
    for (fused, a), (down, b) in itertools.permutations(cubes.items(), 2):
        for fused_out, down_out in itertools.product((1, 2), (1, 2)):  # the axis of outputs
            size = b.shape[3 - down_out]
            fits = a.shape[3 - fused_out] == width == b.shape[down_out] and a.shape[fused_out] == 2 * size
            for gate, up in _gate_and_up((fused,), fused_out == 1, size) if fits and len(a) == len(b) else ():
                yield _add_flat_biases(parameters, Experts(gate, up, _down((down,), down_out == 1)), size, width)
    for gate, up, down in itertools.permutations(cubes, 3):
        if parameters[gate].shape == parameters[up].shape:
            yield _separate_projections(
                (gate,), (up,), (down,), parameters[gate].shape[2] == width, parameters[down].shape[1] == width
            )


def _numbered_experts(parameters: Mapping[str, np.ndarray], layer: str, width: int) -> Iterator[Experts]:
    """Experts in modules ``parent.0``, ``parent.1``... whose parameters have equal shapes."""
    for found in _numbered_matrices(parameters, layer).values():
        for (fused, a), (down, b) in itertools.permutations(found.items(), 2):
            fits = b[0] == width and a == (2 * b[1], width)
            for gate, up in _gate_and_up(fused, True, b[1]) if fits else ():
                yield _add_biases(parameters, Experts(gate, up, _down(down, True)))
        for (gate, a), (up, b), (down, c) in itertools.permutations(found.items(), 3):
            if a == b == c[::-1] and a[1] == width:
                yield _add_biases(parameters, _separate_projections(gate, up, down, True, True))


def _numbered_matrices(
    parameters: Mapping[str, np.ndarray], layer: str
) -> dict[str, dict[tuple[str, ...], tuple[int, int]]]:
    """For each parent of numbered modules: matrices with the same name in all of them, and their shape."""
    lists: dict[tuple[str, str], dict[int, str]] = {}
    for name, weight in parameters.items():
        parts = name.removeprefix(f"{layer}.").split(".")
        number = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
        if number is not None and weight.ndim == 2:
            key = ".".join(parts[:number]), ".".join(parts[number + 1 :])
            lists.setdefault(key, {})[int(parts[number])] = name
    members: dict[str, dict[tuple[str, ...], tuple[int, int]]] = {}
    for (parent, _), names in lists.items():
        shapes = {(parameters[name].shape[0], parameters[name].shape[1]) for name in names.values()}
        if len(names) > 1 and sorted(names) == list(range(len(names))) and len(shapes) == 1:
            members.setdefault(parent, {})[tuple(names[i] for i in sorted(names))] = shapes.pop()
    return members


def _gate_and_up(names: tuple[str, ...], transposed: bool, size: int) -> Iterator[tuple[Projection, Projection]]:
    """Gate and up projections in one parameter: halves or pairs, either one first."""
    for pairs, swapped in itertools.product((False, True), (False, True)):
        takes = [_gate_or_up(transposed, size, pairs, part ^ swapped) for part in (0, 1)]
        gate, up = (Projection(names, take, "mlp.experts.gate_up", f":, {i}") for i, take in enumerate(takes))
        yield gate, up


def _gate_or_up(transposed: bool, size: int, pairs: bool, which: int) -> Channels:
    return Channels(transposed, which, size, 2, 1) if pairs else Channels(transposed, which * size, 1, size, size)


def _down(names: tuple[str, ...], transposed: bool) -> Projection:
    return Projection(names, Oriented() if transposed else None, "mlp.experts.down", "")


def _separate_projections(
    gate: tuple[str, ...], up: tuple[str, ...], down: tuple[str, ...], transposed: bool, down_transposed: bool
) -> Experts:
    take = Oriented() if transposed else None
    first, second = (Projection(part, take, "mlp.experts.gate_up", f":, {i}") for i, part in enumerate((gate, up)))
    return Experts(first, second, _down(down, down_transposed))


def _add_flat_biases(parameters: Mapping[str, np.ndarray], experts: Experts, size: int, width: int) -> Experts:
    """Adds the biases [E, 2 F] and [E, D] of stacked experts, if there are any."""
    count = len(parameters[experts.down.names[0]])
    flat = {name: w.shape for name, w in parameters.items() if "bias" in name}
    gate_up_bias = next((name for name, shape in flat.items() if shape == (count, 2 * size)), None)
    down_bias = next((name for name, shape in flat.items() if name != gate_up_bias and shape == (count, width)), None)
    if gate_up_bias is None or down_bias is None:
        return experts
    return _set_biases(experts, ((gate_up_bias,), (gate_up_bias,), (down_bias,)))


def _add_biases(parameters: Mapping[str, np.ndarray], experts: Experts) -> Experts:
    """Adds the biases beside the weights, if all weights have one."""
    weights = (experts.gate, experts.up, experts.down)
    names = tuple(tuple(f"{name.removesuffix('weight')}bias" for name in part.names) for part in weights)
    return _set_biases(experts, names) if all(name in parameters for part in names for name in part) else experts


def _set_biases(experts: Experts, names: Sequence[tuple[str, ...]]) -> Experts:
    takes = [
        dataclasses.replace(part.take, transposed=False) if isinstance(part.take, Channels) else None
        for part in (experts.gate, experts.up, experts.down)
    ]
    places = (("gate_up_bias", "0"), ("gate_up_bias", "1"), ("down_bias", ""))
    biases = tuple(
        Projection(part, take, f"mlp.experts.{path}", slot)
        for part, take, (path, slot) in zip(names, takes, places, strict=True)
    )
    return dataclasses.replace(experts, biases=biases)


def expert_tensors(
    assignments: Assignments, slices: Slices, experts: Experts, weights: Mapping[str, np.ndarray]
) -> None:
    """Adds the places of the experts' parameters, and to `slices` those of single experts in stacked parameters.

    A checkpoint may store experts one by one where the reference stacks them.
    """
    for part in experts.projections:
        if len(part.names) > 1:
            for expert, name in enumerate(part.names):
                slot = f"{expert}, {part.slot}" if part.slot else f"{expert}"
                assignments.setdefault(name, []).append(Target(part.path, part.take or whole_tensor, slot))
            continue
        name, slot = next(iter(part.names)), f":, {part.slot}" if part.slot else ""
        assignments.setdefault(name, []).append(Target(part.path, part.take or whole_tensor, slot))
        for expert, matrix in enumerate(part.stack(weights)):
            slot = f"{expert}, {part.slot}" if part.slot else f"{expert}"
            take = Oriented() if matrix.ndim == 2 else whole_tensor
            slices[f"{name}[{expert}]{part.slot}"] = matrix.T, Target(part.path, take, slot)

"""Where the experts of a mixture lie: stacked in parameters of three axes, or in numbered modules of their own."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from convert.probe_rules import Assigned, Channels, Oriented, Slices
from convert.probe_trace import Trace
from convert.rules import Target, whole
from tide_jax.activations import gated


@dataclasses.dataclass(frozen=True)
class Projection:
    """One projection of all experts: `names` is one stacked parameter, or one for each expert.

    Attributes:
      take: arranges what belongs to it as [..., in, out].
      slot: where that goes behind the experts' axis.
    """

    names: tuple[str, ...]
    take: Channels | Oriented | None
    path: str
    slot: str

    def stack(self, weights: Mapping[str, np.ndarray]) -> np.ndarray:
        """The weights of all experts, [E, in, out]."""
        parts = [weights[name] if self.take is None else self.take(weights[name]) for name in self.names]
        return parts[0] if len(parts) == 1 else np.stack(parts)


@dataclasses.dataclass(frozen=True)
class Experts:
    """All experts of a layer; `biases` are those of gate, up and down, or nothing."""

    gate: Projection
    up: Projection
    down: Projection
    biases: tuple[Projection, ...] = ()

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Everything that has weights."""
        return (self.gate, self.up, self.down, *self.biases)

    def outputs(self, trace: Trace, x: np.ndarray, activation: str, limit: float | None) -> np.ndarray:
        """What every expert gives for every token, [E, T, D]; `x` is [T, D], or [E, T, D] where inputs differ."""
        gate, up, down = (part.stack(trace.weights) for part in (self.gate, self.up, self.down))
        hidden = [np.matmul(x, gate), np.matmul(x, up)]
        biases = [bias.stack(trace.weights)[:, None] for bias in self.biases]
        if biases:
            hidden = [part + bias for part, bias in zip(hidden, biases, strict=False)]
        mixed = np.asarray(gated(activation, jnp.asarray(hidden[0]), jnp.asarray(hidden[1]), limit))
        out = np.matmul(mixed, down)
        return out + biases[2] if biases else out


def find_experts(trace: Trace, layer: str, width: int) -> list[Experts]:
    """Every way a layer's parameters may be experts, plausible ones first; none where it has no experts."""
    own = {name: w for name, w in trace.weights.items() if name.startswith(f"{layer}.")}
    return [*_stacked(own, width), *_numbered(own, layer, width)]


def _stacked(own: Mapping[str, np.ndarray], width: int) -> Iterator[Experts]:
    cubes = {name: w for name, w in own.items() if w.ndim == 3 and len(w) > 1 and width in w.shape[1:]}
    for (fused, a), (down, b) in itertools.permutations(cubes.items(), 2):
        if len(a) != len(b):
            continue
        for fused_out, down_out in itertools.product((1, 2), (1, 2)):
            size = b.shape[3 - down_out]
            if a.shape[3 - fused_out] == width == b.shape[down_out] and a.shape[fused_out] == 2 * size:
                yield from _fused(own, fused, fused_out == 1, down, down_out == 1, size, width)
    for gate, up, down in itertools.permutations(cubes, 3):
        names = ((gate,), (up,), (down,))
        transposed = [own[name].shape[2] == width for name in (gate, up)]
        if own[gate].shape == own[up].shape:
            yield _separate(names, transposed[0], own[down].shape[1] == width)


def _fused(
    own: Mapping[str, np.ndarray], fused: str, transposed: bool, down: str, down_transposed: bool, size: int, width: int
) -> Iterator[Experts]:
    count = len(own[fused])
    flat = {name: w for name, w in own.items() if "bias" in name and w.shape in ((count, 2 * size), (count, width))}
    of_fused = next((name for name, w in flat.items() if w.shape == (count, 2 * size)), None)
    of_down = next((name for name, w in flat.items() if name != of_fused and w.shape == (count, width)), None)
    for pairs, swapped in itertools.product((False, True), (False, True)):
        parts = [_half(transposed, size, pairs, part ^ swapped) for part in (0, 1)]
        gate, up = (Projection((fused,), take, "mlp.experts.gate_up", f":, {i}") for i, take in enumerate(parts))
        biases: tuple[Projection, ...] = ()
        if of_fused is not None and of_down is not None:
            takes = [dataclasses.replace(take, transposed=False) for take in parts]
            biases = (
                Projection((of_fused,), takes[0], "mlp.experts.gate_up_bias", "0"),
                Projection((of_fused,), takes[1], "mlp.experts.gate_up_bias", "1"),
                Projection((of_down,), None, "mlp.experts.down_bias", ""),
            )
        yield Experts(gate, up, _down((down,), down_transposed), biases)


def _half(transposed: bool, size: int, pairs: bool, which: int) -> Channels:
    return Channels(transposed, which, size, 2, 1) if pairs else Channels(transposed, which * size, 1, size, size)


def _down(names: tuple[str, ...], transposed: bool) -> Projection:
    return Projection(names, Oriented() if transposed else None, "mlp.experts.down", "")


def _separate(names: tuple[tuple[str, ...], ...], transposed: bool, down_transposed: bool) -> Experts:
    take = Oriented() if transposed else None
    gate, up = (Projection(part, take, "mlp.experts.gate_up", f":, {i}") for i, part in enumerate(names[:2]))
    return Experts(gate, up, _down(names[2], down_transposed))


def _numbered(own: Mapping[str, np.ndarray], layer: str, width: int) -> Iterator[Experts]:
    """Experts that are modules ``parent.0``, ``parent.1``... with parameters of equal shapes."""
    lists: dict[tuple[str, str], dict[int, str]] = {}
    for name, weight in own.items():
        parts = name.removeprefix(f"{layer}.").split(".")
        number = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
        if number is not None and weight.ndim == 2:
            key = ".".join(parts[:number]), ".".join(parts[number + 1 :])
            lists.setdefault(key, {})[int(parts[number])] = name
    members: dict[str, list[tuple[str, ...]]] = {}
    for (parent, _), names in lists.items():
        shapes = {own[name].shape for name in names.values()}
        if len(names) > 1 and sorted(names) == list(range(len(names))) and len(shapes) == 1:
            members.setdefault(parent, []).append(tuple(names[i] for i in sorted(names)))
    for found in members.values():
        for fused, down in itertools.permutations(found, 2):
            size = own[down[0]].shape[1]
            if own[fused[0]].shape == (2 * size, width) and own[down[0]].shape[0] == width:
                for pairs, swapped in itertools.product((False, True), (False, True)):
                    gate, up = (
                        Projection(fused, _half(True, size, pairs, i ^ swapped), "mlp.experts.gate_up", f":, {i}")
                        for i in (0, 1)
                    )
                    yield Experts(gate, up, _down(down, True))
        for gate, up, down in itertools.permutations(found, 3):
            shape = own[gate[0]].shape
            if own[up[0]].shape == shape == own[down[0]].shape[::-1] and shape[1] == width:
                yield _separate((gate, up, down), True, True)


def expert_tensors(assigned: Assigned, slices: Slices, experts: Experts, weights: Mapping[str, np.ndarray]) -> None:
    """Places of the experts' parameters, and in `slices` those of single experts in stacked ones.

    A checkpoint may store experts one by one where the reference stacks them.
    """
    for part in experts.projections:
        if len(part.names) > 1:
            for expert, name in enumerate(part.names):
                slot = f"{expert}, {part.slot}" if part.slot else f"{expert}"
                assigned.setdefault(name, []).append(Target(part.path, part.take or whole, slot))
            continue
        name, slot = part.names[0], f":, {part.slot}" if part.slot else ""
        assigned.setdefault(name, []).append(Target(part.path, part.take or whole, slot))
        for expert, matrix in enumerate(part.stack(weights)):
            slot = f"{expert}, {part.slot}" if part.slot else f"{expert}"
            take = Oriented() if matrix.ndim == 2 else whole
            slices[f"{name}[{expert}]{part.slot}"] = matrix.T, Target(part.path, take, slot)

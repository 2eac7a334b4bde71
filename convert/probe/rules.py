"""Weight maps derived from a probe, and their JSON form, which an export needs later without the model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convert.probe.heads import Heads
from convert.probe.trace import Linear, NormCall
from convert.weights.rules import Rule, Take, Target, whole_tensor
from tide_jax.errors import TideError
from tide_jax.model.architecture import DecoderConfig

Assignments = dict[str, list[Target]]
"""Destinations of each parameter of the reference."""


Slices = dict[str, tuple[np.ndarray, Target]]
"""Parts of stacked parameters that a checkpoint may store separately, with their destinations."""


@dataclasses.dataclass(frozen=True)
class Channels:
    """Outputs of a linear map as a view: from `start`, `count` runs of `width` channels, `stride` apart.

    Attributes:
      transposed: the weight is stored [out, in].
      heads: runs and channels stay separate axes.
    """

    transposed: bool
    start: int
    count: int
    stride: int
    width: int
    heads: bool = False

    def __call__(self, a: np.ndarray, c: DecoderConfig | None = None) -> np.ndarray:
        x = a.swapaxes(-1, -2) if self.transposed else a
        first, offset = divmod(self.start, self.stride)
        runs = x.reshape(*x.shape[:-1], -1, self.stride)
        runs = runs[..., first : first + self.count, offset : offset + self.width]
        return runs if self.heads else runs.reshape(*x.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A linear map's weight as [heads, hd, out]."""

    transposed: bool
    heads: int

    def __call__(self, a: np.ndarray, c: DecoderConfig) -> np.ndarray:
        x = a.T if self.transposed else a
        return x.reshape(self.heads, -1, x.shape[1])


@dataclasses.dataclass(frozen=True)
class Oriented:
    """A linear map's weight as [..., in, out], stored [..., out, in]."""

    def __call__(self, a: np.ndarray, c: DecoderConfig | None = None) -> np.ndarray:
        return a.swapaxes(-1, -2)


@dataclasses.dataclass(frozen=True)
class Shaped:
    """A reshaped tensor."""

    shape: tuple[int, ...]

    def __call__(self, a: np.ndarray, c: DecoderConfig) -> np.ndarray:
        return a.reshape(self.shape)


_TAKES = {kind.__name__: kind for kind in (Channels, Inputs, Oriented, Shaped)}


def add_linear(assignments: Assignments, linear: Linear, path: str, slot: str = "") -> None:
    """Adds a whole linear map; `slot` indexes the parameter without the kernel's input axis."""
    take = Oriented() if linear.transposed else whole_tensor
    _add(assignments, linear.weight, Target(f"{path}.kernel", take, f":, {slot}" if slot else ""))
    if linear.bias is not None:
        _add(assignments, linear.bias, Target(f"{path}.bias", slot=slot))


def add_channels(assignments: Assignments, linear: Linear, path: str, take: Channels, slot: str = "") -> None:
    """Adds some outputs of a linear map."""
    _add(assignments, linear.weight, Target(f"{path}.kernel", take, f":, {slot}" if slot else ""))
    if linear.bias is not None:
        _add(assignments, linear.bias, Target(f"{path}.bias", dataclasses.replace(take, transposed=False), slot))


def add_heads(assignments: Assignments, heads: Heads, path: str, part: str = "") -> None:
    """Adds heads of a projection; `part` is the slot behind the heads' axis."""
    linear, width, starts = heads.linear, heads.width, heads.starts
    strides = {b - a for a, b in itertools.pairwise(starts)} or {width}
    stride = next(iter(strides))
    if len(strides) == 1 and linear.output.shape[1] % stride == 0 and starts[0] % stride + width <= stride:
        take = Channels(linear.transposed, starts[0], len(starts), stride, width, heads=True)
        add_channels(assignments, linear, path, take, f":, {part}" if part else "")
        return
    for head, start in enumerate(starts):  # heads that are not evenly spaced have no view
        take = Channels(linear.transposed, start, 1, width, width)
        add_channels(assignments, linear, path, take, f"{head}, {part}" if part else f"{head}")


def add_output_projection(assignments: Assignments, linear: Linear, path: str, heads: int) -> None:
    """Adds the output projection of attention."""
    _add(assignments, linear.weight, Target(f"{path}.kernel", Inputs(linear.transposed, heads)))
    if linear.bias is not None:
        _add(assignments, linear.bias, Target(f"{path}.bias"))


def add_norm(assignments: Assignments, norm: NormCall | None, path: str, shape: tuple[int, ...] | None = None) -> None:
    """Adds a norm's weights, reshaped if `shape` is given."""
    for name, part in ((norm.scale, "scale"), (norm.bias, "bias")) if norm is not None else ():
        if name is not None:
            _add(assignments, name, Target(f"{path}.{part}", whole_tensor if shape is None else Shaped(shape)))


def add_tensor(assignments: Assignments, name: str, path: str, take: Take = whole_tensor) -> None:
    """Adds one parameter."""
    _add(assignments, name, Target(path, take))


def _add(assignments: Assignments, name: str, target: Target) -> None:
    assignments.setdefault(name, []).append(target)


def to_json(rules: Sequence[Rule]) -> list[dict[str, Any]]:
    """Converts a probed weight map to JSON-ready values; `from_json` reads them back."""
    return [
        {"pattern": rule.pattern, "reason": rule.reason, "targets": [_target_json(target) for target in rule.targets]}
        for rule in rules
    ]


def _target_json(target: Target) -> dict[str, Any]:
    take = {} if target.take is whole_tensor else {"kind": type(target.take).__name__, **vars(target.take)}
    return {"path": target.path, "slot": target.slot, "take": take}


def from_json(values: Sequence[Mapping[str, Any]]) -> tuple[Rule, ...]:
    """Inverse of `to_json`. Raises TideError for damaged values."""
    try:
        return tuple(Rule(entry["pattern"], tuple(map(_target, entry["targets"])), entry["reason"]) for entry in values)
    except (KeyError, TypeError, ValueError) as error:
        raise TideError(f"the recorded weight map is damaged ({error}): convert the checkpoint again") from error


def _target(values: Mapping[str, Any]) -> Target:
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values["take"].items()}
    kind = fields.pop("kind", None)
    return Target(values["path"], whole_tensor if kind is None else _TAKES[kind](**fields), values["slot"])

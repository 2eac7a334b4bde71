"""Record of a PyTorch model on one row of tokens: the linear maps, norms and tables that ran, with inputs and outputs.

Numbers decide what a module is, not its name or class: a linear map is any module that computes ``x @ W + b`` with its
own weights, a norm any module that computes the normed input.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import numpy as np

from convert.probe.reference import Reference
from tide_jax.model.architecture import NormKind

MATCH = 5e-5
"""Largest difference, as a share of the range, at which two arrays count as equal."""
CERTAIN_MATCH = 3e-6
"""A difference so small that no further candidates are tried."""
_COMMON_EPS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-20, float(np.finfo(np.float32).eps))
_ROUNDING_ERROR = 5e-7


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference as a share of the expected range; infinite for empty arrays or different shapes."""
    if found.shape != expected.shape or not found.size:
        return np.inf
    worst = float(np.abs(found - expected).max())
    return worst / max(float(np.ptp(expected)), 1e-30) if np.isfinite(worst) else np.inf


def nearly_equal(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two arrays are equal up to rounding."""
    return distance(found, expected) <= MATCH


def exactly_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two recorded arrays hold the same numbers."""
    return a is b or (a.shape == b.shape and np.array_equal(a, b))


def fit_factor(change: np.ndarray, added: np.ndarray) -> float:
    """Factor of `added` in `change`, by least squares."""
    return float(np.vdot(change, added) / max(float(np.vdot(added, added)), 1e-30))


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a module: its first tensor and its output, without the batch axis."""

    name: str
    inputs: np.ndarray
    output: np.ndarray


@dataclasses.dataclass(frozen=True)
class Linear(Call):
    """A linear map.

    Attributes:
      weight: name of the weight's parameter.
      bias: name of the bias's parameter, None if there is no bias.
      transposed: the weight is stored [out, in].
    """

    weight: str
    bias: str | None
    transposed: bool


@dataclasses.dataclass(frozen=True)
class NormCall(Call):
    """A norm over the last axis. `scale` and `bias` are parameter names, or None; `shape` is the scale's shape."""

    kind: NormKind
    eps: float
    scale: str | None
    bias: str | None
    unit_offset: bool
    shape: tuple[int, ...]

    def apply(self, x: np.ndarray, weights: Mapping[str, np.ndarray]) -> np.ndarray:
        """Applies the norm to another input."""
        scale, bias = (None if name is None else weights[name] for name in (self.scale, self.bias))
        return apply_norm(x, self.kind, self.eps, scale, bias, self.unit_offset)


@dataclasses.dataclass(frozen=True)
class Lookup(Call):
    """A table of vectors read at indices: `inputs` [T], `output` [T, D]."""

    table: str


@dataclasses.dataclass(frozen=True)
class Trace:
    """Everything that was recorded.

    Attributes:
      tokens: the row, [T].
      logits: [T, V].
      layers: module names of the decoder layers, in order.
      calls: calls of all modules, in the order they began.
      parts: linear maps, norms and tables among them.
      weights: every parameter by name.
      settings: every number in the configuration by its field's name.
      reference: the model.
      unexplained: measured factors that the configuration does not explain.
    """

    tokens: np.ndarray
    logits: np.ndarray
    layers: tuple[str, ...]
    calls: tuple[Call, ...]
    parts: tuple[Call, ...]
    weights: Mapping[str, np.ndarray]
    settings: Mapping[str, float]
    reference: Reference
    unexplained: list[float] = dataclasses.field(default_factory=list)

    def parts_inside(self, module: str) -> list[Call]:
        """Parts that ran inside a module."""
        return [part for part in self.parts if part.name.startswith(f"{module}.")]

    def find_call(self, module: str) -> Call:
        """The call of a module."""
        return next(call for call in self.calls if call.name == module)

    def snap_to_known(self, measured: float) -> float:
        """Replaces a measured factor by the number it approximates: from the configuration, or with few digits.

        A number without an explanation is remembered, so that other layers use exactly the same one.
        """
        numbers = [abs(v) for v in self.settings.values() if v]
        count = len(self.layers)
        known = [1.0, *numbers, *(v**0.5 for v in numbers), *(1 / v for v in numbers), *(v**-0.5 for v in numbers)]
        known += [v * count**-0.5 for v in numbers]
        known += [float(f"{measured:.4g}"), *self.unexplained]
        found = next((float(value) for value in known if abs(value - measured) <= 1e-5 * abs(measured)), None)
        if found is None:
            self.unexplained.append(measured)
        return measured if found is None else found

    def eps_candidates(self) -> list[float]:
        """Candidates for the eps of norms, the configuration's numbers first."""
        return list(dict.fromkeys([*(v for v in self.settings.values() if 0 < v < 0.01), *_COMMON_EPS]))

    def numbers_named(self, pattern: str) -> list[float]:
        """Numbers of the configuration whose field name matches the regular expression."""
        return list(dict.fromkeys(v for name, v in self.settings.items() if re.search(pattern, name)))


def apply_norm(
    x: np.ndarray,
    kind: NormKind,
    eps: float,
    scale: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    unit_offset: bool = False,
) -> np.ndarray:
    """Norms the last axis."""
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True, dtype=np.float64)
    y = x / np.sqrt(np.mean(np.square(x, dtype=np.float64), -1, keepdims=True) + eps)
    if scale is not None:
        y = y * (1.0 + scale if unit_offset else scale)
    return (y if bias is None else y + bias).astype(np.float32)


def find_norm(
    call: Call, own: Sequence[str], weights: Mapping[str, np.ndarray], eps: Iterable[float]
) -> NormCall | None:
    """Returns the norm that gives a module's output, or None."""
    names = [name for name in own if weights[name].shape == call.inputs.shape[-weights[name].ndim :]]
    if len(names) != len(own):
        return None
    roles: list[tuple[str | None, str | None]] = [(names[0] if names else None, None)]
    if len(names) == 2:
        roles = [(names[0], names[1]), (names[1], names[0])]
    candidates = [
        NormCall(
            call.name, call.inputs, call.output, kind, e, scale, bias, offset, weights[scale].shape if scale else ()
        )
        for kind in get_args(NormKind)
        for e in eps
        for scale, bias in roles
        for offset in ((False, True) if scale else (False,))
    ]
    errors = [distance(norm.apply(call.inputs, weights), call.output) for norm in candidates]
    # Several eps may be too small to matter; the first one tried is the most likely.
    tolerance = min(errors) + _ROUNDING_ERROR
    return next((n for n, e in zip(candidates, errors, strict=True) if e <= min(tolerance, MATCH)), None)


def find_bare_norm(
    trace: Trace, inputs: np.ndarray, output: np.ndarray, vectors: Sequence[str] = ()
) -> NormCall | None:
    """Returns the norm without a module that maps one array to another, if there is one.

    Args:
      vectors: parameters that may be its weights.
    """
    fitting = [name for name in vectors if trace.weights[name].shape == inputs.shape[-1:]]
    for own in ((), *((name,) for name in fitting), *itertools.combinations(fitting, 2)):
        norm = find_norm(Call("", inputs, output), own, trace.weights, trace.eps_candidates())
        if norm is not None:
            return norm
    return None


def parameter_owner(name: str) -> str:
    """Name of the module a parameter belongs to."""
    return name.rpartition(".")[0]

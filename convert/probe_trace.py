"""What happened inside a PyTorch model on one row of tokens: which linear maps, norms and tables ran on what.

What a module is, is decided by its numbers and not by its name or class: a linear map is whatever gives
``x @ W + b`` of its own weights, a norm whatever gives the normed input.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from convert.probe_reference import Reference
from tide_jax.architecture import NormKind
from tide_jax.errors import TideError

MATCH = 5e-5
"""Largest difference, as a share of the range, at which two ways to compute an array count as one."""
LENGTH = 20
_EPS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-20, float(np.finfo(np.float32).eps))
_ROWS = 8
_ROUNDING = 5e-7


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference as a share of the expected values' range; infinite where shapes differ."""
    if found.shape != expected.shape:
        return np.inf
    worst = float(np.abs(found - expected).max())
    return worst / max(float(np.ptp(expected)), 1e-30) if np.isfinite(worst) else np.inf


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two arrays are equal but for rounding."""
    return distance(found, expected) <= MATCH


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two recorded arrays hold the same numbers."""
    return a is b or (a.shape == b.shape and np.array_equal(a, b))


def factor(change: np.ndarray, added: np.ndarray) -> float:
    """How often `added` goes into `change`, by least squares."""
    return float(np.vdot(change, added) / max(float(np.vdot(added, added)), 1e-30))


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a module: its first tensor and what it gave, without the batch axis."""

    name: str
    inputs: np.ndarray
    output: np.ndarray


@dataclasses.dataclass(frozen=True)
class Linear(Call):
    """A linear map.

    Attributes:
      weight, bias: names of the parameters; no bias is None.
      transposed: the weight is stored [out, in].
    """

    weight: str
    bias: str | None
    transposed: bool


@dataclasses.dataclass(frozen=True)
class NormCall(Call):
    """A norm over the last axis. `scale` and `bias` are parameter names, or None; `shape` is that of the scale."""

    kind: NormKind
    eps: float
    scale: str | None
    bias: str | None
    unit_offset: bool
    shape: tuple[int, ...]

    def apply(self, x: np.ndarray, weights: Mapping[str, np.ndarray]) -> np.ndarray:
        """The norm of another input."""
        scale, bias = (None if name is None else weights[name] for name in (self.scale, self.bias))
        return normed(x, self.kind, self.eps, scale, bias, self.unit_offset)


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
      calls: of every module, in the order they began.
      parts: linear maps, norms and tables among them.
      weights: every parameter by name.
      settings: every number in the configuration by its field's name.
      reference: the model.
    """

    tokens: np.ndarray
    logits: np.ndarray
    layers: tuple[str, ...]
    calls: tuple[Call, ...]
    parts: tuple[Call, ...]
    weights: Mapping[str, np.ndarray]
    settings: Mapping[str, float]
    reference: Reference

    def inside(self, module: str) -> list[Call]:
        """The parts that ran inside a module."""
        return [part for part in self.parts if part.name.startswith(f"{module}.")]

    def call(self, module: str) -> Call:
        """The call of a module."""
        return next(call for call in self.calls if call.name == module)

    def exact(self, measured: float) -> float:
        """A measured factor as the exact number it comes from, where the configuration has one."""
        numbers = [abs(v) for v in self.settings.values() if v]
        count = len(self.layers)
        known = [1.0, *numbers, *(v**0.5 for v in numbers), *(1 / v for v in numbers), *(v**-0.5 for v in numbers)]
        known += [v * count**-0.5 for v in numbers]
        return next((float(value) for value in known if abs(value - measured) <= 1e-5 * abs(measured)), measured)

    def eps(self) -> list[float]:
        """Numbers that norms may add to the mean square, those of the configuration first."""
        return list(dict.fromkeys([*(v for v in self.settings.values() if 0 < v < 0.01), *_EPS]))

    def numbers(self, pattern: str) -> list[float]:
        """Numbers of the configuration whose field's name contains the regular expression."""
        return list(dict.fromkeys(v for name, v in self.settings.items() if re.search(pattern, name)))


def record(reference: Reference) -> Trace:
    """Runs the model on one row of random tokens and records it.

    Raises:
      TideError: no run of decoder layers is found in it.
    """
    model = reference.model
    settings = _settings(reference.hf)
    weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict(keep_vars=True).items()}
    tokens = _tokens(settings, weights)
    recorder = _Recorder()
    handles = [
        handle
        for name, module in model.named_modules()
        for handle in (
            module.register_forward_pre_hook(recorder.before(name), with_kwargs=True),
            module.register_forward_hook(recorder.after(name), with_kwargs=True),
        )
    ]
    try:
        logits = reference.logits(tokens)
    finally:
        for handle in handles:
            handle.remove()
    calls = tuple(recorder.calls())
    modules = dict(model.named_modules())
    trace = Trace(tokens, logits, _layers(calls), calls, (), weights, settings, reference)
    parts = (_part(call, modules[call.name], weights, trace.eps()) for call in calls)
    return dataclasses.replace(trace, parts=tuple(part for part in parts if part is not None))


def _tokens(settings: Mapping[str, float], weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """Random tokens, all different where the vocabulary allows."""
    vocab = int(settings.get("vocab_size") or max(w.shape[0] for w in weights.values() if w.ndim == 2))
    rng = np.random.default_rng(0)
    return rng.permutation(vocab)[:LENGTH] if vocab >= LENGTH else rng.integers(0, vocab, LENGTH)


def _settings(hf: Any) -> dict[str, float]:
    """Numbers by field name; those of nested tables keep their own names, the outer ones come first."""
    try:
        values = hf.to_dict()
    except Exception:  # a configuration class of the checkpoint's own
        values = dict(vars(hf))
    found: dict[str, float] = {}
    queue = [values]
    while queue:
        for name, value in queue.pop(0).items():
            if isinstance(value, dict):
                queue.append(value)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(str(name), value)
    return found


class _Recorder:
    """Collects calls from hooks. A tensor that many modules see is copied once."""

    def __init__(self) -> None:
        self._begun: list[list[Any]] = []
        self._copies: dict[tuple[Any, ...], tuple[Any, np.ndarray]] = {}

    def before(self, name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            tensors = [self._copy(t) for t in _tensors((*args, *kwargs.values()))]
            self._begun.append([name, tensors, None])

        return hook

    def after(self, name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            entry = next(e for e in reversed(self._begun) if e[0] == name and e[2] is None)
            entry[2] = next((self._copy(t) for t in _tensors((output,))), False)

        return hook

    def calls(self) -> Iterable[Call]:
        for name, tensors, output in self._begun:
            if tensors and isinstance(output, np.ndarray):
                alike = (t for t in tensors if t.shape == output.shape and t.dtype == output.dtype)
                yield Call(name, next(alike, tensors[0]), output)

    def _copy(self, tensor: Any) -> np.ndarray:
        key = (tensor.data_ptr(), tensor._version, tuple(tensor.shape), tuple(tensor.stride()))
        if key not in self._copies:  # the tensor is kept, so that its address stays its own
            array = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
            array = array.numpy().copy()
            self._copies[key] = tensor, array[0] if array.ndim > 1 and array.shape[0] == 1 else array
        return self._copies[key][1]


def _tensors(values: Iterable[Any]) -> Iterable[Any]:
    import torch

    for value in values:
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _layers(calls: Sequence[Call]) -> tuple[str, ...]:
    """The decoder layers: the outermost modules numbered 0, 1, 2... that hand a [T, D] stream on to one another."""
    lists: dict[str, list[Call]] = {}
    for call in calls:
        parent, _, number = call.name.rpartition(".")
        if number.isdigit():
            lists.setdefault(parent, []).append(call)
    found = [
        (parent.count("."), -len(members), members)
        for parent, members in lists.items()
        if all(c.inputs.ndim == 2 and c.inputs.shape == c.output.shape == members[0].inputs.shape for c in members)
    ]
    if not found:
        raise TideError("no list of decoder layers was found: no numbered modules hand a [T, D] stream on")
    members = min(found, key=lambda entry: entry[:2])[2]
    names = [call.name for call in members]
    if [int(name.rpartition(".")[2]) for name in names] != list(range(len(names))):
        raise TideError(
            f"the layers run as {', '.join(names)}: only layers that run once each, in order, can be probed"
        )
    return tuple(names)


def _part(call: Call, module: Any, weights: Mapping[str, np.ndarray], eps: Sequence[float]) -> Call | None:
    """What a module without children computes: a linear map, a norm, a lookup, or None of these."""
    if next(module.children(), None) is not None:
        return None
    own = {name: f"{call.name}.{name}" for name, _ in module.named_parameters(recurse=False)}
    matrices = [name for name in own.values() if weights[name].ndim == 2]
    vectors = [name for name in own.values() if weights[name].ndim == 1]
    if np.issubdtype(call.inputs.dtype, np.integer):
        return _lookup(call, matrices)
    if call.inputs.ndim == 2 and len(matrices) == 1 and len(vectors) <= 1:
        linear = _linear(call, matrices[0], next(iter(vectors), None), weights)
        if linear is not None:
            return linear
    if call.inputs.shape == call.output.shape and call.inputs.ndim >= 2 and len(own) <= 2:
        floats = [v for v in vars(module).values() if isinstance(v, float) and 0 < v < 0.01]
        if own or floats or not same(call.inputs, call.output):  # else a dropout, as it is
            return _norm(call, list(own.values()), weights, dict.fromkeys([*floats, *eps]))
    return None


def _lookup(call: Call, matrices: Sequence[str]) -> Lookup | None:
    return Lookup(call.name, call.inputs, call.output, matrices[0]) if len(matrices) == 1 else None


def _linear(call: Call, weight: str, bias: str | None, weights: Mapping[str, np.ndarray]) -> Linear | None:
    x, y, w = call.inputs[:_ROWS], call.output[:_ROWS], weights[weight]
    if bias is not None:
        y = y - weights[bias] if weights[bias].shape == y.shape[1:] else y[:0]
    for transposed, kernel in ((True, w.T), (False, w)):
        if len(y) and kernel.shape == (x.shape[1], y.shape[1]) and same(x @ kernel, y):
            return Linear(call.name, call.inputs, call.output, weight, bias, transposed)
    return None


def normed(
    x: np.ndarray,
    kind: NormKind,
    eps: float,
    scale: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    unit_offset: bool = False,
) -> np.ndarray:
    """The norm of the last axis."""
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True, dtype=np.float64)
    y = x / np.sqrt(np.mean(np.square(x, dtype=np.float64), -1, keepdims=True) + eps)
    if scale is not None:
        y = y * (1.0 + scale if unit_offset else scale)
    return (y if bias is None else y + bias).astype(np.float32)


def _norm(call: Call, own: Sequence[str], weights: Mapping[str, np.ndarray], eps: Iterable[float]) -> NormCall | None:
    """The norm that gives a module's output."""
    names = [name for name in own if weights[name].shape == call.inputs.shape[-weights[name].ndim :]]
    if len(names) != len(own):
        return None
    roles: list[tuple[str | None, str | None]] = [(names[0] if names else None, None)]
    if len(names) == 2:
        roles = [(names[0], names[1]), (names[1], names[0])]
    tried = [
        NormCall(
            call.name, call.inputs, call.output, kind, e, scale, bias, offset, weights[scale].shape if scale else ()
        )
        for kind in get_args(NormKind)
        for e in eps
        for scale, bias in roles
        for offset in ((False, True) if scale else (False,))
    ]
    errors = [distance(norm.apply(call.inputs, weights), call.output) for norm in tried]
    # Where eps is too small to show, the likeliest one counts: they are tried in that order.
    likely = min(errors) + _ROUNDING
    return next((n for n, e in zip(tried, errors, strict=True) if e <= min(likely, MATCH)), None)


def bare_norm(trace: Trace, inputs: np.ndarray, output: np.ndarray) -> NormCall | None:
    """The norm without weights and without a module that leads from one array to another."""
    return _norm(Call("", inputs, output), (), trace.weights, trace.eps())


def parameter_owner(name: str) -> str:
    """The module a parameter belongs to."""
    return name.rpartition(".")[0]

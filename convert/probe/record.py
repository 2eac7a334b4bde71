"""Runs a PyTorch model on one row of tokens and records what its modules and its functional code compute."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from convert.probe.reference import Reference
from convert.probe.trace import Call, Linear, Lookup, Trace, find_norm, nearly_equal
from tide_jax.errors import TideError

_ROW_LENGTH = 20
_COMPARED_ROWS = 8
_SMALL_VOCABULARY = 64
_PRODUCTS = ("mm", "bmm", "addmm", "embedding")
_SUMS = ("add", "add_")


@dataclasses.dataclass(frozen=True)
class FunctionCall(Call):
    """A product with a parameter by code without a module; named by its weight."""

    weight: str
    bias: str | None


def record(reference: Reference) -> Trace:
    """Runs the model on one row of random tokens and records it.

    Raises:
      TideError: the model has no recognisable sequence of decoder layers.
    """
    model = reference.model
    settings = _numeric_settings(reference.hf)
    weights = {name: tensor.detach().numpy() for name, tensor in model.state_dict(keep_vars=True).items()}
    tokens = _random_tokens(model, settings)
    recorder = _Recorder(model)
    handles = [
        handle
        for name, module in model.named_modules()
        for handle in (
            module.register_forward_pre_hook(recorder.input_hook(name), with_kwargs=True),
            module.register_forward_hook(recorder.output_hook(name), with_kwargs=True),
        )
    ]
    try:
        with recorder.record_functions():
            logits = reference.logits(tokens)
    finally:
        for handle in handles:
            handle.remove()
    calls = tuple(recorder.calls())
    modules = dict(model.named_modules())
    trace = Trace(tokens, logits, _find_layers(calls), calls, (), weights, settings, reference)
    parts = [_classify(call, modules.get(call.name), weights, trace.eps_candidates()) for call in calls]
    # If a module's weight also appears as a functional product, keep the module's record only.
    both = [(call, part) for call, part in zip(calls, parts, strict=True) if part is not None]
    in_modules = {p.weight for call, p in both if isinstance(p, Linear) and not isinstance(call, FunctionCall)}
    found = (p for call, p in both if not (isinstance(call, FunctionCall) and call.weight in in_modules))
    return dataclasses.replace(trace, parts=tuple(found))


def _random_tokens(model: Any, settings: Mapping[str, float]) -> np.ndarray:
    """Random tokens of the vocabulary, all different if it is large enough."""
    import torch

    tables = [module.num_embeddings for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    named = [int(value) for name, value in settings.items() if "vocab" in name and value >= _ROW_LENGTH]
    vocab = min(max(tables, default=_SMALL_VOCABULARY), *(named[:1] or [2**31]))
    rng = np.random.default_rng(0)
    return rng.permutation(vocab)[:_ROW_LENGTH] if vocab >= _ROW_LENGTH else rng.integers(0, vocab, _ROW_LENGTH)


def _numeric_settings(hf: Any) -> dict[str, float]:
    """Numbers of the configuration by field name. Nested fields keep their own names; outer ones win."""
    try:
        values = hf.to_dict()
    except Exception:  # the checkpoint's own configuration class
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

    def __init__(self, model: Any) -> None:
        self._parameters = {p.data_ptr(): (name, p.numel(), p.ndim) for name, p in model.named_parameters()}
        self._entries: list[list[Any]] = []
        self._copies: dict[tuple[Any, ...], tuple[Any, np.ndarray]] = {}

    @contextlib.contextmanager
    def record_functions(self) -> Iterator[None]:
        """Context in which all products with parameters are recorded, whichever code computes them."""
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        recorder = self

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                output = func(*args, **(kwargs or {}))
                recorder.record_function(func.overloadpacket.__name__, [*_tensors(args)], output)
                return output

        fast = torch.backends.mha.get_fastpath_enabled()  # a single fused operation, which would hide its products
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with Operations():
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def record_function(self, name: str, tensors: Sequence[Any], output: Any) -> None:
        """Records a product with a parameter, or the addition of a bias to the latest product."""
        if name not in _PRODUCTS and name not in _SUMS:
            return
        own = [(tensor, self._parameter(tensor)) for tensor in tensors]
        weight, bias = (next((p[0] for _, p in own if p and p[1] == ndim), None) for ndim in (2, 1))
        others = [tensor for tensor, parameter in own if parameter is None]
        if name in _PRODUCTS and weight is not None and len(others) == 1:
            self._entries.append([weight, [self._copy(others[0])], self._copy(output), bias, output])
        elif name in _SUMS and bias is not None and len(others) == 1:
            last = self._entries[-1]
            if len(last) > 3 and last[4].data_ptr() == others[0].data_ptr():
                last[2:] = self._copy(output), bias, output

    def _parameter(self, tensor: Any) -> tuple[str, int] | None:
        name, count, ndim = self._parameters.get(tensor.data_ptr(), ("", -1, 0))
        return (name, ndim) if count == tensor.numel() else None

    def input_hook(self, name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            tensors = [self._copy(t) for t in _tensors((*args, *kwargs.values()))]
            self._entries.append([name, tensors, None])

        return hook

    def output_hook(self, name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            entry = next(e for e in reversed(self._entries) if e[0] == name and e[2] is None)
            entry[2] = next((self._copy(t) for t in _tensors((output,))), False)

        return hook

    def calls(self) -> Iterable[Call]:
        for name, tensors, output, *function in self._entries:
            if function:
                yield FunctionCall(name, tensors[0], output, name, function[0])
            elif tensors and isinstance(output, np.ndarray):
                alike = (t for t in tensors if t.shape == output.shape and t.dtype == output.dtype)
                yield Call(name, next(alike, tensors[0]), output)

    def _copy(self, tensor: Any) -> np.ndarray:
        key = (tensor.data_ptr(), tensor._version, tuple(tensor.shape), tuple(tensor.stride()))
        if key not in self._copies:  # keep the tensor, so that its address is not reused
            array = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
            array = array.numpy().copy()
            while array.ndim > 1 and array.shape[0] == 1:
                array = array[0]
            self._copies[key] = tensor, array
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


def _find_layers(calls: Sequence[Call]) -> tuple[str, ...]:
    """Finds the decoder layers: the outermost numbered modules 0, 1, 2... that pass a [T, D] stream on."""
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
        raise TideError("no decoder layers were found, expected numbered modules that map a [T, D] stream to another")
    members = min(found, key=lambda entry: entry[:2])[2]
    names = [call.name for call in members]
    if [int(name.rpartition(".")[2]) for name in names] != list(range(len(names))):
        raise TideError(
            f"the layers run as {', '.join(names)}: only layers that run once each, in order, can be probed"
        )
    return tuple(names)


def _classify(call: Call, module: Any, weights: Mapping[str, np.ndarray], eps: Sequence[float]) -> Call | None:
    """Classifies a module without children, or a function: a linear map, a norm, a lookup, or None."""
    if isinstance(call, FunctionCall):
        if np.issubdtype(call.inputs.dtype, np.integer):
            return Lookup(call.name, call.inputs, call.output, call.weight)
        return _find_linear(call, call.weight, call.bias, weights) if call.inputs.ndim == 2 else None
    if next(module.children(), None) is not None:
        return None
    own = {name: f"{call.name}.{name}" for name, _ in module.named_parameters(recurse=False)}
    matrices = [name for name in own.values() if weights[name].ndim == 2]
    vectors = [name for name in own.values() if weights[name].ndim == 1]
    if np.issubdtype(call.inputs.dtype, np.integer):
        return _find_lookup(call, matrices)
    if call.inputs.ndim == 2 and len(matrices) == 1 and len(vectors) <= 1:
        linear = _find_linear(call, matrices[0], next(iter(vectors), None), weights)
        if linear is not None:
            return linear
    if call.inputs.shape == call.output.shape and call.inputs.ndim >= 2 and len(own) <= 2:
        floats = [v for v in vars(module).values() if isinstance(v, float) and 0 < v < 0.01]
        if own or floats or not nearly_equal(call.inputs, call.output):  # otherwise it may be an inactive dropout
            return find_norm(call, list(own.values()), weights, dict.fromkeys([*floats, *eps]))
    return None


def _find_lookup(call: Call, matrices: Sequence[str]) -> Lookup | None:
    return Lookup(call.name, call.inputs, call.output, matrices[0]) if len(matrices) == 1 else None


def _find_linear(call: Call, weight: str, bias: str | None, weights: Mapping[str, np.ndarray]) -> Linear | None:
    x, y, w = call.inputs[:_COMPARED_ROWS], call.output[:_COMPARED_ROWS], weights[weight]
    if bias is not None:
        y = y - weights[bias] if weights[bias].shape == y.shape[1:] else y[:0]
    for transposed, kernel in ((True, w.T), (False, w)):
        if len(y) and kernel.shape == (x.shape[1], y.shape[1]) and nearly_equal(x @ kernel, y):
            return Linear(call.name, call.inputs, call.output, weight, bias, transposed)
    return None

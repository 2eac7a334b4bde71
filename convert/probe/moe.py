"""Finds out how a mixture of experts routes, from its router's logits and the block's output."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import get_args

import jax.numpy as jnp
import numpy as np

from convert.probe import axes
from convert.probe.experts import Experts, find_experts
from convert.probe.mlp import ACTIVATION_NAMES, FoundMLP, find_mlp
from convert.probe.trace import CERTAIN_MATCH, MATCH, Call, Linear, NormCall, Trace, distance, exactly_equal
from tide_jax.model.activations import SWIGLU_OAI
from tide_jax.model.architecture import MoEConfig
from tide_jax.model.architecture_parts import GroupScore
from tide_jax.model.moe import choose_experts

_PER_TOKEN_FIELDS = r"top_?k|per_tok|num_select|active|moe_k|used"


@dataclasses.dataclass(frozen=True)
class FoundMoE:
    """A mixture of experts.

    Attributes:
      moe: flags, for all layers.
      experts: their weights.
      router, router_bias, correction: parameters.
      shared, shared_gate: the MLP that every token runs, and the linear map whose sigmoid multiplies its output.
      activation, limit: flags of the decoder.
      inputs, output: input and output of the block.
      error: difference at the output.
      block: name of the module that holds the experts.
    """

    moe: MoEConfig
    experts: Experts
    router: str
    router_bias: str | None
    correction: str | None
    shared: FoundMLP | None
    shared_gate: Linear | None
    activation: str
    limit: float | None
    inputs: np.ndarray
    output: np.ndarray
    error: float
    block: str

    def owns(self, linear: Linear) -> bool:
        """Whether a linear map is part of the block."""
        inside = linear.name.startswith(f"{self.block}.")
        return inside or (self.shared is not None and self.shared.owns(linear)) or linear.weight == self.router


@dataclasses.dataclass(frozen=True)
class _Routing:
    """A candidate router and the weight of each expert for each token, [T, E]."""

    moe: MoEConfig
    router: str
    bias: str | None
    correction: str | None
    shares: np.ndarray


def find_moe(
    trace: Trace, layer: str, parts: Sequence[Call], hint: FoundMoE | None
) -> tuple[FoundMoE | None, float] | None:
    """Returns a layer's mixture of experts, or None if no candidate matches, and the closest candidate's error.

    Returns just None if the layer has no experts.

    Args:
      parts: linear maps and norms of the layer.
      hint: mixture of another layer, whose flags are tried first.
    """
    stream = trace.find_call(layer).inputs
    experts = find_experts(trace, layer, stream.shape[1])
    if not experts:
        return None
    block = _find_block(trace, layer, experts[0].down.names[0])
    if block is None:
        return None, np.inf
    mixture = _Mixture(trace, layer, parts, block, experts)
    best, error = mixture.find_closest(hint)
    return (best if error <= MATCH else None), error


def _find_block(trace: Trace, layer: str, name: str) -> Call | None:
    """The outermost module of a layer that holds a parameter and maps the stream to the stream."""
    path = name.removeprefix(f"{layer}.").split(".")
    stream = trace.find_call(layer).inputs
    for depth in range(1, len(path)):
        module = ".".join([layer, *path[:depth]])
        call = next((c for c in trace.calls if c.name == module and c.output.shape == stream.shape), None)
        if call is not None and call.inputs.shape == stream.shape:
            return call
    return None


class _Mixture:
    def __init__(
        self, trace: Trace, layer: str, parts: Sequence[Call], block: Call, experts: Sequence[Experts]
    ) -> None:
        self.trace, self.experts, self.block = trace, experts, block
        used = {name for found in experts for part in found.projections for name in part.names}
        self.count = len(experts[0].down.stack(trace.weights))
        self.weights = {n: w for n, w in trace.weights.items() if n.startswith(f"{layer}.") and n not in used}
        owners = tuple(name.rpartition(".")[0] for name in used)
        rows = [
            p for p in parts if isinstance(p, Linear) and len(p.inputs) == len(block.inputs) and p.name not in owners
        ]
        self.readers = [p for p in rows if exactly_equal(p.inputs, block.inputs)]
        norms = [part for part in parts if isinstance(part, NormCall)]
        inner = [p for p in rows if p.name.startswith(f"{block.name}.")]
        possible_shared = [p for p in rows if p in self.readers or p.output.shape[1] == block.output.shape[1]]
        self.shared: list[tuple[FoundMLP, np.ndarray]] = []
        # A shared expert is inside the block, or beside it; then the block's output is only the routed part.
        for linears, whole_block in ((inner, True), (possible_shared, False)):
            shared, _ = find_mlp(trace, linears, norms, block.output.shape[1])
            if shared is not None and exactly_equal(shared.inputs, block.inputs):
                self.shared.append((shared, block.output if whole_block else block.output + shared.output))
                break

    def find_closest(self, hint: FoundMoE | None) -> tuple[FoundMoE | None, float]:
        """Returns the closest candidate: first with another layer's flags, then with all flags."""
        best, error = None, np.inf
        for with_hint in (True, False) if hint is not None else (False,):
            for found in self.candidates(hint if with_hint else None):
                if found.error < error:
                    best, error = found, found.error
                if error <= CERTAIN_MATCH:
                    return best, error
        return best, error

    def candidates(self, hint: FoundMoE | None) -> Iterator[FoundMoE]:
        """Yields candidates with their errors; with `hint`, only those that have its flags."""
        choices = None if hint is None else hint.moe
        routings = list(self.routings(choices))
        limits = axes.limits(self.trace)
        activations = [(a, limit) for a in (*ACTIVATION_NAMES, SWIGLU_OAI) for limit in limits]
        if hint is not None:
            activations = [(hint.activation, hint.limit)]
        for experts, (activation, limit) in itertools.product(self.experts, activations):
            outputs = experts.outputs(self.trace, self.block.inputs, activation, limit)
            for routing in routings:
                routed = np.einsum("etd,te->td", outputs, routing.shares)
                yield from self.measure(experts, routing, activation, limit, routed)

    def measure(
        self, experts: Experts, routing: _Routing, activation: str, limit: float | None, routed: np.ndarray
    ) -> Iterator[FoundMoE]:
        """Yields a candidate with its error, with and without a shared expert; factors are fitted."""
        for shared, target in [*self.shared, (None, self.block.output)]:
            gates = [p for p in self.readers if p.output.shape[1] == 1] if shared is not None else []
            for gate in (None, *gates):
                terms = [routed]
                if shared is not None:
                    gate_values = 1.0 if gate is None else 1 / (1 + np.exp(-gate.output))
                    terms.append(shared.output * np.float32(gate_values))
                factors = self.factors(terms, target)
                found = sum(np.float32(f) * term for f, term in zip(factors, terms, strict=True))
                moe = dataclasses.replace(
                    routing.moe,
                    intermediate_size=experts.down.stack(self.trace.weights).shape[1],
                    scale=factors[0],
                    expert_bias=bool(experts.biases),
                    shared_size=0 if shared is None else shared.down.inputs.shape[1],
                    shared_scale=1.0 if shared is None else factors[1],
                    shared_gate=gate is not None,
                )
                yield FoundMoE(
                    moe, experts, routing.router, routing.bias, routing.correction, shared, gate, activation, limit,
                    self.block.inputs, target, distance(np.asarray(found), target), self.block.name,
                )  # fmt: skip

    def factors(self, terms: Sequence[np.ndarray], target: np.ndarray) -> list[float]:
        """Factor of each term in the target, by least squares."""
        columns = np.stack([term.reshape(-1) for term in terms]).astype(np.float64)
        fitted = np.linalg.lstsq(columns @ columns.T, columns @ target.reshape(-1), rcond=None)[0]
        return [self.trace.snap_to_known(float(f)) for f in fitted]

    def routings(self, only: MoEConfig | None) -> Iterator[_Routing]:
        """Yields routers of the layer with every way to choose experts from their logits."""
        width = self.block.inputs.shape[1]
        matrices = [n for n, w in self.weights.items() if w.shape == (self.count, width) and "bias" not in n]
        vectors: list[str | None] = [n for n, w in self.weights.items() if w.size == self.count and w.ndim <= 2]
        for router, bias in itertools.product(matrices, (None, *vectors)):
            logits = self.block.inputs @ self.trace.weights[router].T
            logits = logits if bias is None else logits + self.trace.weights[bias].reshape(-1)
            for correction in (None, *(v for v in vectors if v != bias)):
                for moe in self.choices(bias is not None, correction is not None):
                    if only is not None and moe != _routing_flags(only):
                        continue
                    yield _Routing(moe, router, bias, correction, self.shares(moe, logits, correction))

    def choices(self, biased: bool, corrected: bool) -> Iterator[MoEConfig]:
        named = [int(v) for v in self.trace.numbers_named(_PER_TOKEN_FIELDS) if 1 <= v <= self.count]
        groups = [int(v) for v in self.trace.numbers_named("group") if 1 < v <= self.count and self.count % v == 0]
        kept = [int(v) for v in self.trace.numbers_named("group") if v >= 1]
        grouped = [(n, k, s) for n in groups for k in kept if k < n for s in get_args(GroupScore)]
        for per_token in dict.fromkeys([*named, *range(1, min(self.count, 4) + 1)]):
            for score, renormalise in itertools.product(("softmax", "sigmoid"), (True, False)):
                for correction in ("score", "logit") if corrected else ("none",):
                    for count, groups_kept, group_score in (*grouped, (1, 1, get_args(GroupScore)[-1])):
                        yield MoEConfig(
                            num_experts=self.count,
                            experts_per_token=per_token,
                            intermediate_size=0,
                            score=score,
                            renormalise=renormalise,
                            correction=correction,
                            groups=count,
                            groups_kept=groups_kept,
                            group_score=group_score,
                            router_bias=biased,
                        )

    def shares(self, moe: MoEConfig, logits: np.ndarray, correction: str | None) -> np.ndarray:
        """Weight of each expert for each token, [T, E]."""
        added = None if correction is None else jnp.asarray(self.trace.weights[correction].reshape(-1))
        weights, chosen = choose_experts(moe, jnp.asarray(logits), added)
        shares = np.zeros(logits.shape, np.float32)
        np.put_along_axis(shares, np.asarray(chosen), np.asarray(weights), axis=1)
        return shares


def _routing_flags(moe: MoEConfig) -> MoEConfig:
    """Reduces a mixture's flags to those that decide which experts a token gets."""
    return dataclasses.replace(
        moe, intermediate_size=0, scale=1.0, expert_bias=False, shared_size=0, shared_scale=1.0, shared_gate=False
    )

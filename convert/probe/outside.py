"""Finds out what surrounds the decoder layers: embeddings, positions, the final norm and the head."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from convert.probe.layer import raise_divergence
from convert.probe.trace import (
    MATCH,
    Linear,
    Lookup,
    NormCall,
    Trace,
    distance,
    exactly_equal,
    find_bare_norm,
    fit_factor,
    nearly_equal,
)

_MAX_OFFSETS = 4
_NO_FIT = (np.inf, None)


@dataclasses.dataclass(frozen=True)
class FoundEmbedding:
    """How tokens become the first layer's input.

    Attributes:
      table: parameter with the token vectors.
      project: linear map to the layers' width.
      scale: factor of the token vectors.
      positions: parameter with learned position vectors, None if there are none.
      offset: number added to a position.
      norm: the norm of the sum.
    """

    table: str
    project: Linear | None
    scale: float
    positions: str | None
    offset: int
    norm: NormCall | None


@dataclasses.dataclass(frozen=True)
class FoundHead:
    """How the last layer's output becomes logits.

    Attributes:
      norm: the final norm.
      project: linear map to the embeddings' width.
      weight, bias: parameters of the head.
      scale, softcap: flags of the decoder.
    """

    norm: NormCall | None
    project: Linear | None
    weight: str
    bias: str | None
    scale: float
    softcap: float | None


def find_embedding(trace: Trace) -> FoundEmbedding:
    """Finds out how tokens become the first layer's input. Raises Diverged if no candidate matches."""
    outside = _outer_parts(trace)
    lookups = [part for part in outside if isinstance(part, Lookup)]
    tokens = next((part for part in lookups if exactly_equal(part.inputs, trace.tokens)), None)
    if tokens is None:
        raise_divergence("the embedding", "no table is read at the tokens", np.inf)
    target = trace.find_call(trace.layers[0]).inputs
    projects = [part for part in outside if isinstance(part, Linear) and exactly_equal(part.inputs, tokens.output)]
    norms = [part for part in outside if isinstance(part, NormCall) and exactly_equal(part.output, target)]
    candidates = [
        _closest_embedding(trace, tokens, project, norm, target)
        for project in (None, *projects)
        for norm in (None, *norms)
    ]
    bare = (
        None
        if norms or tokens.output.shape != target.shape
        else find_bare_norm(trace, tokens.output, target, _outer_vectors(trace))
    )
    if bare is not None:
        candidates.append((0.0, FoundEmbedding(tokens.table, None, 1.0, None, 0, bare)))
    error, found = min(candidates, key=lambda entry: entry[0])
    if found is None or error > MATCH:
        raise_divergence(
            "the embedding", "token vectors, positions and a norm do not give the first layer's input", error
        )
    return found


def _outer_parts(trace: Trace) -> list[object]:
    """Parts that ran outside the layers."""
    prefixes = tuple(f"{layer}." for layer in trace.layers)
    return [part for part in trace.parts if not part.name.startswith(prefixes)]


def _outer_vectors(trace: Trace) -> list[str]:
    """Parameters with one axis outside the layers."""
    prefixes = tuple(f"{layer}." for layer in trace.layers)
    return [name for name, weight in trace.weights.items() if weight.ndim == 1 and not name.startswith(prefixes)]


def _closest_embedding(
    trace: Trace,
    tokens: Lookup,
    project: Linear | None,
    norm: NormCall | None,
    target: np.ndarray,
) -> tuple[float, FoundEmbedding | None]:
    """The closest sum of scaled token vectors and positions."""
    vectors = trace.weights[tokens.table][trace.tokens] if project is None else project.output
    total = target if norm is None else norm.inputs
    if vectors.shape != total.shape:
        return _NO_FIT
    best: tuple[float, FoundEmbedding | None] = _NO_FIT
    for table, offset, added in _position_tables(trace, tokens, total.shape):
        scale = trace.snap_to_known(fit_factor(total - added, vectors))
        error = distance(np.float32(scale) * vectors + added, total)
        if error < best[0]:
            best = error, FoundEmbedding(tokens.table, project, scale, table, offset, norm)
    return best


def _position_tables(
    trace: Trace, tokens: Lookup, shape: tuple[int, ...]
) -> Iterator[tuple[str | None, int, np.ndarray]]:
    """Position tables that may have been added: parameter, offset, rows."""
    yield None, 0, np.zeros(shape, np.float32)
    for name, weight in trace.weights.items():
        rows = weight.size // max(weight.shape[-1], 1) if weight.ndim else 0
        if name != tokens.table and weight.ndim > 1 and weight.shape[-1] == shape[1] and rows == max(weight.shape[:-1]):
            for offset in range(min(_MAX_OFFSETS, rows - shape[0] + 1)):
                yield name, offset, weight.reshape(rows, -1)[offset : offset + shape[0]]


def find_head(trace: Trace) -> FoundHead:
    """Finds out how the last layer's output becomes logits. Raises Diverged if no candidate matches."""
    outside = _outer_parts(trace)
    last = trace.find_call(trace.layers[-1]).output
    linears = [part for part in outside if isinstance(part, Linear)]
    norms = [part for part in outside if isinstance(part, NormCall) and exactly_equal(part.inputs, last)]
    ends = [x.inputs for x in linears if x.output.shape == trace.logits.shape and not nearly_equal(x.inputs, last)]
    bare = (
        find_bare_norm(trace, last, end, _outer_vectors(trace)) for end in ends if not norms and end.shape == last.shape
    )
    norms += [norm for norm in bare if norm is not None]
    best: tuple[float, FoundHead | None] = _NO_FIT
    for norm in (*norms, None):
        for project in (None, *linears):
            states = last if norm is None else norm.output
            if project is not None:
                if not exactly_equal(project.inputs, states):
                    continue
                states = project.output
            best = min(best, _closest_head(trace, norm, project, linears, states), key=lambda entry: entry[0])
            if best[0] <= MATCH:
                break
    error, found = best
    if found is None or error > MATCH:
        raise_divergence("the head", "no final norm and output projection give the logits", error)
    return found


def _closest_head(
    trace: Trace, norm: NormCall | None, project: Linear | None, linears: Sequence[Linear], states: np.ndarray
) -> tuple[float, FoundHead | None]:
    """The closest output projection of the final states."""
    best: tuple[float, FoundHead | None] = _NO_FIT
    vocab, size = trace.logits.shape[1], states.shape[1]
    for weight, bias, raw in _projections(trace, linears, states, (vocab, size)):
        scale = trace.snap_to_known(fit_factor(trace.logits, raw))
        candidates: list[tuple[float, float | None]] = [(scale, None)]
        caps = [float(v) for v in trace.numbers_named("cap") if v > 0]
        candidates += [(s, cap) for cap in caps for s in dict.fromkeys((1.0, *trace.numbers_named("scal|mult")))]
        for scale, cap in candidates:
            out = raw * np.float32(scale)
            error = distance(out if cap is None else cap * np.tanh(out / cap), trace.logits)
            if error < best[0]:
                best = error, FoundHead(norm, project, weight, bias, scale, cap)
    return best


def _projections(
    trace: Trace, linears: Sequence[Linear], states: np.ndarray, shape: tuple[int, int]
) -> Iterator[tuple[str, str | None, np.ndarray]]:
    """[V, D] projections of the states: recorded linear maps, else matrices that code may have used directly."""
    recorded = [x for x in linears if x.output.shape[1] == shape[0] and nearly_equal(x.inputs, states)]
    for linear in recorded:
        yield linear.weight, linear.bias, linear.output
    if not recorded:
        for name, weight in trace.weights.items():
            if weight.shape == shape:
                yield name, None, states @ weight.T

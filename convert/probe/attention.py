"""Finds out how a layer attends, from the outputs of its projections and the input of its output projection."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from convert.probe import axes
from convert.probe.heads import Arrangement, Heads, arrangements, head_counts, repeat_heads
from convert.probe.numbers import attend, fit_scale, rotate
from convert.probe.trace import CERTAIN_MATCH, MATCH, Linear, NormCall, Trace, apply_norm, distance, nearly_equal
from tide_jax.model.architecture import AttentionType, QKNorm

_NormFunction = Callable[[np.ndarray], np.ndarray]
_ROWS_BEFORE_WINDOWS = 6


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """A candidate for everything about attention except which tensors it reads.

    Attributes:
      arrangement: arrangement of queries, keys and values.
      kind: flags of one layer.
      reference_kind: `kind` with the small windows that the reference runs with.
      softcap, clip: flags of the decoder.
    """

    arrangement: Arrangement
    kind: AttentionType
    reference_kind: AttentionType
    softcap: float | None = None
    clip: float | None = None


@dataclasses.dataclass(frozen=True)
class FoundAttention:
    """A layer's attention.

    Attributes:
      spec: flags.
      q, k, v: heads.
      out: the output projection.
      q_norm, k_norm: recorded norms of queries and keys.
      sub_norm: a norm before the output projection.
      gate: linear map whose sigmoid multiplies the output.
      sinks: name of the sinks' parameter.
      error: difference at the input of the output projection.
    """

    spec: AttentionSpec
    q: Heads
    k: Heads
    v: Heads
    out: Linear
    q_norm: NormCall | None
    k_norm: NormCall | None
    sub_norm: NormCall | None
    gate: Linear | None
    sinks: str | None
    error: float

    @property
    def kind(self) -> AttentionType:
        """The attention type."""
        return self.spec.kind

    @property
    def inputs(self) -> np.ndarray:
        """Input of the sublayer."""
        return self.q.linear.inputs


@dataclasses.dataclass(frozen=True)
class AttentionPieces:
    """Recorded parts that a layer's attention may consist of.

    Attributes:
      index: index of the layer.
      projections: linear maps with a common input, the layer's (normed) stream.
      out: the output projection.
      norms: norms that ran between projections and output.
      sub_norm: a norm before the output projection.
      vectors: names of the layer's parameters that belong to no linear map and no norm.
    """

    index: int
    projections: tuple[Linear, ...]
    out: Linear
    norms: tuple[NormCall, ...]
    sub_norm: NormCall | None
    vectors: tuple[str, ...]

    @property
    def output(self) -> np.ndarray:
        """Output of attention, [T, H * hd]."""
        return self.out.inputs if self.sub_norm is None else self.sub_norm.inputs


def find_attention(
    trace: Trace, pieces: AttentionPieces, hints: Sequence[AttentionSpec]
) -> tuple[FoundAttention | None, float]:
    """Returns a layer's attention, or None if no candidate matches, and the closest candidate's error.

    Args:
      hints: specs found for other layers, tried first.
    """
    search = _Search(trace, pieces)
    for spec in hints:
        search.try_full(spec)
        if search.error <= CERTAIN_MATCH:
            return search.best, search.error
    for candidate in _candidates(trace, pieces):
        search.explore(candidate)
        if search.error <= CERTAIN_MATCH:
            break
    return (search.best if search.error <= MATCH else None), search.error


def _candidates(trace: Trace, pieces: AttentionPieces) -> Iterator[tuple[Arrangement, Linear | None]]:
    """Yields arrangements, with each linear map as the gate and without a gate."""
    gates: list[Linear | None] = [None, *pieces.projections] if len(pieces.projections) > 1 else [None]
    for heads in head_counts(trace, pieces.output.shape[1]):
        width = pieces.output.shape[1] // heads
        for gate in gates:
            remaining = [linear for linear in pieces.projections if linear is not gate]
            if gate is None or gate.output.shape[1] in (heads, heads * width):
                for arrangement in arrangements(remaining, heads, width):
                    yield arrangement, gate


class _Search:
    """Search over candidates; keeps the closest."""

    def __init__(self, trace: Trace, pieces: AttentionPieces) -> None:
        self.trace, self.pieces = trace, pieces
        self.best: FoundAttention | None = None
        self.error = np.inf

    def try_full(self, spec: AttentionSpec) -> None:
        """Measures one complete candidate."""
        for gate in (None, *self.pieces.projections):
            remaining = [linear for linear in self.pieces.projections if linear is not gate]
            if len(remaining) == len(spec.arrangement.roles) and _sizes_fit(spec.arrangement, remaining):
                layer = _ArrangedLayer(self.trace, self.pieces, spec.arrangement, gate)
                self._keep_if_closer(layer, spec)

    def explore(self, candidate: tuple[Arrangement, Linear | None]) -> None:
        """Measures the candidates of one arrangement, flag by flag, if its values are right."""
        layer = _ArrangedLayer(self.trace, self.pieces, *candidate)
        for clip in axes.clips(self.trace):
            if layer.values_fit(clip):
                self._explore_flags(layer, clip)
                if self.error <= CERTAIN_MATCH:
                    return

    def _explore_flags(self, layer: _ArrangedLayer, clip: float | None) -> None:
        """Chooses all flags on the first tokens, which no window affects, and then the window."""
        # Choose all flags but the window.
        best, least = None, np.inf
        for spec in layer.specs(clip):
            error = layer.error(spec, _ROWS_BEFORE_WINDOWS)
            if error < least:
                best, least = spec, error
            if error <= CERTAIN_MATCH:
                break
        if best is None:
            return
        self._keep_if_closer(layer, best)
        if least > MATCH:
            return
        # Try each window on the full row.
        for field, seen, true in axes.windows(self.trace):
            kind, small = (dataclasses.replace(best.kind, **{field: size}) for size in (true, seen))
            self._keep_if_closer(layer, dataclasses.replace(best, kind=kind, reference_kind=small))

    def _keep_if_closer(self, layer: _ArrangedLayer, spec: AttentionSpec) -> None:
        error = layer.error(spec, None)
        if error < self.error:
            self.best, self.error = layer.result(spec, error), error


class _ArrangedLayer:
    """Recorded numbers of a layer under one arrangement of its heads."""

    def __init__(self, trace: Trace, pieces: AttentionPieces, arrangement: Arrangement, gate: Linear | None) -> None:
        self.trace, self.pieces, self.arrangement, self.gate = trace, pieces, arrangement, gate
        heads, width = arrangement.heads, arrangement.width
        self.q, self.k, self.v = arrangement.split_heads(
            [linear for linear in pieces.projections if linear is not gate]
        )
        self.expected = pieces.output.reshape(-1, heads, width)
        self.gate_values = np.ones((len(self.expected), 1, 1), np.float32)
        if gate is not None:
            self.gate_values = (1 / (1 + np.exp(-gate.output))).reshape(len(self.expected), heads, -1)
        self.sinks = next((n for n in pieces.vectors if trace.weights[n].shape == (heads,)), None)
        self.norms = _qk_norms(pieces.norms, self.q.output, self.k.output)

    def values_fit(self, clip: float | None) -> bool:
        """Checks the first token: it sees only itself, so its attention output must be its values."""
        values = repeat_heads(_clip(self.v.output[:1], clip), self.arrangement.heads) * self.gate_values[:1]
        return self.sinks is not None or distance(values, self.expected[:1]) <= MATCH

    def specs(self, clip: float | None) -> Iterator[AttentionSpec]:
        """Candidates without windows. The scale is fitted; with a score cap, scales come from the configuration."""
        trace, heads, width = self.trace, self.arrangement.heads, self.arrangement.width
        known = axes.scales(trace, width, self.pieces.out.output.shape[1], self.pieces.index)
        positions = axes.positions(trace, heads, width)
        for norm, softcap, position in itertools.product(self._norm_flags(), axes.softcaps(trace), positions):
            kind = AttentionType(1.0, qk_norm=norm, sinks=self.sinks is not None, **position)
            spec = AttentionSpec(self.arrangement, kind, kind, softcap, clip)
            scales = known
            if softcap is None and not kind.alibi_bfloat16:
                fitted = fit_scale(*self._prepare(spec, 2), self.expected[:2] / self.gate_values[:2], kind)
                scales = known[:1] if fitted is None else [axes.nearest_known(trace, fitted, known)]
            for scale in scales:
                scaled = dataclasses.replace(kind, scale=scale)
                yield dataclasses.replace(spec, kind=scaled, reference_kind=scaled)

    def _norm_flags(self) -> list[QKNorm | None]:
        """Flags of the recorded norms of queries and keys; else no norm, or norms without weights and module."""
        if self.norms is not None:
            return [_qk_norm_flags(self.norms, self.arrangement)]
        eps = [*(v for v in self.trace.numbers_named("eps") if 0 < v < 0.01), float(np.finfo(np.float32).eps)]
        bare = [QKNorm(eps=e, scale=False, after_rope=after) for after in (True, False) for e in dict.fromkeys(eps)]
        return [None, *bare]

    def error(self, spec: AttentionSpec, rows: int | None) -> float:
        """Error of a candidate at the input of the output projection, in the first `rows` rows."""
        sinks = None if self.sinks is None else self.trace.weights[self.sinks]
        found = attend(*self._prepare(spec, rows), spec.reference_kind, spec.softcap, sinks)
        return distance(found * self.gate_values[:rows], self.expected[:rows])

    def _prepare(self, spec: AttentionSpec, rows: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries and keys after norm, clipping and rotation; clipped values."""
        flags = spec.kind.qk_norm

        def prepare_heads(part: Heads, which: int) -> np.ndarray:
            norm = (lambda x: x) if flags is None else self._norm(flags, which)
            before, after = (lambda x: x, norm) if flags is not None and flags.after_rope else (norm, lambda x: x)
            return after(
                rotate(_clip(before(part.output[:rows]), spec.clip), spec.reference_kind.rope, len(part.output))
            )

        return prepare_heads(self.q, 0), prepare_heads(self.k, 1), _clip(self.v.output[:rows], spec.clip)

    def _norm(self, flags: QKNorm, which: int) -> _NormFunction:
        """The norm of queries (0) or keys (1), as a function of heads [T, N, hd]."""
        if self.norms is None:
            return lambda x: apply_norm(x, flags.kind, flags.eps)
        call = self.norms.calls[which]
        flat = call.inputs.ndim == 2
        return lambda x: call.apply(x.reshape(len(x), -1) if flat else x, self.trace.weights).reshape(x.shape)

    def result(self, spec: AttentionSpec, error: float) -> FoundAttention:
        """Result for an accepted candidate."""
        norms = (None, None) if self.norms is None else self.norms.calls
        pieces = self.pieces
        return FoundAttention(
            spec, self.q, self.k, self.v, pieces.out, *norms, pieces.sub_norm, self.gate, self.sinks, error
        )


@dataclasses.dataclass(frozen=True)
class _QKNorms:
    calls: tuple[NormCall, NormCall]
    after_rope: bool


def _qk_norms(norms: Sequence[NormCall], q: np.ndarray, k: np.ndarray) -> _QKNorms | None:
    """Norms that read the queries and keys, else norms of the same sizes, which may read rotated ones."""
    exact = [next((n for n in norms if _reads(n, heads)), None) for heads in (q, k)]
    if exact[0] is not None and exact[1] is not None:
        return _QKNorms((exact[0], exact[1]), after_rope=False)
    of_queries = next((n for n in norms if n.inputs.size == q.size), None)
    of_keys = next((n for n in norms if n.inputs.size == k.size and n is not of_queries), None)
    if of_queries is None or of_keys is None:
        return None
    return _QKNorms((of_queries, of_keys), after_rope=True)


def _reads(norm: NormCall, heads: np.ndarray) -> bool:
    """Whether heads [T, N, hd] are a norm's input, in any axis order that code uses."""
    if norm.inputs.size != heads.size:
        return False
    swapped = heads.swapaxes(0, 1)
    return any(
        x.shape == norm.inputs.shape and nearly_equal(x, norm.inputs)
        for x in (heads, swapped, heads.reshape(len(heads), -1))
    )


def _qk_norm_flags(norms: _QKNorms, arrangement: Arrangement) -> QKNorm:
    norm = norms.calls[0]
    all_heads = norm.inputs.ndim == 2 and arrangement.heads > 1
    return QKNorm(
        kind=norm.kind,
        eps=norm.eps,
        all_heads=all_heads,
        per_head=all_heads or len(norm.shape) == 2,
        scale=norm.scale is not None,
        bias=norm.bias is not None,
        unit_offset=norm.unit_offset,
        after_rope=norms.after_rope,
    )


def _sizes_fit(arrangement: Arrangement, linears: Sequence[Linear]) -> bool:
    """Whether the linear maps have the numbers of outputs that an arrangement requires."""
    counts = {"q": arrangement.heads, "k": arrangement.kv_heads, "v": arrangement.kv_heads}
    sizes = [arrangement.width * sum(counts[role] for role in map_roles) for map_roles in arrangement.roles]
    return sizes == [linear.output.shape[1] for linear in linears]


def _clip(x: np.ndarray, limit: float | None) -> np.ndarray:
    return x if limit is None else np.clip(x, -limit, limit)

"""Finding out how a layer attends, from its projections' outputs and from what enters its output projection."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from convert import probe_axes as axes
from convert.probe_heads import Arrangement, Heads, arrangements, head_counts, repeated
from convert.probe_trace import MATCH, Linear, NormCall, Trace, distance, normed, same
from tide_jax.architecture import AttentionType, QKNorm, RopeConfig
from tide_jax.attention import attention_context
from tide_jax.rotary import rope_tables

_Norm = Callable[[np.ndarray], np.ndarray]
_CLEAR = 3e-6  # so close that no other candidate is tried
_BEFORE_WINDOWS = 6


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """A candidate: everything about attention but which tensors it reads.

    Attributes:
      arrangement: of queries, keys and values.
      kind: flags of one layer.
      seen: `kind` as it shows in the reference, whose windows are small.
      softcap, clip: flags of the decoder.
    """

    arrangement: Arrangement
    kind: AttentionType
    seen: AttentionType
    softcap: float | None = None
    clip: float | None = None


@dataclasses.dataclass(frozen=True)
class AttentionFound:
    """A layer's attention.

    Attributes:
      spec: flags.
      q, k, v: heads.
      out: the output projection.
      q_norm, k_norm: recorded norms of queries and keys.
      sub_norm: a norm before the output projection.
      gate: linear map whose sigmoid multiplies the output.
      sinks: name of the sinks' parameter.
      error: of what enters the output projection.
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


@dataclasses.dataclass(frozen=True)
class AttentionPieces:
    """What a layer's attention may be made of.

    Attributes:
      index: of the layer.
      projections: linear maps of one input, the layer's (normed) stream.
      out: the output projection.
      norms: norms that ran between projections and output.
      sub_norm: a norm before the output projection.
      vectors: names of parameters of the layer that belong to no linear map and no norm.
    """

    index: int
    projections: tuple[Linear, ...]
    out: Linear
    norms: tuple[NormCall, ...]
    sub_norm: NormCall | None
    vectors: tuple[str, ...]

    @property
    def mixed(self) -> np.ndarray:
        """What attention gives, [T, H * hd]."""
        return self.out.inputs if self.sub_norm is None else self.sub_norm.inputs


def find_attention(
    trace: Trace, pieces: AttentionPieces, hints: Sequence[AttentionSpec]
) -> tuple[AttentionFound | None, float]:
    """The attention of a layer, or None where no candidate gives it; and the closest candidate's error.

    Args:
      hints: what other layers turned out to do, tried first.
    """
    search = _Search(trace, pieces)
    for spec in hints:
        search.try_full(spec)
        if search.error <= _CLEAR:
            return search.best, search.error
    for candidate in _candidates(trace, pieces):
        search.explore(candidate)
        if search.error <= _CLEAR:
            break
    return (search.best if search.error <= MATCH else None), search.error


def _candidates(trace: Trace, pieces: AttentionPieces) -> Iterator[tuple[Arrangement, Linear | None]]:
    """Arrangements, with one of the linear maps as the gate or without a gate."""
    gates: list[Linear | None] = [None, *pieces.projections] if len(pieces.projections) > 1 else [None]
    for heads in head_counts(trace, pieces.mixed.shape[1]):
        width = pieces.mixed.shape[1] // heads
        for gate in gates:
            left = [linear for linear in pieces.projections if linear is not gate]
            if gate is None or gate.output.shape[1] in (heads, heads * width):
                for arrangement in arrangements(left, heads, width):
                    yield arrangement, gate


class _Search:
    """Keeps the closest candidate."""

    def __init__(self, trace: Trace, pieces: AttentionPieces) -> None:
        self.trace, self.pieces = trace, pieces
        self.best: AttentionFound | None = None
        self.error = np.inf

    def try_full(self, spec: AttentionSpec) -> None:
        """Measures one whole candidate."""
        for gate in (None, *self.pieces.projections):
            left = [linear for linear in self.pieces.projections if linear is not gate]
            if len(left) == len(spec.arrangement.roles) and _fits(spec.arrangement, left):
                layer = _Layer(self.trace, self.pieces, spec.arrangement, gate)
                self._keep(layer, spec)

    def explore(self, candidate: tuple[Arrangement, Linear | None]) -> None:
        """Measures every candidate of an arrangement whose values are right, flag by flag."""
        layer = _Layer(self.trace, self.pieces, *candidate)
        for clip in axes.clips(self.trace):
            if layer.values_fit(clip):
                self._explore_flags(layer, clip)
                if self.error <= _CLEAR:
                    return

    def _explore_flags(self, layer: _Layer, clip: float | None) -> None:
        """The first tokens, which see no window, decide all but the window."""
        best, least = None, np.inf
        for spec in layer.specs(clip):
            error = layer.error(spec, _BEFORE_WINDOWS)
            if error < least:
                best, least = spec, error
            if error <= _CLEAR:
                break
        if best is None:
            return
        self._keep(layer, best)
        if least > MATCH:
            return
        for field, seen, true in axes.windows(self.trace):
            kind, small = (dataclasses.replace(best.kind, **{field: size}) for size in (true, seen))
            self._keep(layer, dataclasses.replace(best, kind=kind, seen=small))

    def _keep(self, layer: _Layer, spec: AttentionSpec) -> None:
        error = layer.error(spec, None)
        if error < self.error:
            self.best, self.error = layer.found(spec, error), error


class _Layer:
    """The numbers of one arrangement of a layer's heads."""

    def __init__(self, trace: Trace, pieces: AttentionPieces, arrangement: Arrangement, gate: Linear | None) -> None:
        self.trace, self.pieces, self.arrangement, self.gate = trace, pieces, arrangement, gate
        heads, width = arrangement.heads, arrangement.width
        self.q, self.k, self.v = arrangement.of([linear for linear in pieces.projections if linear is not gate])
        self.expected = pieces.mixed.reshape(-1, heads, width)
        self.open = np.ones((len(self.expected), 1, 1), np.float32)
        if gate is not None:
            self.open = (1 / (1 + np.exp(-gate.output))).reshape(len(self.expected), heads, -1)
        self.sinks = next((n for n in pieces.vectors if trace.weights[n].shape == (heads,)), None)
        self.norms = _qk_norms(pieces.norms, self.q.output, self.k.output)

    def values_fit(self, clip: float | None) -> bool:
        """The first token sees itself alone: what attention gives there are its values."""
        values = repeated(_clipped(self.v.output[:1], clip), self.arrangement.heads) * self.open[:1]
        return self.sinks is not None or distance(values, self.expected[:1]) <= MATCH

    def specs(self, clip: float | None) -> Iterator[AttentionSpec]:
        """Candidates without windows."""
        trace, heads, width = self.trace, self.arrangement.heads, self.arrangement.width
        scales = axes.scales(trace, width, self.pieces.out.output.shape[1], self.pieces.index)
        places = axes.positions(trace, heads, width)
        for norm, cap, scale in itertools.product(self._norm_flags(), axes.softcaps(trace), scales):
            for place in places:
                kind = AttentionType(scale, qk_norm=norm, sinks=self.sinks is not None, **place)
                yield AttentionSpec(self.arrangement, kind, kind, cap, clip)

    def _norm_flags(self) -> list[QKNorm | None]:
        """The recorded norms of queries and keys; without any, none or those that have no weights and no module."""
        if self.norms is not None:
            return [_flags(self.norms, self.arrangement)]
        eps = [*(v for v in self.trace.numbers("eps") if 0 < v < 0.01), float(np.finfo(np.float32).eps)]
        bare = [QKNorm(eps=e, scale=False, after_rope=late) for late in (True, False) for e in dict.fromkeys(eps)]
        return [None, *bare]

    def error(self, spec: AttentionSpec, rows: int | None) -> float:
        """How far a candidate is from what enters the output projection, in its first rows."""
        norms = [None, None] if spec.kind.qk_norm is None else [self._norm(spec.kind.qk_norm, i) for i in (0, 1)]
        late = spec.kind.qk_norm is not None and spec.kind.qk_norm.after_rope

        def placed(part: Heads, norm: _Norm | None) -> np.ndarray:
            x = part.output[:rows]
            x = _clipped(x if norm is None or late else norm(x), spec.clip)
            x = _rotated(x, spec.seen)
            return norm(x) if norm is not None and late else x

        q, k = (placed(part, norm) for part, norm in zip((self.q, self.k), norms, strict=True))
        v = _clipped(self.v.output[:rows], spec.clip)
        sinks = None if self.sinks is None else self.trace.weights[self.sinks]
        return distance(mixed(q, k, v, spec.seen, spec.softcap, sinks) * self.open[:rows], self.expected[:rows])

    def _norm(self, flags: QKNorm, which: int) -> _Norm:
        """The norm of queries (0) or keys (1), as a function of heads [T, N, hd]."""
        if self.norms is None:
            return lambda x: normed(x, flags.kind, flags.eps)
        call = self.norms.calls[which]
        flat = call.inputs.ndim == 2
        return lambda x: call.apply(x.reshape(len(x), -1) if flat else x, self.trace.weights).reshape(x.shape)

    def found(self, spec: AttentionSpec, error: float) -> AttentionFound:
        """The candidate, taken for true."""
        norms = (None, None) if self.norms is None else self.norms.calls
        pieces = self.pieces
        return AttentionFound(
            spec, self.q, self.k, self.v, pieces.out, *norms, pieces.sub_norm, self.gate, self.sinks, error
        )


@dataclasses.dataclass(frozen=True)
class _QKNorms:
    calls: tuple[NormCall, NormCall]
    after_rope: bool


def _qk_norms(norms: Sequence[NormCall], q: np.ndarray, k: np.ndarray) -> _QKNorms | None:
    """The norms whose input queries and keys are; or those that have the sizes, for they may see rotated ones."""
    exact = [next((n for n in norms if _reads(n, heads)), None) for heads in (q, k)]
    if exact[0] is not None and exact[1] is not None:
        return _QKNorms((exact[0], exact[1]), after_rope=False)
    of_queries = next((n for n in norms if n.inputs.size == q.size), None)
    of_keys = next((n for n in norms if n.inputs.size == k.size and n is not of_queries), None)
    if of_queries is None or of_keys is None:
        return None
    return _QKNorms((of_queries, of_keys), after_rope=True)


def _reads(norm: NormCall, heads: np.ndarray) -> bool:
    """Whether heads [T, N, hd] are a norm's input, in any of the orders code gives them."""
    if norm.inputs.size != heads.size:
        return False
    swapped = heads.swapaxes(0, 1)
    return any(
        x.shape == norm.inputs.shape and same(x, norm.inputs) for x in (heads, swapped, heads.reshape(len(heads), -1))
    )


def _flags(norms: _QKNorms, arrangement: Arrangement) -> QKNorm:
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


def _fits(arrangement: Arrangement, linears: Sequence[Linear]) -> bool:
    """Whether linear maps have as many outputs as an arrangement says."""
    counts = {"q": arrangement.heads, "k": arrangement.kv_heads, "v": arrangement.kv_heads}
    sizes = [arrangement.width * sum(counts[role] for role in held) for held in arrangement.roles]
    return sizes == [linear.output.shape[1] for linear in linears]


def _clipped(x: np.ndarray, limit: float | None) -> np.ndarray:
    return x if limit is None else np.clip(x, -limit, limit)


def _rotated(x: np.ndarray, kind: AttentionType) -> np.ndarray:
    """Queries or keys [T, N, hd] turned by their positions."""
    if kind.rope is None:
        return x
    cos, sin = _tables(dataclasses.replace(kind.rope, interleaved=False), len(x))
    size = 2 * cos.shape[-1]
    pairs = (
        (slice(0, size, 2), slice(1, size, 2)) if kind.rope.interleaved else (slice(size // 2), slice(size // 2, size))
    )
    turned = x.copy()
    turned[..., pairs[0]] = x[..., pairs[0]] * cos - x[..., pairs[1]] * sin
    turned[..., pairs[1]] = x[..., pairs[1]] * cos + x[..., pairs[0]] * sin
    return turned


@functools.lru_cache(maxsize=256)
def _tables(rope: RopeConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, [T, 1, R] each."""
    tables = rope_tables(rope, jnp.arange(length, dtype=jnp.int32)[None], jnp.int32(length))
    return np.asarray(tables[0])[0, :, None], np.asarray(tables[1])[0, :, None]


@functools.lru_cache(maxsize=256)
def _span(kind: AttentionType, length: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Which keys each query sees [T, T], and what is added to the scores [H, T, T]."""
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    span = attention_context(dataclasses.replace(kind, rope=None), positions, jnp.int32(length), None).new
    return np.asarray(span.mask)[0], None if span.bias is None else np.asarray(span.bias)[0]


def mixed(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, kind: AttentionType, softcap: float | None, sinks: np.ndarray | None
) -> np.ndarray:
    """What attention gives, [T, H, hv], for rotated queries [T, H, hd] and keys [T, KV, hd] and for values."""
    keys, values = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    scores = np.matmul(q.swapaxes(0, 1), keys.transpose(1, 2, 0)) * np.float32(kind.scale)  # [H, T, S]
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    mask, bias = _span(_visible(kind), len(q))
    scores = np.where(mask[None], scores if bias is None else scores + bias, -np.inf)
    if sinks is not None:
        scores = np.concatenate([scores, np.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))], axis=-1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True))[..., : len(k)]
    return np.matmul(weights, values.swapaxes(0, 1)).swapaxes(0, 1)


def _visible(kind: AttentionType) -> AttentionType:
    """An attention type without the flags that masks and biases do not depend on."""
    return dataclasses.replace(kind, rope=None, qk_norm=None, scale=kind.scale if kind.alibi_bfloat16 else 1.0)

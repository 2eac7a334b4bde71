"""Finds out multi-head latent attention: keys and values made from one low-rank vector per token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from convert.probe import axes
from convert.probe.heads import head_counts
from convert.probe.numbers import fitted_scale, mixed, rotated
from convert.probe.trace import CLEAR, MATCH, Linear, NormCall, Trace, distance, equal, factor, same
from tide_jax.model.architecture import AttentionType, LatentConfig


@dataclasses.dataclass(frozen=True)
class LatentSpec:
    """Flags of one layer's latent attention."""

    heads: int
    latent: LatentConfig
    kind: AttentionType


@dataclasses.dataclass(frozen=True)
class LatentFound:
    """A layer's latent attention.

    Attributes:
      spec: flags.
      q_down, q_norm: the queries' bottleneck, None if there is none.
      q, kv_down, kv_up, out: linear maps.
      kv_norm: the norm of the latent vector.
      error: difference at the input of the output projection.
    """

    spec: LatentSpec
    q_down: Linear | None
    q_norm: NormCall | None
    q: Linear
    kv_down: Linear
    kv_norm: NormCall
    kv_up: Linear
    out: Linear
    error: float

    sub_norm = None

    @property
    def kind(self) -> AttentionType:
        """The attention type."""
        return self.spec.kind

    @property
    def inputs(self) -> np.ndarray:
        """Input of the sublayer."""
        return self.kv_down.inputs


def find_latent(
    trace: Trace, index: int, linears: Sequence[Linear], norms: Sequence[NormCall], out: Linear
) -> tuple[LatentFound | None, float] | None:
    """Returns a layer's latent attention, or None if no candidate matches, and the closest candidate's error.

    Returns just None if no linear map reads a normed part of another one's output.

    Args:
      linears: linear maps left for attention, without the output projection.
      norms: norms of the layer.
    """
    shape = _shape(linears, norms)
    if shape is None:
        return None
    best, least = None, np.inf
    for found in _candidates(trace, index, shape, out):
        if found.error < least:
            best, least = found, found.error
        if least <= CLEAR:
            break
    return (best if least <= MATCH else None), least


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Which linear maps and norms feed each other."""

    q_down: Linear | None
    q_norm: NormCall | None
    q: Linear
    q_scale: float
    kv_down: Linear
    kv_norm: NormCall
    kv_up: Linear
    kv_scale: float


def _shape(linears: Sequence[Linear], norms: Sequence[NormCall]) -> _Shape | None:
    for kv_up in linears:
        source = _source(kv_up, linears, norms, part=True)
        if source is None:
            continue
        kv_down, kv_norm, kv_scale = source
        for q in (x for x in linears if x not in (kv_up, kv_down)):
            if equal(q.inputs, kv_down.inputs) and len(linears) == 3:
                return _Shape(None, None, q, 1.0, kv_down, kv_norm, kv_up, kv_scale)
            below = _source(q, linears, norms, part=False)
            if below is not None and len(linears) == 4:
                return _Shape(below[0], below[1], q, below[2], kv_down, kv_norm, kv_up, kv_scale)
    return None


def _source(
    reader: Linear, linears: Sequence[Linear], norms: Sequence[NormCall], *, part: bool
) -> tuple[Linear, NormCall, float] | None:
    """Finds a map whose (leading) outputs a norm reads, where `reader` reads the norm's output times a number."""
    for norm in norms:
        if norm.output.shape != reader.inputs.shape:
            continue
        scale = factor(reader.inputs, norm.output)
        if not same(np.float32(scale) * norm.output, reader.inputs):
            continue
        size = norm.inputs.shape[1]
        for linear in linears:
            cut = linear.output.shape[1] > size
            if linear is not reader and part == cut and same(linear.output[:, :size], norm.inputs):
                return linear, norm, scale
    return None


def _candidates(trace: Trace, index: int, shape: _Shape, out: Linear) -> Iterator[LatentFound]:
    rank = shape.kv_norm.inputs.shape[1]
    rope_dim = shape.kv_down.output.shape[1] - rank
    for heads in head_counts(trace, out.inputs.shape[1]):
        value_dim = out.inputs.shape[1] // heads
        nope_dim = shape.kv_up.output.shape[1] / heads - value_dim
        if nope_dim < 1 or shape.q.output.shape[1] != heads * (nope_dim + rope_dim):
            continue
        latent = LatentConfig(
            kv_rank=rank,
            q_rank=None if shape.q_norm is None else shape.q_norm.inputs.shape[1],
            nope_dim=int(nope_dim),
            rope_dim=rope_dim,
            value_dim=value_dim,
            norm_eps=shape.kv_norm.eps,
            q_scale=trace.exact(shape.q_scale),
            kv_scale=trace.exact(shape.kv_scale),
        )
        yield from _placed(trace, index, shape, out, heads, latent)


def _placed(
    trace: Trace, index: int, shape: _Shape, out: Linear, heads: int, latent: LatentConfig
) -> Iterator[LatentFound]:
    """Candidates for one arrangement of the heads: each rotation with its fitted scale."""
    length, nope = len(out.inputs), latent.nope_dim
    expected = out.inputs.reshape(length, heads, -1)
    q = shape.q.output.reshape(length, heads, -1)
    kv = shape.kv_up.output.reshape(length, heads, -1)
    values = kv[..., nope:]
    # The first token sees only itself: its output must be its values.
    if distance(values[:1], expected[:1]) > MATCH:
        return
    known = axes.scales(trace, nope + latent.rope_dim, out.output.shape[1], index)
    shared = shape.kv_down.output[:, None, latent.kv_rank :]
    for place in axes.positions(trace, heads, latent.rope_dim):
        rope = place.get("rope")
        if place.get("alibi"):
            continue
        turned = np.repeat(rotated(shared, rope, length), heads, axis=1)
        keys = np.concatenate([kv[..., :nope], turned], axis=-1)
        queries = np.concatenate([q[..., :nope], rotated(q[..., nope:], rope, length)], axis=-1)
        kind = AttentionType(1.0, rope=rope)
        fitted = fitted_scale(queries[:2], keys[:2], values[:2], expected[:2], kind)
        if fitted is None:
            continue
        kind = dataclasses.replace(kind, scale=axes.nearest(trace, fitted, known))
        error = distance(mixed(queries, keys, values, kind, None, None), expected)
        yield LatentFound(
            LatentSpec(heads, latent, kind), shape.q_down, shape.q_norm, shape.q, shape.kv_down, shape.kv_norm,
            shape.kv_up, out, error,
        )  # fmt: skip

"""Finds out multi-head latent attention: keys and values made from one low-rank vector per token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from convert.probe import axes
from convert.probe.heads import head_counts
from convert.probe.numbers import attend, fit_scale, rotate
from convert.probe.trace import (
    CERTAIN_MATCH,
    MATCH,
    Linear,
    NormCall,
    Trace,
    distance,
    exactly_equal,
    fit_factor,
    nearly_equal,
)
from tide_jax.model.architecture import AttentionType, LatentConfig


@dataclasses.dataclass(frozen=True)
class LatentSpec:
    """Flags of one layer's latent attention."""

    heads: int
    latent: LatentConfig
    kind: AttentionType


@dataclasses.dataclass(frozen=True)
class FoundLatentAttention:
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
) -> tuple[FoundLatentAttention | None, float] | None:
    """Returns a layer's latent attention, or None if no candidate matches, and the closest candidate's error.

    Returns just None if no linear map reads a normed part of another one's output.

    Args:
      linears: linear maps left for attention, without the output projection.
      norms: norms of the layer.
    """
    shape = _find_low_rank_maps(linears, norms)
    if shape is None:
        return None
    best, least = None, np.inf
    for found in _candidates(trace, index, shape, out):
        if found.error < least:
            best, least = found, found.error
        if least <= CERTAIN_MATCH:
            break
    return (best if least <= MATCH else None), least


@dataclasses.dataclass(frozen=True)
class _LowRankMaps:
    """Which linear maps and norms feed each other."""

    q_down: Linear | None
    q_norm: NormCall | None
    q: Linear
    q_scale: float
    kv_down: Linear
    kv_norm: NormCall
    kv_up: Linear
    kv_scale: float


def _find_low_rank_maps(linears: Sequence[Linear], norms: Sequence[NormCall]) -> _LowRankMaps | None:
    for kv_up in linears:
        source = _find_source(kv_up, linears, norms, part=True)
        if source is None:
            continue
        kv_down, kv_norm, kv_scale = source
        for q in (x for x in linears if x not in (kv_up, kv_down)):
            if exactly_equal(q.inputs, kv_down.inputs) and len(linears) == 3:
                return _LowRankMaps(None, None, q, 1.0, kv_down, kv_norm, kv_up, kv_scale)
            bottleneck = _find_source(q, linears, norms, part=False)
            if bottleneck is not None and len(linears) == 4:
                return _LowRankMaps(bottleneck[0], bottleneck[1], q, bottleneck[2], kv_down, kv_norm, kv_up, kv_scale)
    return None


def _find_source(
    reader: Linear, linears: Sequence[Linear], norms: Sequence[NormCall], *, part: bool
) -> tuple[Linear, NormCall, float] | None:
    """Finds a map whose (leading) outputs a norm reads, where `reader` reads the norm's output times a number."""
    for norm in norms:
        if norm.output.shape != reader.inputs.shape:
            continue
        scale = fit_factor(reader.inputs, norm.output)
        if not nearly_equal(np.float32(scale) * norm.output, reader.inputs):
            continue
        size = norm.inputs.shape[1]
        for linear in linears:
            is_partial = linear.output.shape[1] > size
            if linear is not reader and part == is_partial and nearly_equal(linear.output[:, :size], norm.inputs):
                return linear, norm, scale
    return None


def _candidates(trace: Trace, index: int, shape: _LowRankMaps, out: Linear) -> Iterator[FoundLatentAttention]:
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
            q_scale=trace.snap_to_known(shape.q_scale),
            kv_scale=trace.snap_to_known(shape.kv_scale),
        )
        yield from _rotation_candidates(trace, index, shape, out, heads, latent)


def _rotation_candidates(
    trace: Trace, index: int, shape: _LowRankMaps, out: Linear, heads: int, latent: LatentConfig
) -> Iterator[FoundLatentAttention]:
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
    for position in axes.positions(trace, heads, latent.rope_dim):
        rope = position.get("rope")
        if position.get("alibi"):
            continue
        rotated_keys = np.repeat(rotate(shared, rope, length), heads, axis=1)
        keys = np.concatenate([kv[..., :nope], rotated_keys], axis=-1)
        queries = np.concatenate([q[..., :nope], rotate(q[..., nope:], rope, length)], axis=-1)
        kind = AttentionType(1.0, rope=rope)
        fitted = fit_scale(queries[:2], keys[:2], values[:2], expected[:2], kind)
        if fitted is None:
            continue
        kind = dataclasses.replace(kind, scale=axes.nearest_known(trace, fitted, known))
        error = distance(attend(queries, keys, values, kind, None, None), expected)
        yield FoundLatentAttention(
            LatentSpec(heads, latent, kind), shape.q_down, shape.q_norm, shape.q, shape.kv_down, shape.kv_norm,
            shape.kv_up, out, error,
        )  # fmt: skip

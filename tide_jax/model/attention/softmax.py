"""Attention over some of the keys, and merging such parts into one softmax.

Parts are merged as in online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tide_jax.model.attention.span import KeyValue, Span
from tide_jax.model.ops import einsum

MASKED = -1e30  # finite, so that a padding query that sees no key gives no NaN
FEW_QUERIES = 48  # per key head; on a CPU both orders cost the same at 72, and keys first costs a quarter more at 192


class Part(NamedTuple):
    """Attention over some of the keys: largest score, sum of the weights relative to it, and weighted sum of values."""

    peak: Float[Array, "B KV G T"]
    total: Float[Array, "B KV G T"]
    mixed: Float[Array, "B KV G T hv"]

    def output(self) -> Float[Array, "B KV G T hv"]:
        """Weighted mean of the values; zeros for a query that has read no key."""
        return self.mixed / jnp.where(self.total == 0.0, 1.0, self.total)[..., None]


Attend = Callable[[Array, KeyValue, Span], Part]
"""Attention of queries ``[B, KV, G, T, hk]`` over keys and values, under their mask and bias."""


def attend_part(
    q: Float[Array, "B KV G T hk"], rows: KeyValue, span: Span, scale: float, softcap: float | None
) -> Part:
    """Attention over one run of keys."""
    scores = _products(q, rows.keys).astype(jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if span.bias is not None:
        scores = scores + span.bias.reshape(scores.shape[0], *scores.shape[1:3], *span.bias.shape[2:])
    scores = jnp.where(span.mask[:, None, None, :, :], scores, MASKED)
    peak = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - peak[..., None])
    mixed = einsum("bkgts,bksd->bkgtd", weights.astype(rows.values.dtype), rows.values)
    return Part(peak, jnp.sum(weights, axis=-1), mixed.astype(jnp.float32))


def empty_part(shape: tuple[int, ...], value_channels: int) -> Part:
    """The part of no key, for queries of a shape ``[B, KV, G, T]``; merging with it changes nothing."""
    nothing = jnp.zeros(shape, jnp.float32)
    return Part(nothing + MASKED, nothing, jnp.zeros((*shape, value_channels), jnp.float32))


def merge(a: Part, b: Part) -> Part:
    """The part of both parts' keys."""
    peak = jnp.maximum(a.peak, b.peak)
    first, second = jnp.exp(a.peak - peak), jnp.exp(b.peak - peak)
    mixed = a.mixed * first[..., None] + b.mixed * second[..., None]
    return Part(peak, a.total * first + b.total * second, mixed)


def _products(q: Float[Array, "B KV G T hk"], keys: Float[Array, "B KV S hk"]) -> Float[Array, "B KV G T S"]:
    """Queries times keys, in the order that is fastest on the platform.

    With few queries, a CPU computes keys times queries three times as fast as queries times keys. A GPU gets few
    queries with tokens before heads, as they came: in the other order, XLA transposes and copies all cached keys for a
    single token.
    """
    if q.shape[2] * q.shape[3] > FEW_QUERIES:
        return einsum("bkgtd,bksd->bkgts", q, keys)
    return lax.platform_dependent(q, keys, cpu=_keys_first, default=_by_token)


def _keys_first(q: Float[Array, "B KV G T hk"], keys: Float[Array, "B KV S hk"]) -> Float[Array, "B KV G T S"]:
    return jnp.moveaxis(einsum("bksd,bkgtd->bksgt", keys, q), 2, -1)


def _by_token(q: Float[Array, "B KV G T hk"], keys: Float[Array, "B KV S hk"]) -> Float[Array, "B KV G T S"]:
    return einsum("btkgd,bksd->bkgts", jnp.transpose(q, (0, 3, 1, 2, 4)), keys)

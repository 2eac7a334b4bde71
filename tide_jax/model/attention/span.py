"""One softmax over several runs of keys, of which one is the cache, read in place in blocks.

The cache has separate arrays for each layer. With one array for all layers, XLA on a GPU would copy a layer's part at
every step.

On a CPU, blocks up to the last filled slot are read one after the other and merged (online softmax: Milakov &
Gimelshein 2018, arXiv:1805.02867). So the cost of a step depends on the tokens so far, not on the cache's capacity.
Once the cache is more than half full, all of it is read at once, which costs less than copying the blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tide_jax.model.ops import einsum

_MASKED = -1e30  # finite, so that a padding query that sees no key gives no NaN
BLOCK = 256
"""Slots that are read at once. Caches of at most this size are read whole."""
_FEW_QUERIES = 48  # per key head; on a CPU both orders cost the same at 72, and keys first costs a quarter more at 192


class KeyValue(NamedTuple):
    """Keys and values of one layer, heads before tokens: ``[B, KV, tokens, channels]`` each, keys already rotated."""

    keys: Float[Array, "B KV S hk"]
    values: Float[Array, "B KV S hv"]


class CachedRows(NamedTuple):
    """One layer's part of a cache.

    Attributes:
      keys, values: the layer's keys and values.
      filled: number of slots written so far, int32 scalar; later slots are never read.
    """

    keys: Float[Array, "B KV S hk"]
    values: Float[Array, "B KV S hv"]
    filled: Int[Array, ""]

    def slots(self, start: Int[Array, ""] | int, size: int) -> KeyValue:
        """Keys and values of `size` slots from `start` on."""

        def cut(a: Array) -> Array:
            return lax.dynamic_slice_in_dim(a, start, size, axis=2)

        return KeyValue(cut(self.keys), cut(self.values))


class Span(NamedTuple):
    """Which keys of a run the new tokens' queries see, and with what bias.

    Attributes:
      mask: [B, T, S], True where the query sees the key.
      bias: [B, H, T or 1, S], added to the scores, or None.
    """

    mask: Bool[Array, "B T S"]
    bias: Float[Array, "B H #T S"] | None

    def slots(self, start: Int[Array, ""] | int, size: int) -> Span:
        """Mask and bias of `size` keys from `start` on."""

        def cut(a: Array) -> Array:
            return lax.dynamic_slice_in_dim(a, start, size, axis=-1)

        return Span(cut(self.mask), None if self.bias is None else cut(self.bias))


Adapt = Callable[[KeyValue, Span], tuple[KeyValue, Span]]
"""Transforms stored keys and values, and their mask and bias, before attention reads them."""


class Part(NamedTuple):
    """Attention over some of the keys: largest score, sum of the weights relative to it, and weighted sum of values."""

    peak: Float[Array, "B KV G T"]
    total: Float[Array, "B KV G T"]
    mixed: Float[Array, "B KV G T hv"]


def attend(
    q: Float[Array, "B T KV G hk"],
    spans: list[tuple[KeyValue | CachedRows, Span]],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    adapt: Adapt = lambda rows, span: (rows, span),
) -> Float[Array, "B T KV G hv"]:
    """One softmax over several spans of keys, without concatenating them.

    Args:
      sinks: a score for each head that takes part in the softmax but has no value.
      adapt: applied to keys, values, masks and biases as they are read.
    """

    # Move tokens behind heads in the queries, which are small; otherwise the product would transpose the large
    # scores.
    by_head = jnp.transpose(q, (0, 2, 3, 1, 4))

    def part(rows: KeyValue, span: Span) -> Part:
        return _part(by_head, *adapt(rows, span), scale, softcap)

    parts = [part(rows, s) if isinstance(rows, KeyValue) else _attend_cached(part, rows, s) for rows, s in spans]
    if sinks is not None:
        # A sink is one more key: it adds weight to the softmax's denominator and nothing to the sum.
        peak = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, *q.shape[2:4], 1), parts[0].peak.shape)
        parts.append(Part(peak, jnp.ones_like(peak), jnp.zeros_like(parts[0].mixed)))
    # Merge the parts' softmaxes, then divide once.
    whole = parts[0]
    for other in parts[1:]:
        whole = _merge(whole, other)
    return jnp.transpose(whole.mixed / whole.total[..., None], (0, 3, 1, 2, 4)).astype(q.dtype)


def _part(q: Array, rows: KeyValue, span: Span, scale: float, softcap: float | None) -> Part:
    scores = _products(q, rows.keys).astype(jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if span.bias is not None:
        scores = scores + span.bias.reshape(scores.shape[0], *scores.shape[1:3], *span.bias.shape[2:])
    scores = jnp.where(span.mask[:, None, None, :, :], scores, _MASKED)
    peak = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - peak[..., None])
    mixed = einsum("bkgts,bksd->bkgtd", weights.astype(rows.values.dtype), rows.values)
    return Part(peak, jnp.sum(weights, axis=-1), mixed.astype(jnp.float32))


def _products(q: Float[Array, "B KV G T hk"], keys: Float[Array, "B KV S hk"]) -> Float[Array, "B KV G T S"]:
    """Queries times keys, in the order that is fastest on the platform.

    With few queries, a CPU computes keys times queries three times as fast as queries times keys. A GPU gets few
    queries with tokens before heads, as they came: in the other order, XLA transposes and copies all cached keys for a
    single token.
    """
    if q.shape[2] * q.shape[3] > _FEW_QUERIES:
        return einsum("bkgtd,bksd->bkgts", q, keys)
    return lax.platform_dependent(q, keys, cpu=_keys_first, default=_by_token)


def _keys_first(q: Float[Array, "B KV G T hk"], keys: Float[Array, "B KV S hk"]) -> Float[Array, "B KV G T S"]:
    return jnp.moveaxis(einsum("bksd,bkgtd->bksgt", keys, q), 2, -1)


def _by_token(q: Float[Array, "B KV G T hk"], keys: Float[Array, "B KV S hk"]) -> Float[Array, "B KV G T S"]:
    return einsum("btkgd,bksd->bkgts", jnp.transpose(q, (0, 3, 1, 2, 4)), keys)


def _merge(a: Part, b: Part) -> Part:
    peak = jnp.maximum(a.peak, b.peak)
    first, second = jnp.exp(a.peak - peak), jnp.exp(b.peak - peak)
    mixed = a.mixed * first[..., None] + b.mixed * second[..., None]
    return Part(peak, a.total * first + b.total * second, mixed)


def _attend_cached(part: Callable[[KeyValue, Span], Part], rows: CachedRows, span: Span) -> Part:
    size = rows.keys.shape[2]

    def at_once() -> Part:
        return part(KeyValue(rows.keys, rows.values), span)

    if size <= BLOCK:
        return at_once()

    def block(number: Int[Array, ""]) -> Part:
        start = number * BLOCK  # in the first half of the slots, so a whole block fits
        return part(rows.slots(start, BLOCK), span.slots(start, BLOCK))

    def blockwise() -> Part:
        shapes = jax.eval_shape(block, jnp.int32(0))
        # An empty part: merging with it changes nothing.
        nothing = Part(*(jnp.full(a.shape, fill, a.dtype) for a, fill in zip(shapes, (_MASKED, 0.0, 0.0), strict=True)))

        def more(carry: tuple[Int[Array, ""], Part]) -> tuple[Int[Array, ""], Part]:
            number, sofar = carry
            return number + 1, _merge(sofar, block(number))

        return lax.while_loop(lambda c: c[0] * BLOCK < rows.filled, more, (jnp.int32(0), nothing))[1]

    # An accelerator reads all slots in parallel, and a data-dependent loop would wait for the host.
    return lax.platform_dependent(cpu=lambda: lax.cond(rows.filled * 2 > size, at_once, blockwise), default=at_once)

"""One softmax over several runs of keys, the cache among them, which is read block by block where it stands.

Each layer has arrays of its own in the cache: out of one array for all layers, XLA would copy a layer's part, on a GPU,
at every step. On a CPU blocks up to the last filled slot are read one after the other and merged (online softmax:
Milakov & Gimelshein 2018, arXiv:1805.02867), so a step costs what the tokens so far cost, whatever the cache has room
for; once half of it is filled, it is read at once, which costs less than the blocks' copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tide_jax.model.ops import einsum

_MASKED = -1e30  # finite: a padding query that sees nothing stays free of NaN
BLOCK = 256
"""Slots read at once. Caches of no more are read whole."""
_FEW_QUERIES = 48  # of one key head; with 72 both orders cost a CPU the same, with 192 keys first costs a quarter more


class KeyValue(NamedTuple):
    """Keys and values of one layer, heads before tokens: ``[B, KV, tokens, channels]`` each, keys already rotated."""

    keys: Float[Array, "B KV S hk"]
    values: Float[Array, "B KV S hv"]


class CachedRows(NamedTuple):
    """One layer's part of a cache.

    Attributes:
      keys, values: the layer's.
      filled: slots written so far, int32 scalar; none after them is seen.
    """

    keys: Float[Array, "B KV S hk"]
    values: Float[Array, "B KV S hv"]
    filled: Int[Array, ""]

    def slots(self, start: Int[Array, ""] | int, size: int) -> KeyValue:
        """Some of the slots."""

        def cut(a: Array) -> Array:
            return lax.dynamic_slice_in_dim(a, start, size, axis=2)

        return KeyValue(cut(self.keys), cut(self.values))


class Span(NamedTuple):
    """A run of keys as the new tokens' queries see it.

    Attributes:
      mask: [B, T, S], which keys each query sees.
      bias: [B, H, T or 1, S] added to the scores, or None.
    """

    mask: Bool[Array, "B T S"]
    bias: Float[Array, "B H #T S"] | None

    def slots(self, start: Int[Array, ""] | int, size: int) -> Span:
        """The same for some of the keys."""

        def cut(a: Array) -> Array:
            return lax.dynamic_slice_in_dim(a, start, size, axis=-1)

        return Span(cut(self.mask), None if self.bias is None else cut(self.bias))


Adapt = Callable[[KeyValue, Span], tuple[KeyValue, Span]]
"""What a kind of attention makes of stored rows before it reads them."""


class Part(NamedTuple):
    """Attention over some of the keys: the largest score, the sum of weights relative to it, and what they mix."""

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
      sinks: a score for each head that takes weight and gives nothing.
      adapt: applied to rows, and to what is seen of them, as they are read.
    """

    # Tokens behind heads here, a small array, or the product would have the scores turned round, a large one.
    by_head = jnp.transpose(q, (0, 2, 3, 1, 4))

    def part(rows: KeyValue, span: Span) -> Part:
        return _part(by_head, *adapt(rows, span), scale, softcap)

    parts = [part(rows, s) if isinstance(rows, KeyValue) else _cached(part, rows, s) for rows, s in spans]
    if sinks is not None:
        peak = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, *q.shape[2:4], 1), parts[0].peak.shape)
        parts.append(Part(peak, jnp.ones_like(peak), jnp.zeros_like(parts[0].mixed)))
    whole = parts[0]
    for other in parts[1:]:
        whole = _merged(whole, other)
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
    """Queries times keys. A CPU multiplies keys by few queries three times as fast as few queries by keys.

    A GPU gets few queries with their tokens ahead of the heads, as they came: the other way XLA copies all cached keys,
    turned round, for a single token.
    """
    if q.shape[2] * q.shape[3] > _FEW_QUERIES:
        return einsum("bkgtd,bksd->bkgts", q, keys)
    return lax.platform_dependent(q, keys, cpu=_keys_first, default=_by_token)


def _keys_first(q: Float[Array, "B KV G T hk"], keys: Float[Array, "B KV S hk"]) -> Float[Array, "B KV G T S"]:
    return jnp.moveaxis(einsum("bksd,bkgtd->bksgt", keys, q), 2, -1)


def _by_token(q: Float[Array, "B KV G T hk"], keys: Float[Array, "B KV S hk"]) -> Float[Array, "B KV G T S"]:
    return einsum("btkgd,bksd->bkgts", jnp.transpose(q, (0, 3, 1, 2, 4)), keys)


def _merged(a: Part, b: Part) -> Part:
    peak = jnp.maximum(a.peak, b.peak)
    first, second = jnp.exp(a.peak - peak), jnp.exp(b.peak - peak)
    mixed = a.mixed * first[..., None] + b.mixed * second[..., None]
    return Part(peak, a.total * first + b.total * second, mixed)


def _cached(part: Callable[[KeyValue, Span], Part], rows: CachedRows, span: Span) -> Part:
    size = rows.keys.shape[2]

    def at_once() -> Part:
        return part(KeyValue(rows.keys, rows.values), span)

    if size <= BLOCK:
        return at_once()

    def block(number: Int[Array, ""]) -> Part:
        start = number * BLOCK  # in the first half of the slots, so that a whole block follows
        return part(rows.slots(start, BLOCK), span.slots(start, BLOCK))

    def blockwise() -> Part:
        shapes = jax.eval_shape(block, jnp.int32(0))
        nothing = Part(*(jnp.full(a.shape, fill, a.dtype) for a, fill in zip(shapes, (_MASKED, 0.0, 0.0), strict=True)))

        def more(carry: tuple[Int[Array, ""], Part]) -> tuple[Int[Array, ""], Part]:
            number, sofar = carry
            return number + 1, _merged(sofar, block(number))

        return lax.while_loop(lambda c: c[0] * BLOCK < rows.filled, more, (jnp.int32(0), nothing))[1]

    # An accelerator reads all slots in parallel, and a loop that ends by its data would wait for the host.
    return lax.platform_dependent(cpu=lambda: lax.cond(rows.filled * 2 > size, at_once, blockwise), default=at_once)

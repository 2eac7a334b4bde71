"""One softmax over several runs of keys: new tokens, and the cache, which is read in place.

The cache has separate arrays for each layer. With one array for all layers, XLA on a GPU would copy a layer's part at
every step.

How a run is read depends on the number of queries and on the platform:

* A few queries over a cache, on a CPU: blocks up to the last filled slot, one after the other. So the cost of a step
  depends on the tokens so far, not on the cache's capacity. Once the cache is more than half full, all of it is read at
  once, which costs less than copying the blocks.
* Many queries, on a CPU: in tiles of some queries and some keys (FlashAttention: Dao et al. 2022, arXiv:2205.14135,
  section 3.1). A tile's scores stay in the CPU's caches, and a tile that no query sees, such as later tokens or tokens
  before a window, costs nothing.
* Many tokens, on an accelerator: up to 1,024 keys at once, more in blocks of that size, up to the last filled slot.
* A few tokens over a large cache, on a TPU: a quarter, a half, or all of the slots. On a GPU always all of them: XLA
  would copy the slots of a part before it multiplies them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from tide_jax.model.attention.softmax import FEW_QUERIES, Attend, Part, attend_part, merge
from tide_jax.model.attention.span import BLOCK, EVEN_SLOTS, Adapt, CachedRows, KeyValue, Span
from tide_jax.model.attention.tiles import Tiles

_TILE_SCORES = 2**21  # 8 MiB of float32 scores
_TILE_QUERIES = (64, 512)
_FEW_TOKENS = 16  # a step or a pass over drafts; an accelerator reads their cache at once
_LONG_BLOCK = 1024  # keys, on accelerators
LARGE_CACHE = 2**24  # bytes of one layer's keys on a TPU, which take it 20 µs to read; a branch takes less


def attend(
    q: Float[Array, "B T KV G hk"],
    spans: Sequence[tuple[KeyValue | CachedRows, Span]],
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

    def part(q: Array, rows: KeyValue, span: Span) -> Part:
        return attend_part(q, *adapt(rows, span), scale, softcap)

    parts = [_read(part, by_head, rows, span) for rows, span in spans]
    if sinks is not None:
        # A sink is one more key: it adds weight to the softmax's denominator and nothing to the sum.
        peak = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, *q.shape[2:4], 1), parts[0].peak.shape)
        parts.append(Part(peak, jnp.ones_like(peak), jnp.zeros_like(parts[0].mixed)))
    # Merge the parts' softmaxes, then divide once.
    whole = parts[0]
    for other in parts[1:]:
        whole = merge(whole, other)
    return jnp.transpose(whole.output(), (0, 3, 1, 2, 4)).astype(q.dtype)


def _read(part: Attend, q: Float[Array, "B KV G T hk"], run: KeyValue | CachedRows, span: Span) -> Part:
    """Attention over one run of keys, read as the number of queries and the platform ask for."""
    rows, filled = KeyValue(run.keys, run.values), run.filled if isinstance(run, CachedRows) else None
    few = q.shape[3] <= _FEW_TOKENS and q.shape[2] * q.shape[3] <= FEW_QUERIES
    if few and (filled is None or rows.keys.shape[2] <= BLOCK):
        return part(q, rows, span)  # the same everywhere
    ways = {"cpu": _on_cpu, "tpu": _on_tpu, "default": _on_gpu}
    return lax.platform_dependent(
        **{name: functools.partial(way, part, q, rows, span, filled) for name, way in ways.items()}
    )


def _on_cpu(part: Attend, q: Array, rows: KeyValue, span: Span, filled: Int[Array, ""] | None) -> Part:
    if q.shape[2] * q.shape[3] > FEW_QUERIES:
        # Among new tokens, half of the keys are later than a query: lower tiles leave out more of them.
        tall = _tile_queries(q) // (2 if filled is None else 1)
        return Tiles(part, q, rows, span, filled, tall=tall, wide=BLOCK, skip=True).read()
    if filled is None or rows.keys.shape[2] <= BLOCK:
        return part(q, rows, span)
    blocks = Tiles(part, q, rows, span, filled, tall=q.shape[3], wide=BLOCK, skip=False)
    return lax.cond(filled * 2 > rows.keys.shape[2], lambda: part(q, rows, span), blocks.read)


def _on_gpu(part: Attend, q: Array, rows: KeyValue, span: Span, filled: Int[Array, ""] | None) -> Part:
    tokens = q.shape[3]
    if tokens <= _FEW_TOKENS:
        return part(q, rows, span)
    return Tiles(part, q, rows, span, filled, tall=tokens, wide=_LONG_BLOCK, skip=False).read()


def _on_tpu(part: Attend, q: Array, rows: KeyValue, span: Span, filled: Int[Array, ""] | None) -> Part:
    if q.shape[3] > _FEW_TOKENS or filled is None or rows.keys.nbytes < LARGE_CACHE:
        return _on_gpu(part, q, rows, span, filled)
    size = rows.keys.shape[2]
    shares = [min(size, share + -share % EVEN_SLOTS) for share in (size // 4, size // 2, size)]
    longer = sum((filled > share).astype(jnp.int32) for share in shares[:-1])
    return lax.switch(longer, [lambda n=n: part(q, rows.slots(0, n), span.slots(0, n)) for n in shares])


def _tile_queries(q: Float[Array, "B KV G T hk"]) -> int:
    """Queries of a tile on a CPU: a power of two, so that a tile has at most some number of scores."""
    batch, heads, group = q.shape[:3]
    most = max(1, _TILE_SCORES // (batch * heads * group * BLOCK))
    least, largest = _TILE_QUERIES
    return max(least, min(largest, 1 << (most.bit_length() - 1)))

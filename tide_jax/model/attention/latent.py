"""Multi-head latent attention (DeepSeek-V2, DeepSeek-AI 2024, arXiv:2405.04434, section 2.1).

Keys and values of all heads are linear functions of one latent vector per token, and the cache stores only that vector.
The linear maps are applied to queries and outputs instead (section 2.1.2: the projections "absorb" them). So attention
is multi-query attention over the latent vectors, and no cached token is expanded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tide_jax.model.architecture import AttentionType, DecoderConfig, LatentConfig
from tide_jax.model.attention.grouped import AttentionContext, spans_of
from tide_jax.model.attention.reading import attend
from tide_jax.model.attention.span import CachedRows, KeyValue, Span
from tide_jax.model.norms import Norm
from tide_jax.model.ops import Dense, einsum, integer_sums
from tide_jax.model.rotary import rotate
from tide_jax.model.rounding import apply_scale


class LatentAttention(nnx.Module):
    """Attention over latent vectors; the cache holds ``[latent, rotated key]`` as the keys of one head, no values."""

    def __init__(self, config: DecoderConfig, kind: AttentionType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        latent, d, h = kind.latent or config.latent, config.hidden_size, kind.num_heads or config.num_heads
        assert latent is not None
        self.latent = latent
        self.scale = kind.scale
        self.interleaved = kind.rope is not None and kind.rope.interleaved
        head_dim = latent.nope_dim + latent.rope_dim

        def dense(inputs: int, outputs: tuple[int, ...], bias: bool = False) -> Dense:
            return Dense((inputs,), outputs, bias=bias, dtype=dtype, rngs=rngs)

        low_rank = latent.q_rank is not None
        self.q_down = dense(d, (latent.q_rank or d,), config.qkv_bias) if low_rank else None
        self.q_norm = _bottleneck_norm(latent, latent.q_rank or d, dtype) if low_rank else None
        bottleneck = (latent.q_rank or d) * (2 if latent.raw_queries else 1)
        self.q = dense(bottleneck, (h, head_dim))
        gate = {"none": None, "head": (h, 1), "channel": (h, latent.value_dim)}[config.attention_gate]
        self.gate = None if gate is None else dense(bottleneck if latent.raw_queries else d, gate)
        self.kv_down = dense(d, (latent.kv_rank + latent.rope_dim,), config.qkv_bias)
        self.kv_norm = _bottleneck_norm(latent, latent.kv_rank, dtype)
        self.key_norm = _bottleneck_norm(latent, latent.rope_dim, dtype) if latent.key_norm else None
        self.k_up = dense(latent.kv_rank, (h, latent.nope_dim))
        self.v_up = dense(latent.kv_rank, (h, latent.value_dim))
        self.width = latent.kv_rank + latent.rope_dim
        self.padding = config.cache_shape[1] - self.width
        self.out = Dense((h, latent.value_dim), (d,), bias=config.attention_out_bias, dtype=dtype, rngs=rngs)

    def project_kv(self, x: Float[Array, "B T D"], context: AttentionContext) -> KeyValue:
        """Normed latent vectors and rotated shared keys of new tokens, as the keys of one head, padded to the cache."""
        down = self.kv_down(x)
        vector = self.kv_norm(down[..., : self.latent.kv_rank]) * self.latent.kv_scale
        shared = down[..., self.latent.kv_rank :]
        shared = shared if self.key_norm is None else self.key_norm(shared)
        shared = self._rotate(shared[:, :, None], context)[:, :, 0]
        empty = [jnp.zeros((*x.shape[:2], self.padding), x.dtype)] if self.padding else []
        keys = jnp.concatenate([vector, shared, *empty], axis=-1)[:, None]
        return KeyValue(keys, keys[..., :0])

    def __call__(
        self, x: Float[Array, "B T D"], context: AttentionContext, cached: CachedRows | None
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """Attends from new tokens to `cached` and to themselves; returns the output and the new cache entries."""
        new = self.project_kv(x, context)
        # Values are the leading channels of the keys. Mixing whole keys and slicing the result avoids copying the
        # cache.
        bottleneck = self._bottleneck(x)
        mixed = attend(
            self._queries(bottleneck, context)[:, :, None],
            spans_of(new, cached, context),
            scale=self.scale,
            adapt=self._read,
        )[:, :, 0]
        values = _values(mixed[..., : self.latent.kv_rank], self.v_up)
        if self.gate is not None:
            values = values * jax.nn.sigmoid(self.gate(bottleneck if self.latent.raw_queries else x))
        return self.out(values), new

    def _read(self, rows: KeyValue, span: Span) -> tuple[KeyValue, Span]:
        keys = rows.keys[..., : self.width] if self.padding else rows.keys
        return KeyValue(keys, keys), span

    def _bottleneck(self, x: Float[Array, "B T D"]) -> Float[Array, "B T R"]:
        """What queries are made of; the input itself without a bottleneck."""
        if self.q_down is None or self.q_norm is None:
            return x
        raw = self.q_down(x)
        normed = self.q_norm(raw) * self.latent.q_scale
        return jnp.concatenate([normed, raw], axis=-1) if self.latent.raw_queries else normed

    def _queries(self, bottleneck: Array, context: AttentionContext) -> Float[Array, "B T H hk"]:
        """Queries in the space of latent vectors: ``W_k^T q``, concatenated with the rotated part."""
        q = self.q(bottleneck)
        nope = _absorb(q[..., : self.latent.nope_dim], self.k_up)
        return jnp.concatenate([nope, self._rotate(q[..., self.latent.nope_dim :], context)], axis=-1)

    def _rotate(self, x: Array, context: AttentionContext) -> Array:
        if context.cos is None or context.sin is None:
            return x
        return rotate(x, context.cos, context.sin, interleaved=self.interleaved)


def _values(mixed: Float[Array, "B T H R"], up: Dense) -> Float[Array, "B T H V"]:
    """Each head's value projection, applied to its weighted sum of latent vectors."""
    spec = "bthr,hvr->bthv"
    if up.scale is None:
        return einsum(spec, mixed, up.weights(mixed.dtype))
    return apply_scale(integer_sums(spec, mixed, up.kernel[...]), up.scale[...][None, None], mixed.dtype)


def _absorb(q: Float[Array, "B T H N"], up: Dense) -> Float[Array, "B T H R"]:
    """``W^T q`` of each head. It sums over the outputs of the map, so the outputs' scales multiply the query."""
    spec = "bthn,hnr->bthr"
    if up.scale is None:
        return einsum(spec, q, up.weights(q.dtype))
    scale = up.scale[...][None, None]
    largest = jnp.max(scale, axis=-1, keepdims=True)  # factored out to keep the queries within float16's range
    q = apply_scale(q.astype(jnp.float32), scale / largest, q.dtype)
    return apply_scale(integer_sums(spec, q, up.kernel[...]), largest, q.dtype)


def _bottleneck_norm(latent: LatentConfig, size: int, dtype: jnp.dtype) -> Norm:
    return Norm((size,), kind="rms", eps=latent.norm_eps, dtype=dtype)

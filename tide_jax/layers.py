"""The parts of a decoder layer: norm, attention, MLP. They branch on configuration flags, never on a family.

Kernels keep their natural axes (heads, head channels, experts) so that a converter can name the slice a source
tensor fills and a sharding rule can name the axis it splits. Layers read the cache and return the new key and
value rows; whoever runs the layers writes the cache once (see `tide_jax.early_exit`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from tide_jax.activations import ACTIVATIONS
from tide_jax.config import AttentionType, DecoderConfig
from tide_jax.moe import MoE
from tide_jax.ops import Dense, einsum
from tide_jax.rotary import rotate


class AttentionContext(NamedTuple):
    """What every layer of one attention type shares within a forward pass.

    Attributes:
      cos, sin: rotary tables [B, T, R], or None without rotary embedding.
      new_mask: [B, T, T], which of the new tokens each new token sees.
      cache_mask: [B, T, S], which cache slots each new token sees; None when there is no cache to read.
    """

    cos: Float[Array, "B T R"] | None
    sin: Float[Array, "B T R"] | None
    new_mask: Bool[Array, "B T T"]
    cache_mask: Bool[Array, "B T S"] | None


class KeyValue(NamedTuple):
    """Keys and values of one layer, heads before tokens: ``[B, KV, tokens, hd]`` each, keys already rotated."""

    keys: Float[Array, "B KV S hd"]
    values: Float[Array, "B KV S hd"]


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019) or LayerNorm over the last axis, computed in float32."""

    def __init__(self, config: DecoderConfig, size: int, *, kind: str | None = None, dtype: jnp.dtype) -> None:
        self.kind = kind or config.norm
        self.eps = config.norm_eps
        self.unit_offset = config.norm_unit_offset
        self.scale = nnx.Param(jnp.full((size,), 0.0 if self.unit_offset else 1.0, dtype))
        self.bias = nnx.Param(jnp.zeros((size,), dtype)) if config.norm_bias and self.kind == "layer" else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        shape = (1,) * (x.ndim - 1) + (-1,)
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32).reshape(shape)
        y = y * (1.0 + scale if self.unit_offset else scale)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32).reshape(shape)
        return y.astype(x.dtype)


class MLP(nnx.Module):
    """Feed-forward block, gated (Shazeer 2020, arXiv:2002.05202) or plain."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.activation
        self.gated = config.mlp_gated
        if self.gated:
            self.gate_up = Dense((d,), (2, f), bias=bias, dtype=dtype, rngs=rngs)
        else:
            self.up = Dense((d,), (f,), bias=bias, dtype=dtype, rngs=rngs)
        self.down = Dense((f,), (d,), bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        act = ACTIVATIONS[self.activation]
        if self.gated:
            gate_up = self.gate_up(x)
            return self.down(act(gate_up[..., 0, :]) * gate_up[..., 1, :])
        return self.down(act(self.up(x)))


class Attention(nnx.Module):
    """Grouped-query attention over cached and new tokens (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: DecoderConfig, kind: AttentionType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        d, h, kv, hd = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = kind.scale
        self.softcap = config.attention_softcap
        self.q = Dense((d,), (h, hd), bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.kv = Dense((d,), (kv, 2, hd), bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.out = Dense((h, hd), (d,), bias=config.attention_out_bias, dtype=dtype, rngs=rngs)
        self.q_norm = Norm(config, hd, kind="rms", dtype=dtype) if config.qk_norm else None
        self.k_norm = Norm(config, hd, kind="rms", dtype=dtype) if config.qk_norm else None

    def project_kv(self, x: Float[Array, "B T D"], context: AttentionContext) -> KeyValue:
        """Keys (normed and rotated) and values of new tokens."""
        kv = self.kv(x)
        keys, values = kv[..., 0, :], kv[..., 1, :]
        keys = self.k_norm(keys) if self.k_norm is not None else keys
        if context.cos is not None and context.sin is not None:
            keys = rotate(keys, context.cos, context.sin)
        return KeyValue(keys.swapaxes(1, 2), values.swapaxes(1, 2))

    def __call__(
        self, x: Float[Array, "B T D"], context: AttentionContext, cached: KeyValue | None
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """Attends from new tokens to `cached` and to themselves; returns the output and the new rows."""
        new = self.project_kv(x, context)
        q = self.q(x)
        q = self.q_norm(q) if self.q_norm is not None else q
        if context.cos is not None and context.sin is not None:
            q = rotate(q, context.cos, context.sin)
        b, t, h, hd = q.shape
        q = q.reshape(b, t, new.keys.shape[1], h // new.keys.shape[1], hd)
        mixed = self._attend(q, new, context, cached)
        return self.out(mixed.reshape(b, t, h, hd)), new

    def _attend(self, q: Array, new: KeyValue, context: AttentionContext, cached: KeyValue | None) -> Array:
        """One softmax over cached and new tokens, without concatenating them (the cache stays where it is)."""
        scores = [self._scores(q, new.keys, context.new_mask)]
        values = [new.values]
        if cached is not None and context.cache_mask is not None:
            scores.append(self._scores(q, cached.keys, context.cache_mask))
            values.append(cached.values)
        peak = jnp.max(scores[0], axis=-1)
        for s in scores[1:]:
            peak = jnp.maximum(peak, jnp.max(s, axis=-1))
        weights = [jnp.exp(s - peak[..., None]) for s in scores]
        total = sum((jnp.sum(w, axis=-1) for w in weights), start=jnp.zeros_like(peak))
        mixed = jnp.zeros(q.shape, jnp.float32)
        for w, v in zip(weights, values, strict=True):
            share = (w / total[..., None]).astype(v.dtype)
            mixed += einsum("bkgts,bksd->btkgd", share, v).astype(jnp.float32)
        return mixed.astype(q.dtype)

    def _scores(self, q: Array, keys: Array, mask: Array) -> Array:
        scores = einsum("btkgd,bksd->bkgts", q, keys).astype(jnp.float32) * self.scale
        if self.softcap is not None:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        return jnp.where(mask[:, None, None, :, :], scores, _MASKED)


_MASKED = -1e30  # finite: a padding query that sees nothing stays free of NaN


class DecoderLayer(nnx.Module):
    """One decoder layer: attention and feed-forward around a residual stream."""

    def __init__(self, config: DecoderConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.attention_type = config.attention_pattern[index]
        self.parallel_residual = config.parallel_residual
        pre, post = config.norm_placement != "post", config.norm_placement != "pre"

        def norm(wanted: bool) -> Norm | None:
            return Norm(config, config.hidden_size, dtype=dtype) if wanted else None

        self.pre_attention_norm, self.post_attention_norm = norm(pre), norm(post)
        self.pre_mlp_norm, self.post_mlp_norm = norm(pre), norm(post)
        self.attention = Attention(config, config.attention(index), dtype=dtype, rngs=rngs)
        feed_forward = MoE if config.moe else MLP
        self.mlp = feed_forward(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], contexts: tuple[AttentionContext, ...], cached: KeyValue | None
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """Runs the layer on new tokens; returns the new residual stream and the new key and value rows."""
        context = contexts[self.attention_type]
        attended, new = self.attention(_apply(self.pre_attention_norm, x), context, cached)
        attended = _apply(self.post_attention_norm, attended)
        if self.parallel_residual:
            return x + attended + self._feed_forward(x), new
        x = x + attended
        return x + self._feed_forward(x), new

    def project_kv(self, x: Float[Array, "B T D"], contexts: tuple[AttentionContext, ...]) -> KeyValue:
        """The key and value rows this layer would store for `x`, without running it."""
        return self.attention.project_kv(_apply(self.pre_attention_norm, x), contexts[self.attention_type])

    def _feed_forward(self, x: Array) -> Array:
        return _apply(self.post_mlp_norm, self.mlp(_apply(self.pre_mlp_norm, x)))


def _apply(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)

"""Mixture of attention heads (Zhang et al. 2022, arXiv:2210.05144): queries and output projections are experts."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tide_jax.model.architecture import AttentionType, DecoderConfig
from tide_jax.model.attention.grouped import AttentionContext, spans_of
from tide_jax.model.attention.reading import attend
from tide_jax.model.attention.span import CachedRows, KeyValue
from tide_jax.model.moe import by_expert, choose_experts, expert_matmul, router_logits
from tide_jax.model.ops import Dense, normal
from tide_jax.model.rotary import rotate


class ExpertAttention(nnx.Module):
    """Attention in which each token queries with its best experts; an expert has one query per key-value head.

    Parameters: ``q [E, D, KV, hd]``, ``out [E, KV, hd, D]``, and ``out_bias [D]``, added to the experts' sum. With
    8-bit weights also ``q_scale [E, KV, hd]`` and ``out_scale [E, D]``.
    """

    def __init__(self, config: DecoderConfig, kind: AttentionType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        assert config.attention_experts is not None
        moe, d, kv, hd = config.attention_experts, config.hidden_size, config.num_kv_heads, config.head_dim
        self.moe, self.scale = moe, kind.scale
        self.router = Dense((d,), (moe.num_experts,), bias=False, exact=True, dtype=dtype, rngs=rngs)
        self.q = nnx.Param(normal(rngs, (moe.num_experts, d, kv, hd), d, dtype), summed=(1,))
        self.kv = Dense((d,), (kv, 2, hd), bias=False, dtype=dtype, rngs=rngs)
        self.out = nnx.Param(normal(rngs, (moe.num_experts, kv, hd, d), kv * hd, dtype), summed=(1, 2))
        self.q_scale: nnx.Param | None = None
        self.out_scale: nnx.Param | None = None
        self.out_bias = nnx.Param(jnp.zeros((d,), dtype))

    def project_kv(self, x: Float[Array, "B T D"], context: AttentionContext) -> KeyValue:
        """Keys (rotated) and values of new tokens."""
        kv = self.kv(x)
        return KeyValue(_rotate(kv[..., 0, :], context).swapaxes(1, 2), kv[..., 1, :].swapaxes(1, 2))

    def __call__(
        self, x: Float[Array, "B T D"], context: AttentionContext, cached: CachedRows | None
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """Attends from new tokens to `cached` and to themselves; returns the output and the new cache entries."""
        new = self.project_kv(x, context)
        (b, t, d), (experts, _, kv, hd), k = x.shape, self.q.shape, self.moe.experts_per_token
        tokens = x.reshape(-1, d)
        weights, chosen = choose_experts(self.moe, router_logits(self.router, tokens))

        def project_queries(rows: Array, expert: Array) -> Array:
            scale = None if self.q_scale is None else self.q_scale[...].reshape(experts, kv * hd)
            return expert_matmul(rows, self.q[...].reshape(experts, d, kv * hd), expert, scale)

        def project_outputs(rows: Array, expert: Array) -> Array:
            scale = None if self.out_scale is None else self.out_scale[...]
            return expert_matmul(rows, self.out[...].reshape(experts, kv * hd, d), expert, scale)

        # Each token's K experts give K queries per key-value head; they form the query groups of that head.
        q = by_expert(jnp.broadcast_to(tokens[:, None], (b * t, k, d)), chosen, project_queries)
        q = _rotate(q.reshape(b, t, k * kv, hd), context).reshape(b, t, k, kv, hd).swapaxes(2, 3)
        mixed = attend(q, spans_of(new, cached, context), scale=self.scale).swapaxes(2, 3)
        # Each expert projects its own heads; the router's weights sum the experts.
        parts = by_expert(mixed.reshape(b * t, k, kv * hd), chosen, project_outputs).astype(jnp.float32)
        out = jnp.sum(parts * weights[:, :, None], axis=1).astype(x.dtype) + self.out_bias[...][None, :]
        return out.reshape(b, t, d), new


def _rotate(x: Float[Array, "B T N hd"], context: AttentionContext) -> Float[Array, "B T N hd"]:
    return x if context.cos is None or context.sin is None else rotate(x, context.cos, context.sin)

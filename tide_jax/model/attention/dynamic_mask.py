"""Attention that adds to each key's score a bias computed from its values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tide_jax.model.architecture import AttentionType, DecoderConfig
from tide_jax.model.attention.grouped import Attention
from tide_jax.model.attention.span import KeyValue, Span
from tide_jax.model.ops import Dense


class DynamicMaskAttention(Attention):
    """Attention in which each key has its own score, learned from its values, which is added to every query's score.

    Dynamic mask attention (Shi et al. 2025, arXiv:2508.02124, section 3.2). As long as the keys fit its window of kept
    keys, it masks none; only this case is implemented.
    """

    def __init__(self, config: DecoderConfig, kind: AttentionType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        super().__init__(config, kind, dtype=dtype, rngs=rngs)
        kv, hd = config.num_kv_heads, config.head_dim
        self.score = Dense((kv * hd,), (kv,), bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.strength = nnx.Param(jnp.zeros((kv,), dtype))

    def _read(self, rows: KeyValue, span: Span) -> tuple[KeyValue, Span]:
        return rows, span._replace(bias=self._bias(rows, self.q.outputs[0]))

    def _bias(self, rows: KeyValue, heads: int) -> Float[Array, "B H 1 S"]:
        values = rows.values.swapaxes(1, 2)
        scores = jax.nn.softplus(self.score(values.reshape(*values.shape[:2], -1)).astype(jnp.float32))
        bias = jnp.exp(self.strength[...].astype(jnp.float32)[None, None, :] * scores).swapaxes(1, 2)
        return jnp.repeat(bias, heads // bias.shape[1], axis=1)[:, :, None, :]

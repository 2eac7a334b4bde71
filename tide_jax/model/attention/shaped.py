"""Attention for models whose layers differ in the number or width of their heads."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tide_jax.model.architecture import AttentionType, DecoderConfig
from tide_jax.model.attention.grouped import Attention, AttentionContext
from tide_jax.model.attention.span import KeyValue, Span


class ShapedAttention(Attention):
    """Pads keys and values to the cache's shape when it stores them, and slices them when it reads them.

    The cache arrays of all layers have one shape, which fits the largest number and the largest width of heads.
    """

    def __init__(self, config: DecoderConfig, kind: AttentionType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        kv, hd = kind.num_kv_heads or config.num_kv_heads, kind.head_dim or config.head_dim
        super().__init__(dataclasses.replace(config, num_kv_heads=kv, head_dim=hd), kind, dtype=dtype, rngs=rngs)
        heads, channels, _ = config.cache_shape
        self.shape = (kv, hd)
        self.padding = ((0, 0), (0, heads - kv), (0, 0), (0, channels - hd))

    def place_kv(
        self, x: Float[Array, "B T D"], kv: Float[Array, "B T KV P hd"], context: AttentionContext
    ) -> KeyValue:
        """Same as `Attention.place_kv`, padded with zeros."""
        return KeyValue(*(jnp.pad(rows, self.padding) for rows in super().place_kv(x, kv, context)))

    def _read(self, rows: KeyValue, span: Span) -> tuple[KeyValue, Span]:
        kv, hd = self.shape
        return KeyValue(*(a[:, :kv, :, :hd] for a in rows)), span

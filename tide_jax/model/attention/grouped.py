"""Attention over cached and new tokens, and the tables that layers share within a forward pass.

Layers read the cache and return the new keys and values. The caller that runs the layers writes the cache once (see
`tide_jax.exits.depth`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tide_jax.model.architecture import AttentionType, DecoderConfig, QKNorm, QueryScaling
from tide_jax.model.attention.reading import attend
from tide_jax.model.attention.span import CachedRows, KeyValue, Span
from tide_jax.model.norms import Norm, block_norm, head_norm
from tide_jax.model.ops import Dense, together
from tide_jax.model.rotary import rope_tables, rotate


class AttentionContext(NamedTuple):
    """Tables that all layers of one attention type share within a forward pass.

    Attributes:
      cos, sin: rotary tables [B, T, R], or None without rotary embedding.
      query_scale: [B, T], multiplies queries, or None.
      new: mask and bias for the new tokens' keys.
      cached: mask and bias for the cache's slots; None without a cache.
    """

    cos: Float[Array, "B T R"] | None
    sin: Float[Array, "B T R"] | None
    query_scale: Float[Array, "B T"] | None
    new: Span
    cached: Span | None


Spans = list[tuple[KeyValue | CachedRows, Span]]


def attention_context(
    kind: AttentionType,
    positions: Int[Array, "B T"],
    seq_len: Int[Array, ""],
    slots: Int[Array, "B S"] | None,
) -> AttentionContext:
    """Masks, biases and rotary tables of one attention type.

    Args:
      positions: position in its row of each new token, -1 for padding.
      seq_len: tokens seen so far in the longest row.
      slots: position of the token in each cache slot, -1 for an empty slot; None without a cache.
    """
    cos, sin = rope_tables(kind.rope, positions, seq_len) if kind.rope is not None else (None, None)
    scale = None if kind.query_scaling is None else _query_scale(kind.query_scaling, positions)
    cached = None if slots is None else _span(kind, positions, slots)
    return AttentionContext(cos, sin, scale, _span(kind, positions, positions), cached)


def _query_scale(scaling: QueryScaling, positions: Int[Array, "B T"]) -> Float[Array, "B T"]:
    periods = (jnp.maximum(positions, 0) + jnp.int32(scaling.offset)).astype(jnp.float32) / scaling.period
    return (1.0 + periods) ** scaling.beta if scaling.power else 1.0 + scaling.beta * jnp.log1p(jnp.floor(periods))


def _span(kind: AttentionType, query: Int[Array, "B T"], key: Int[Array, "B S"]) -> Span:
    """Mask and bias of keys: a query sees real keys up to its own position, inside its sliding window or chunk."""
    distance = query[:, :, None] - key[:, None, :]
    mask = (key[:, None, :] >= 0) & (distance >= 0)
    if kind.window is not None:
        mask &= distance < kind.window
    if kind.chunk is not None:
        mask &= query[:, :, None] // kind.chunk == key[:, None, :] // kind.chunk
    if not kind.alibi:
        return Span(mask, None)
    slopes = jnp.asarray(np.asarray(kind.alibi, np.float32))[None, :, None, None]
    if not kind.alibi_bfloat16:
        return Span(mask, -slopes * distance.astype(jnp.float32)[:, None])
    bias = slopes.astype(jnp.bfloat16) * key.astype(jnp.bfloat16)[:, None, None, :]
    return Span(mask, bias.astype(jnp.float32) * kind.scale)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245); multi-head and multi-query are special cases."""

    def __init__(self, config: DecoderConfig, kind: AttentionType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        d, h, kv, hd = config.attention_inputs, kind.num_heads or config.num_heads, config.num_kv_heads, config.head_dim
        self.scale, self.softcap, self.clip = kind.scale, config.attention_softcap, config.clip_qkv
        self.interleaved = kind.rope is not None and kind.rope.interleaved
        self.rotates_values = kind.rope is not None and kind.rope.values
        self.norm_after_rope = kind.qk_norm is not None and kind.qk_norm.after_rope
        self.q = Dense((d,), (h, hd), bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        value_bias = config.qkv_bias and not config.key_bias
        vd = config.value_dim or hd
        parts = 1 if kind.keys_as_values or config.value_dim else 2
        self.kv = Dense((d,), (kv, parts, hd), bias=config.qkv_bias and config.key_bias, dtype=dtype, rngs=rngs)
        self.value_bias = nnx.Param(jnp.zeros((kv, hd), dtype)) if value_bias else None
        self.value = Dense((d,), (kv, vd), bias=config.qkv_bias, dtype=dtype, rngs=rngs) if config.value_dim else None
        self.value_scale = config.value_scale
        self.out = Dense(
            (h, vd), (config.hidden_size,), bias=config.attention_out_bias or kind.out_bias, dtype=dtype, rngs=rngs
        )
        self.q_norm = head_norm(kind.qk_norm, h, hd, dtype=dtype)
        self.k_norm = head_norm(kind.qk_norm, kv, hd, dtype=dtype)
        value_norm = QKNorm(eps=config.norm_eps, scale=False) if kind.value_norm else None
        self.value_norm = head_norm(value_norm, kv, hd, dtype=dtype)
        self.sinks = nnx.Param(jnp.zeros((h,), dtype)) if kind.sinks else None
        gate = {"none": None, "head": (h, 1), "channel": (h, vd)}[config.attention_gate]
        self.gate = None if gate is None else Dense((d,), gate, bias=False, dtype=dtype, rngs=rngs)
        self.gate_bias = None if gate is None or not config.gate_bias else nnx.Param(jnp.zeros(gate, dtype))
        self.gate_activation = config.gate_activation
        self.sub_norm = block_norm(config, (h, vd), dtype=dtype) if config.sub_norm else None

    def project_kv(self, x: Float[Array, "B T D"], context: AttentionContext) -> KeyValue:
        """Keys (normed and rotated) and values of new tokens."""
        return self.place_kv(x, self.kv(x), context)

    def place_kv(
        self, x: Float[Array, "B T D"], kv: Float[Array, "B T KV P hd"], context: AttentionContext
    ) -> KeyValue:
        """Keys (normed and rotated) and values from the raw output `kv` of their projection."""
        keys, values = kv[..., 0, :], kv[..., -1, :] if self.value is None else self.value(x)
        if self.value_bias is not None:
            values = values + self.value_bias[...][None, None]
        if self.value_norm is not None:
            values = self.value_norm(values)
        values = self._clip(values)
        values = values if self.value_scale == 1.0 else values * jnp.asarray(self.value_scale, values.dtype)
        if self.rotates_values:
            values = self._rotate(values, context)
        return KeyValue(self._place(keys, self.k_norm, context).swapaxes(1, 2), values.swapaxes(1, 2))

    def __call__(
        self, x: Float[Array, "B T D"], context: AttentionContext, cached: CachedRows | None
    ) -> tuple[Float[Array, "B T D"], KeyValue]:
        """Attends from new tokens to `cached` and to themselves; returns the output and the new keys and values."""
        q, kv = together(x, [self.q, self.kv])
        new = self.place_kv(x, kv, context)
        q = self._place(q, self.q_norm, context)
        if context.query_scale is not None:
            q = (q.astype(jnp.float32) * context.query_scale[:, :, None, None]).astype(q.dtype)
        mixed = self._mix(q, spans_of(new, cached, context))
        if self.gate is not None:
            mixed = mixed * self._gate_factor(self.gate(x))
        return self.out(mixed if self.sub_norm is None else self.sub_norm(mixed)), new

    def _gate_factor(self, gate: Float[Array, "B T H hg"]) -> Float[Array, "B T H hg"]:
        """The gate's factor for each head or channel."""
        gate = gate if self.gate_bias is None else gate + self.gate_bias[...][None, None]
        return jax.nn.sigmoid(gate) if self.gate_activation == "sigmoid" else jax.nn.softplus(gate)

    def _mix(self, q: Float[Array, "B T H hd"], spans: Spans) -> Float[Array, "B T H hd"]:
        """Weighted sum of the values, for each head."""
        kv = self.kv.outputs[0]
        grouped = q.reshape(*q.shape[:2], kv, q.shape[2] // kv, q.shape[3])
        sinks = None if self.sinks is None else self.sinks[...]
        mixed = attend(grouped, spans, scale=self.scale, softcap=self.softcap, sinks=sinks, adapt=self._read)
        return mixed.reshape(*q.shape[:3], -1)

    def _read(self, rows: KeyValue, span: Span) -> tuple[KeyValue, Span]:
        """Hook for subclasses: transforms stored keys, values and masks before attention reads them."""
        return rows, span

    def _place(self, x: Array, norm: Norm | None, context: AttentionContext) -> Array:
        """Queries or keys [B, T, N, hd], normed and rotated in the architecture's order."""
        if norm is not None and not self.norm_after_rope:
            x = norm(x)
        x = self._rotate(self._clip(x), context)
        return norm(x) if norm is not None and self.norm_after_rope else x

    def _rotate(self, x: Array, context: AttentionContext) -> Array:
        if context.cos is None or context.sin is None:
            return x
        return rotate(x, context.cos, context.sin, interleaved=self.interleaved)

    def _clip(self, x: Array) -> Array:
        return x if self.clip is None else jnp.clip(x, -self.clip, self.clip)


def spans_of(new: KeyValue, cached: CachedRows | None, context: AttentionContext) -> Spans:
    """The runs of keys that a layer attends to: the new ones, then the cached ones."""
    spans: Spans = [(new, context.new)]
    return spans if cached is None or context.cached is None else [*spans, (cached, context.cached)]

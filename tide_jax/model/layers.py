"""A decoder layer: attention or a recurrent layer, and a feed-forward block, around a residual stream.

The parts branch on configuration flags, never on a family. Kernels keep their natural axes (heads, head channels,
experts). So a converter can name the slice that a source tensor fills, and a sharding rule can name the axis that it
splits.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from tide_jax.model.architecture import AttentionType, DecoderConfig
from tide_jax.model.architecture_parts import AddScales
from tide_jax.model.attention.differential import DifferentialAttention
from tide_jax.model.attention.dynamic_mask import DynamicMaskAttention
from tide_jax.model.attention.experts import ExpertAttention
from tide_jax.model.attention.grouped import Attention, AttentionContext
from tide_jax.model.attention.latent import LatentAttention
from tide_jax.model.attention.shaped import ShapedAttention
from tide_jax.model.feed_forward import MLP
from tide_jax.model.guide import Guide
from tide_jax.model.memory import Cached, New, Rows, SideBySide
from tide_jax.model.moe import MoE
from tide_jax.model.norms import GatedNorm, Norm, block_norm
from tide_jax.model.ops import scaled
from tide_jax.model.recurrent.gated_delta import GatedDelta
from tide_jax.model.recurrent.kimi_delta import KimiDelta
from tide_jax.model.recurrent.lightning import Lightning
from tide_jax.model.recurrent.matrix_lstm import MatrixLSTM
from tide_jax.model.recurrent.mixer import Mixer
from tide_jax.model.recurrent.order import TokenOrder
from tide_jax.model.recurrent.rg_lru import RgLru
from tide_jax.model.recurrent.selective import Selective
from tide_jax.model.recurrent.short_conv import ShortConv
from tide_jax.model.recurrent.state_space import StateSpace
from tide_jax.model.recurrent.time_mix import ChannelMix, TimeMix
from tide_jax.model.recurrent.types import NothingType, RecurrentType, TimeMixType
from tide_jax.model.sharding import whole_channels

Context = AttentionContext | TokenOrder
"""What all layers of one type share in a pass: masks and rotary tables, or the order of tokens."""

Contexts = tuple[Any, ...]
"""Contexts inside a layer, which takes the one that its type reads."""

_MIXERS: dict[str, type] = {
    "short_conv": ShortConv,
    "gated_delta": GatedDelta,
    "kimi_delta": KimiDelta,
    "state_space": StateSpace,
    "selective": Selective,
    "lightning": Lightning,
    "rg_lru": RgLru,
    "matrix_lstm": MatrixLSTM,
    "time_mix": TimeMix,
}


class DecoderLayer(nnx.Module):
    """One decoder layer; returns the new residual stream and what the layer keeps of the new tokens."""

    def __init__(self, config: DecoderConfig, index: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        if config.layer_norm_eps is not None:
            config = dataclasses.replace(config, norm_eps=config.layer_norm_eps)
        self.layer_type = config.layer_pattern[index]
        self.parallel_residual, self.shared_norm = config.parallel_residual, config.shared_norm
        placement = config.norms_of(index)
        self.norm_after_add = placement == "residual"
        self.scales, self.mlp_scales = config.add_scales(index), config.mlp_add_scales
        self.normed_residual = config.normed_residual
        pre, post = placement in ("pre", "sandwich"), placement != "pre"

        def norm(wanted: bool, *, gated: bool = False) -> Norm | GatedNorm | None:
            plain, rank = block_norm(config, config.hidden_size, dtype=dtype) if wanted else None, config.norm_gate_rank
            if plain is None or rank is None or not gated:
                return plain
            return GatedNorm(plain, config.hidden_size, rank, dtype=dtype, rngs=rngs)

        def weights(wanted: bool, size: int) -> nnx.Param | None:
            return nnx.Param(jnp.ones((size,), dtype)) if wanted else None

        has_mlp = config.has_mlp(index)
        kind: Any = config.layer_type(index)
        mixes = not isinstance(kind, NothingType)
        self.pre_attention_norm = norm(pre and mixes and (config.first_norm or index > 0), gated=True)
        self.post_attention_norm = norm(post and mixes)
        attends, self.carried = isinstance(kind, AttentionType), config.carried
        guides = attends and self.carried == "embedding"
        self.guide = Guide(config, kind, dtype=dtype, rngs=rngs) if guides else None
        self.attention = _attention(config, kind, dtype=dtype, rngs=rngs) if attends and not guides else None
        beside = config.recurrent_beside(index)
        self.beside = None if beside is None else config.layer_types.index(beside)
        own = beside if attends or not mixes else kind
        self.recurrent: Mixer | None = None if own is None else _recurrent(config, own, dtype=dtype, rngs=rngs)
        self.pre_mlp_norm = norm(pre and has_mlp and not config.shared_norm, gated=config.has_experts(index))
        self.post_mlp_norm = norm(post and has_mlp)
        self.attention_residual = weights(config.residual_weights and mixes, config.hidden_size)
        self.mlp_residual = weights(config.residual_weights and has_mlp, config.hidden_size)
        self.output_scale = weights(config.layer_scale, 1)
        shortcut = config.has_shortcut(index)
        self.shortcut = MoE(config, dtype=dtype, rngs=rngs) if shortcut else None
        mlp = MoE if config.has_experts(index) and not shortcut else MLP
        mlp = ChannelMix if isinstance(kind, TimeMixType) and kind.mixes_mlp else mlp
        self.mlp = mlp(config, dtype=dtype, rngs=rngs) if has_mlp else None

    def __call__(
        self,
        x: Float[Array, "B T S"],
        contexts: tuple[Context, ...],
        cached: Cached | None,
        left: Bool[Array, "B T"] | None = None,
        *,
        advances: bool = False,
    ) -> tuple[Float[Array, "B T S"], New]:
        """Runs the layer on new tokens; returns the new residual stream and what the layer keeps of the tokens.

        Args:
          x: the residual stream, with what it carries (`DecoderConfig.carried`).
          left: tokens that only leave behind what `project_rows` gives; their output is meaningless.
          advances: return the state after the tokens instead of their inputs to it (`Mixer.__call__`).
        """
        return _trace_once(self, x, contexts, cached, left, advances=advances)

    def _run(
        self,
        stream: Float[Array, "B T S"],
        contexts: Contexts,
        cached: Cached | None,
        left: Bool[Array, "B T"] | None,
        advances: bool,
    ) -> tuple[Float[Array, "B T S"], New]:
        if self.guide is not None:
            return self._run_guided(self.guide, stream, contexts, cached, left, advances)
        x, carried = self._apart(stream)
        normed, middle, new = _apply(self.pre_attention_norm, x), x, x[..., :0]
        if self.attention is not None or self.recurrent is not None:
            mixed, new = self._mix(normed, contexts, cached, advances and not isinstance(self.mlp, ChannelMix))
            kept = normed if self.normed_residual else x
            middle = self._add(_multiply(kept, self.attention_residual), mixed, self.post_attention_norm, self.scales)
        if self.mlp is None:
            return self._together(_multiply(middle, self.output_scale), carried), new
        # A parallel MLP reads the layer's input, otherwise the stream after attention.
        mlp_input = normed if self.shared_norm else _apply(self.pre_mlp_norm, x if self.parallel_residual else middle)
        if isinstance(self.mlp, ChannelMix):
            if left is not None:  # later tokens read this token's input, so it has to be the projected one
                mlp_input = jnp.where(left[:, :, None], _apply(self.pre_mlp_norm, x), mlp_input)
            update, new = _mix_channels(self.mlp, mlp_input, new, contexts[self.layer_type], cached)
            if advances and self.recurrent is not None:
                state: Any = cached or self.recurrent.start(x.shape[0], x.dtype)
                new = self.recurrent.advance(state, new, contexts[self.layer_type])
        else:
            update = self.mlp(mlp_input)
        kept = mlp_input if self.normed_residual else middle
        out = self._add(_multiply(kept, self.mlp_residual), update, self.post_mlp_norm, self.mlp_scales)
        if self.carried == "shortcut":
            # The layer's own experts leave their output for the next layer; a layer without any adds what it found.
            out = out if self.shortcut is not None else out + carried
            carried = jnp.zeros_like(out) if self.shortcut is None else self.shortcut(mlp_input)
        return self._together(_multiply(out, self.output_scale), carried), new

    def _run_guided(
        self,
        guide: Guide,
        stream: Float[Array, "B T S"],
        contexts: Contexts,
        cached: Cached | None,
        left: Bool[Array, "B T"] | None,
        advances: bool,
    ) -> tuple[Float[Array, "B T S"], New]:
        """Runs a recurrent layer whose input is the stream plus what the guide makes of stream and embedding."""
        assert self.recurrent is not None
        assert self.beside is not None
        x, carried = self._apart(stream)
        parts: Any = (None, None) if cached is None else cached
        guidance, rows = guide(stream, contexts[self.layer_type], parts[0])
        if left is not None:  # as in `project_rows`
            guidance = jnp.where(left[:, :, None], jnp.zeros_like(guidance), guidance)
        normed = _apply(self.pre_attention_norm, x + guidance)
        mixed, taken = self.recurrent(normed, contexts[self.beside], parts[1], advances=advances)
        out = self._add(x, mixed, self.post_attention_norm, self.scales)
        return self._together(out, carried), SideBySide(rows, taken)

    def _apart(self, stream: Float[Array, "B T S"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T C"]]:
        """The residual stream, and what it carries."""
        size = stream.shape[-1] if self.carried == "nothing" else stream.shape[-1] // 2
        return stream[..., :size], stream[..., size:]

    def _together(self, x: Float[Array, "B T D"], carried: Float[Array, "B T C"]) -> Float[Array, "B T S"]:
        """Inverse of `_apart`."""
        return whole_channels(x if self.carried == "nothing" else jnp.concatenate([x, carried], axis=-1))

    def _mix(
        self, x: Float[Array, "B T D"], contexts: Contexts, cached: Cached | None, advances: bool
    ) -> tuple[Float[Array, "B T D"], New]:
        """The output of attention, of the recurrent layer, or the sum of both, and what they keep of the tokens."""
        if self.beside is None:
            memory: Any = cached
            if self.recurrent is not None:
                return self.recurrent(x, contexts[self.layer_type], memory, advances=advances)
            assert self.attention is not None
            return self.attention(x, contexts[self.layer_type], memory)
        attention, recurrent = self.attention, self.recurrent
        assert attention is not None
        assert recurrent is not None
        parts: Any = (None, None) if cached is None else cached
        first, rows = attention(x, contexts[self.layer_type], parts[0])
        second, taken = recurrent(x, contexts[self.beside], parts[1], advances=advances)
        return first + second, SideBySide(rows, taken)

    def project_rows(self, stream: Float[Array, "B T S"], contexts: Contexts) -> Rows:
        """What this layer would keep of tokens, without running it; a recurrent layer goes without its guide."""
        x, _ = self._apart(stream)
        normed = _apply(self.pre_attention_norm, x)
        if self.guide is not None and self.recurrent is not None:
            rows = self.guide.project_kv(stream, contexts[self.layer_type])
            return SideBySide(rows, self.recurrent.project_inputs(normed))
        if self.attention is not None:
            rows = self.attention.project_kv(normed, contexts[self.layer_type])
            return rows if self.recurrent is None else SideBySide(rows, self.recurrent.project_inputs(normed))
        inputs = x[..., :0] if self.recurrent is None else self.recurrent.project_inputs(normed)
        if isinstance(self.mlp, ChannelMix):
            return jnp.concatenate([inputs, _apply(self.pre_mlp_norm, x)], axis=-1)
        return inputs

    def _add(self, x: Array, update: Array, norm: Norm | GatedNorm | None, scales: AddScales) -> Array:
        """Adds a sublayer's output to the residual stream, with a norm before or after the addition."""
        if not self.norm_after_add:
            update = _apply(norm, update)
        x, update = scaled(x, scales.stream), scaled(update, scales.update)
        return _apply(norm, x + update) if self.norm_after_add else x + update


@functools.partial(jax.jit, static_argnames="advances")
def _trace_once(
    layer: DecoderLayer,
    x: Float[Array, "B T S"],
    contexts: Contexts,
    cached: Cached | None,
    left: Bool[Array, "B T"] | None,
    *,
    advances: bool,
) -> tuple[Float[Array, "B T S"], New]:
    """Traces and lowers layers of the same structure once per program; XLA inlines the calls."""
    return layer._run(x, contexts, cached, left, advances)


def _attention(
    config: DecoderConfig, kind: AttentionType, *, dtype: jnp.dtype, rngs: nnx.Rngs
) -> Attention | LatentAttention | ExpertAttention:
    if config.latent is not None:
        return LatentAttention(config, kind, dtype=dtype, rngs=rngs)
    if config.attention_experts is not None:
        return ExpertAttention(config, kind, dtype=dtype, rngs=rngs)
    attention = Attention if kind.differential is None else DifferentialAttention
    attention = DynamicMaskAttention if kind.dynamic_mask else attention
    if any(other.head_dim or other.num_kv_heads for other in config.attention_types):
        attention = ShapedAttention
    return attention(config, kind, dtype=dtype, rngs=rngs)


def _recurrent(config: DecoderConfig, kind: RecurrentType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> Mixer:
    return _MIXERS[kind.kind](config.hidden_size, kind, dtype=dtype, rngs=rngs)


def _mix_channels(
    block: ChannelMix, x: Float[Array, "B T D"], inputs: Any, order: Any, state: Any
) -> tuple[Float[Array, "B T D"], Float[Array, "B T I"]]:
    """Runs a feed-forward block that reads the token before, too; its inputs join those of the layer."""
    window = jnp.zeros_like(x[:, :1]) if state is None else state.window[..., -x.shape[-1] :]
    return block(x, order, window), jnp.concatenate([inputs, x], axis=-1)


def _apply(norm: Norm | GatedNorm | None, x: Array) -> Array:
    return x if norm is None else norm(x)


def _multiply(x: Array, weights: nnx.Param | None) -> Array:
    return x if weights is None else x * weights[...][None, None, :]

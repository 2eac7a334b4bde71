"""Decoders with Kimi delta attention between layers of latent attention: Kimi Linear, and Ling 3.0."""

from __future__ import annotations

from typing import Any

from convert.families.base import Family, layers_without_rope, require
from convert.families.latent import latent_decoder, latent_rotary_layers, latent_scale
from convert.families.mixtures import WITHOUT_MTP, marked_sparse_layers, shared_width, sigmoid_mixture
from convert.families.numbers import count
from convert.families.recurrent import attention_kinds, mixed
from convert.weights.parts import (
    EXPERTS,
    MIXTRAL_EXPERTS,
    MLP,
    PRE_NORMS,
    Names,
    latent_attention,
    layer_rules,
    layers_with_attention,
    layers_with_state,
    mlp,
)
from convert.weights.recurrent_parts import kimi_delta
from convert.weights.rules import Rule, Target, move
from tide_jax.errors import TideError
from tide_jax.model.architecture import AttentionType, DecoderConfig
from tide_jax.model.recurrent.types import KimiDeltaType


def _kimi_delta(hf: Any, **flags: Any) -> KimiDeltaType:
    require(hf, hidden_act="silu")
    return KimiDeltaType(
        heads=count(hf, "linear_num_heads"),
        head_dim=count(hf, "linear_head_dim"),
        width=count(hf, "linear_conv_kernel_dim"),
        norm_eps=hf.rms_norm_eps,
        **flags,
    )


def _decoder(hf: Any, kind: KimiDeltaType, attention: list[AttentionType], **flags: Any) -> DecoderConfig:
    shared = shared_width(hf, hf.n_shared_experts)
    moe = sigmoid_mixture(hf, hf.num_local_experts, layers=marked_sparse_layers(hf), shared_size=shared)
    return latent_decoder(hf, mixed(hf, {"linear_attention": kind}, attention), moe=moe, **flags)


def _kimi_linear(hf: Any) -> DecoderConfig:
    kind = _kimi_delta(hf, fade_rank=hf.linear_head_dim, gate_rank=hf.linear_head_dim)
    return _decoder(hf, kind, layers_without_rope(hf, latent_scale(hf)), positions="none")


def _bailing_hybrid(hf: Any) -> DecoderConfig:
    if hf.kda_safe_gate and not (hf.kda_lower_bound or 0) < 0:
        raise TideError(f"bailing_hybrid with kda_lower_bound={hf.kda_lower_bound!r} is not supported, only below 0")
    kind = _kimi_delta(hf, fade_limit=-float(hf.kda_lower_bound) if hf.kda_safe_gate else None)
    attention = latent_rotary_layers(hf, attention_kinds(hf), interleaved=True)
    return _decoder(hf, kind, attention, attention_gate="head")


def _layers(name: str, *more: Names) -> tuple[Rule, ...]:
    """Rules for layers that have either mixer under one name."""
    return (
        *layer_rules("[model.]layers", latent_attention(name), layers=layers_with_attention),
        *layer_rules("[model.]layers", kimi_delta(name), layers=layers_with_state),
        *layer_rules("[model.]layers", PRE_NORMS, MLP, EXPERTS, *more),
    )


_BLOCKS: Names = {
    **MIXTRAL_EXPERTS,
    "block_sparse_moe.gate.e_score_correction_bias": (Target("mlp.correction"),),
    **mlp("block_sparse_moe", "mlp"),
    **mlp("block_sparse_moe.shared_experts", "mlp.shared"),
}
KIMI = (*WITHOUT_MTP, *_layers("self_attn", _BLOCKS))
LING = (
    *WITHOUT_MTP,
    move("model.word_embeddings.weight", Target("embed.kernel")),
    *_layers("attention", {"mlp.gate.expert_bias": (Target("mlp.correction"),)}),
)
FAMILIES: dict[str, Family] = {
    "kimi_linear": Family(_kimi_linear, KIMI),
    "bailing_hybrid": Family(_bailing_hybrid, LING),
}

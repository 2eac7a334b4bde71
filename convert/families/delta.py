"""Decoders whose recurrent layers are gated delta nets: Qwen3-Next and its successors, and Olmo Hybrid."""

from __future__ import annotations

from typing import Any

from convert.families.base import (
    Family,
    biases,
    decoder,
    first_set,
    layers_without_rope,
    require,
    rms_qk_norm,
    rotary_layers,
)
from convert.families.mixtures import WITHOUT_MTP, mixture, sparse_step_layers
from convert.families.numbers import count, share
from convert.families.recurrent import attention_kinds, mixed
from convert.weights.parts import (
    ATTENTION,
    POST_NORMS,
    PRE_NORMS,
    layer_rules,
    layers_with_attention,
    layers_with_state,
    llama_weights,
    norm,
)
from convert.weights.recurrent_parts import GATED_ATTENTION, gated_delta, gated_delta_apart
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.recurrent.types import GatedDeltaType


def _gated_delta(hf: Any, **flags: Any) -> GatedDeltaType:
    require(hf, hidden_act="silu")
    key_heads = count(hf, "linear_num_key_heads")
    return GatedDeltaType(
        key_heads=key_heads,
        value_heads=key_heads * share(hf, "linear_num_value_heads", "linear_num_key_heads"),
        key_dim=count(hf, "linear_key_head_dim"),
        value_dim=count(hf, "linear_value_head_dim"),
        width=count(hf, "linear_conv_kernel_dim"),
        **({"norm_eps": hf.rms_norm_eps} | flags),
    )


def _qwen(hf: Any, **flags: Any) -> DecoderConfig:
    attention = rotary_layers(hf, attention_kinds(hf), qk_norm=rms_qk_norm(hf, unit_offset=True))
    layers = mixed(hf, {"linear_attention": _gated_delta(hf)}, attention)
    return decoder(
        hf,
        layers,
        norm_unit_offset=True,
        attention_gate="channel",
        gate_bias=bool(hf.attention_bias),
        **biases(hf.attention_bias),
        **flags,
    )


def _qwen_mixture(hf: Any, **flags: Any) -> DecoderConfig:
    shared = hf.shared_expert_intermediate_size
    moe = mixture(hf, hf.num_experts, shared_size=shared, shared_gate=True, **flags)
    width = first_set(hf, "intermediate_size", "moe_intermediate_size")  # of layers without experts, if there are any
    return _qwen(hf, moe=moe, intermediate_size=width)


def _qwen3_next(hf: Any) -> DecoderConfig:
    return _qwen_mixture(hf, layers=sparse_step_layers(hf), renormalise=bool(hf.norm_topk_prob))


def _olmo_hybrid(hf: Any) -> DecoderConfig:
    """Attention layers are Olmo 3's, with norms after the sublayers; published models don't rotate."""
    rotated = (hf.rope_parameters or {}).get("rope_theta") is not None
    qk_norm = rms_qk_norm(hf, all_heads=True)
    attention = (
        rotary_layers(hf, attention_kinds(hf), qk_norm=qk_norm) if rotated else layers_without_rope(hf, qk_norm=qk_norm)
    )
    kind = _gated_delta(hf, largest_rate=2.0 if hf.linear_allow_neg_eigval else 1.0, norm_eps=1e-5)
    return decoder(
        hf,
        mixed(hf, {"linear_attention": kind}, attention),
        norm_placement="post",
        recurrent_norms="pre",
        positions="rope" if rotated else "none",
        **biases(hf.attention_bias),
    )


_OLMO_POST_NORMS = {**POST_NORMS, **norm("feedforward_layer_norm", "post_attention_norm")}
_OLMO_PRE_NORMS = {
    **PRE_NORMS,
    **norm("attention_layer_norm", "pre_attention_norm"),
    **norm("feedforward_layer_norm", "pre_mlp_norm"),
}
OLMO = (
    *llama_weights({}, gated_delta_apart("linear_attn")),
    *layer_rules("[model.]layers", _OLMO_POST_NORMS, layers=layers_with_attention),
    *layer_rules("[model.]layers", _OLMO_PRE_NORMS, layers=layers_with_state),
)
QWEN = llama_weights(
    PRE_NORMS,
    gated_delta("linear_attn"),
    attention={**ATTENTION, **GATED_ATTENTION},
    top=WITHOUT_MTP,
)
FAMILIES: dict[str, Family] = {
    "olmo_hybrid": Family(_olmo_hybrid, OLMO),
    "qwen3_next": Family(_qwen3_next, QWEN),
    "qwen3_5_text": Family(_qwen, QWEN),
    "qwen3_5_moe_text": Family(_qwen_mixture, QWEN),
}

"""Families with ordinary attention that score each expert alone with a sigmoid: most relatives of DeepSeek-V3."""

from __future__ import annotations

import dataclasses
from typing import Any

from convert.families.base import Family, biases, decoder, require, rms_qk_norm, rotary_layers
from convert.families.mixtures import (
    WITHOUT_MTP,
    layers_after,
    marked_sparse_layers,
    shared_width,
    sigmoid_mixture,
    sparse_step_layers,
)
from convert.weights import takes
from convert.weights.parts import MIXTRAL_EXPERTS, PRE_NORMS, SANDWICH_NORMS, linear, llama_weights, mlp, norm
from convert.weights.rules import Target
from tide_jax.model.architecture import AttentionType, DecoderConfig, QueryScaling


def _glm4_moe(hf: Any) -> DecoderConfig:
    layers = rotary_layers(hf, qk_norm=rms_qk_norm(hf) if hf.use_qk_norm else None)
    moe = sigmoid_mixture(
        hf,
        hf.n_routed_experts,
        layers=layers_after(hf, hf.first_k_dense_replace),
        shared_size=shared_width(hf, hf.n_shared_experts),
    )
    return decoder(hf, layers, moe=moe, **biases(hf.attention_bias, out=False))


def _dots1(hf: Any) -> DecoderConfig:
    moe = sigmoid_mixture(
        hf,
        hf.n_routed_experts,
        layers=layers_after(hf, hf.first_k_dense_replace),
        shared_size=shared_width(hf, hf.n_shared_experts),
    )
    layers = rotary_layers(hf, hf.layer_types, qk_norm=rms_qk_norm(hf))
    return decoder(hf, layers, moe=moe, **biases(hf.attention_bias))


def _solar_open(hf: Any) -> DecoderConfig:
    shared = shared_width(hf, hf.n_shared_experts)
    moe = sigmoid_mixture(hf, hf.n_routed_experts, shared_size=shared)
    return decoder(hf, rotary_layers(hf), moe=moe, intermediate_size=shared, **biases(hf.attention_bias, out=False))


def _local_rotary(hf: Any, **flags: Any) -> list[AttentionType]:
    """Normed queries and keys; if the model has sliding windows, only those layers use rotary embedding."""
    no_rope = [hf.sliding_window is not None and kind != "sliding_attention" for kind in hf.layer_types]
    return rotary_layers(hf, hf.layer_types, no_rope=no_rope, qk_norm=rms_qk_norm(hf), **flags)


def _exaone_moe(hf: Any) -> DecoderConfig:
    moe = sigmoid_mixture(
        hf, hf.num_experts, layers=marked_sparse_layers(hf), shared_size=shared_width(hf, hf.num_shared_experts)
    )
    return decoder(hf, _local_rotary(hf), moe=moe)


def _hy_v3(hf: Any) -> DecoderConfig:
    moe = sigmoid_mixture(
        hf,
        hf.num_experts,
        layers=marked_sparse_layers(hf),
        scale=hf.router_scaling_factor,
        shared_size=shared_width(hf, hf.num_shared_experts),
    )
    layers = rotary_layers(hf, qk_norm=rms_qk_norm(hf))
    return decoder(hf, layers, moe=moe, mlp_bias=hf.mlp_bias, **biases(hf.attention_bias))


def _afmoe(hf: Any) -> DecoderConfig:
    moe = sigmoid_mixture(
        hf,
        hf.num_experts,
        layers=layers_after(hf, hf.num_dense_layers),
        scale=hf.route_scale,
        shared_size=shared_width(hf, hf.num_shared_experts),
    )
    return decoder(
        hf,
        _local_rotary(hf),
        moe=moe,
        norm_placement="sandwich",
        attention_gate="channel",
        embedding_scale=hf.hidden_size**0.5 if hf.mup_enabled else None,
        **biases(hf.attention_bias),
    )


def _kolibri1(hf: Any) -> DecoderConfig:
    shared = hf.shared_expert_intermediate_size
    moe = sigmoid_mixture(hf, hf.num_experts, correction="logit", shared_size=shared)
    return decoder(hf, _local_rotary(hf), moe=moe, norm_placement="sandwich", intermediate_size=shared)


def _flint(hf: Any) -> DecoderConfig:
    moe = sigmoid_mixture(
        hf,
        hf.num_experts,
        correction="none",
        layers=sparse_step_layers(hf),
        shared_size=hf.shared_expert_intermediate_size,
    )
    return decoder(hf, _local_rotary(hf, sinks=True), moe=moe, **biases(hf.attention_bias))


def _minimax_m2(hf: Any) -> DecoderConfig:
    layers = rotary_layers(hf, qk_norm=rms_qk_norm(hf, all_heads=True))
    return decoder(hf, layers, moe=sigmoid_mixture(hf, hf.num_local_experts))


def _minimax_m3(hf: Any) -> DecoderConfig:
    require(hf, swiglu_alpha=1.702)
    moe = sigmoid_mixture(
        hf,
        hf.num_local_experts,
        layers=marked_sparse_layers(hf),
        intermediate_size=hf.intermediate_size,
        shared_size=hf.shared_intermediate_size,
    )
    return decoder(
        hf,
        rotary_layers(hf, hf.layer_types, qk_norm=rms_qk_norm(hf, unit_offset=True)),
        moe=moe,
        intermediate_size=hf.dense_intermediate_size,
        norm_unit_offset=True,
        activation="swiglu_oai",
        activation_limit=hf.swiglu_limit,
    )


def _laguna(hf: Any) -> DecoderConfig:
    require(hf, moe_apply_router_weight_on_input=False)
    moe = sigmoid_mixture(
        hf,
        hf.num_experts,
        layers=marked_sparse_layers(hf),
        renormalise=True,
        scale=hf.moe_routed_scaling_factor,
        router_softcap=hf.moe_router_logit_softcapping or None,
        shared_size=hf.shared_expert_intermediate_size,
    )
    layers = rotary_layers(hf, hf.layer_types, qk_norm=rms_qk_norm(hf))
    heads = hf.num_attention_heads_per_layer
    return decoder(
        hf,
        [dataclasses.replace(layer, num_heads=count) for layer, count in zip(layers, heads, strict=True)],
        moe=moe,
        attention_gate="head" if hf.gating is True or hf.gating == "per-head" else "channel",
        gate_activation="softplus",
        **biases(hf.attention_bias),
    )


def _beam(hf: Any) -> DecoderConfig:
    """Averages each sublayer's output into the residual stream.

    Norms ignore the stream's length, so the average equals a plain sum up to a factor.
    """
    no_rope = [hf.rope_parameters[kind] is None for kind in hf.layer_types]
    layers = [
        dataclasses.replace(layer, query_scaling=_BEAM_QUERIES if layer.rope is None else None)
        for layer in rotary_layers(hf, hf.layer_types, no_rope=no_rope, qk_norm=rms_qk_norm(hf))
    ]
    return decoder(
        hf,
        layers,
        moe=sigmoid_mixture(hf, hf.num_experts, layers=marked_sparse_layers(hf)),
        norm_placement="sandwich",
        attention_gate="channel",
        gate_bias=True,
        logit_softcap=hf.final_logit_softcapping,
        **biases(hf.attention_bias),
    )


def _mimo_v2_flash(hf: Any) -> DecoderConfig:
    """Layers with a sliding window have sinks and twice as many key-value heads."""
    layers = [
        dataclasses.replace(layer, sinks=True, num_kv_heads=2 * hf.num_key_value_heads) if layer.window else layer
        for layer in rotary_layers(hf, hf.layer_types)
    ]
    return decoder(
        hf,
        layers,
        moe=sigmoid_mixture(hf, hf.n_routed_experts, layers=marked_sparse_layers(hf)),
        value_dim=hf.v_head_dim,
        value_scale=float(hf.attention_value_scale or 1.0),
        **biases(hf.attention_bias, out=False),
    )


_BEAM_QUERIES = QueryScaling(0.1, 2048.0, offset=1, power=True)
ATTENTION_GATE = {
    **linear("self_attn.gate_proj", "attention.gate", takes.attention_gate),
    **linear("self_attn.g_proj", "attention.gate", takes.attention_gate),
    "self_attn.gate_bias": (Target("attention.gate_bias", takes.column),),
}
ROUTER_GATE = {
    **linear("mlp.router.gate", "mlp.router"),
    "mlp.expert_bias": (Target("mlp.correction"),),
    **mlp("mlp.shared_mlp", "mlp.shared"),
}
AFMOE = {
    **norm("input_layernorm", "pre_attention_norm"),
    **norm("post_attention_layernorm", "post_attention_norm"),
    **norm("pre_mlp_layernorm", "pre_mlp_norm"),
    **norm("post_mlp_layernorm", "post_mlp_norm"),
}
KOLIBRI = {
    **norm("post_attn_norm", "post_attention_norm"),
    **norm("post_ffn_norm", "post_mlp_norm"),
    "moe.router.expert_bias": (Target("mlp.correction"),),
}
MIMO = {
    **linear("self_attn.v_proj", "attention.value", takes.values_out, takes.values_out),
    "self_attn.attention_sink_bias": (Target("attention.sinks"),),
}
MINIMAX_M3 = {
    **MIXTRAL_EXPERTS,
    **mlp("block_sparse_moe.shared_experts", "mlp.shared"),
    **linear("mlp.shared_experts.gate_up_proj", "mlp.shared.gate_up", takes.halves),
    "mlp.experts.gate_up_proj": (Target("mlp.experts.gate_up", takes.stacked_halves),),
    "mlp.experts.down_proj": (Target("mlp.experts.down", takes.transpose),),
}
FAMILIES: dict[str, Family] = {
    "glm4_moe": Family(_glm4_moe, llama_weights(top=WITHOUT_MTP)),
    "dots1": Family(_dots1),
    "solar_open": Family(_solar_open, llama_weights(top=WITHOUT_MTP)),
    "exaone_moe": Family(
        _exaone_moe,
        llama_weights(PRE_NORMS, {"mlp.e_score_correction_bias": (Target("mlp.correction"),)}, top=WITHOUT_MTP),
    ),
    "hy_v3": Family(_hy_v3, llama_weights(PRE_NORMS, ROUTER_GATE, top=WITHOUT_MTP)),
    "afmoe": Family(_afmoe, llama_weights(AFMOE, ROUTER_GATE, ATTENTION_GATE)),
    "kolibri1": Family(_kolibri1, llama_weights(PRE_NORMS, KOLIBRI)),
    "flint": Family(_flint, llama_weights(PRE_NORMS, {"self_attn.softmax_offset": (Target("attention.sinks"),)})),
    "minimax_m2": Family(_minimax_m2, llama_weights(PRE_NORMS, MIXTRAL_EXPERTS, top=WITHOUT_MTP)),
    "laguna": Family(
        _laguna,
        llama_weights(PRE_NORMS, ATTENTION_GATE, {"mlp.experts.e_score_correction_bias": (Target("mlp.correction"),)}),
    ),
    "beam": Family(_beam, llama_weights(SANDWICH_NORMS, ATTENTION_GATE)),
    "mimo_v2_flash": Family(_mimo_v2_flash, llama_weights(PRE_NORMS, MIMO, top=WITHOUT_MTP)),
    "minimax_m3_vl_text": Family(_minimax_m3, llama_weights(PRE_NORMS, MINIMAX_M3, top=WITHOUT_MTP)),
}

"""Families that score all experts together with a softmax, and Llama 4."""

from __future__ import annotations

import dataclasses
from typing import Any

from convert.configuration.rope import rope_config
from convert.families import sigmoid_experts
from convert.families.base import (
    Family,
    biases,
    decoder,
    first_set,
    head_dim,
    require,
    rms_qk_norm,
    rotary_layers,
    static_ntk,
    uniform_layer_types,
    with_rope,
)
from convert.families.mixtures import WITHOUT_MTP, marked_sparse_layers, mixture, shared_width, sparse_step_layers
from convert.weights import takes
from convert.weights.parts import (
    MIXTRAL_EXPERTS,
    POST_NORMS,
    PRE_NORMS,
    fused_qkv,
    layer_rules,
    linear,
    llama_weights,
    mlp,
    norm,
    outer_rules,
)
from convert.weights.rules import Target
from tide_jax.errors import TideError
from tide_jax.model.architecture import AttentionType, DecoderConfig, MoEConfig, QueryScaling


def _mixtral(hf: Any) -> DecoderConfig:
    return decoder(hf, rotary_layers(hf, uniform_layer_types(hf)), moe=mixture(hf, hf.num_local_experts))


def _qwen2_moe(hf: Any) -> DecoderConfig:
    moe = mixture(
        hf,
        hf.num_experts,
        layers=sparse_step_layers(hf),
        renormalise=hf.norm_topk_prob,
        shared_size=hf.shared_expert_intermediate_size,
        shared_gate=True,
    )
    return decoder(hf, rotary_layers(hf, hf.layer_types), moe=moe, qkv_bias=hf.qkv_bias)


def _qwen3_moe(hf: Any) -> DecoderConfig:
    moe = mixture(hf, hf.num_experts, layers=sparse_step_layers(hf), renormalise=hf.norm_topk_prob)
    layers = rotary_layers(hf, uniform_layer_types(hf), qk_norm=rms_qk_norm(hf))
    return decoder(hf, layers, moe=moe, **biases(hf.attention_bias))


def _olmoe(hf: Any) -> DecoderConfig:
    return decoder(
        hf,
        rotary_layers(hf, qk_norm=rms_qk_norm(hf, all_heads=True)),
        moe=mixture(hf, hf.num_experts, renormalise=hf.norm_topk_prob),
        clip_qkv=getattr(hf, "clip_qkv", None),
        **biases(hf.attention_bias),
    )


def _phimoe(hf: Any) -> DecoderConfig:
    require(hf, num_experts_per_tok=2)
    moe = mixture(
        hf,
        hf.num_local_experts,
        score="sparsemixer",
        sparsemixer_threshold=2 * hf.router_jitter_noise,
        renormalise=False,
    )
    return decoder(
        hf,
        _phimoe_attention(hf),
        moe=moe,
        norm="layer",
        norm_bias=True,
        head_bias=hf.lm_head_bias,
        **biases(hf.attention_bias),
    )


def _phimoe_attention(hf: Any) -> list[AttentionType]:
    """Replaces the usual attention factor of longrope by the configuration's."""
    layers, settings = rotary_layers(hf, uniform_layer_types(hf)), hf.rope_parameters
    if settings["rope_type"] == "default":
        return layers
    short, long = settings["short_mscale"], settings["long_mscale"]
    if short != long:
        raise TideError(
            f"phimoe with short_mscale={short!r} and long_mscale={long!r} is not supported, only equal ones"
        )
    return [with_rope(layer, attention_factor=float(short)) for layer in layers]


def _ernie4_5_moe(hf: Any) -> DecoderConfig:
    start, end, interval = hf.moe_layer_start_index, hf.moe_layer_end_index, hf.moe_layer_interval
    layers = tuple(i for i in range(hf.num_hidden_layers) if start <= i <= end and (i + 1) % interval == 0)
    shared = shared_width(hf, hf.moe_num_shared_experts)
    moe = mixture(hf, hf.moe_num_experts, layers=layers, correction="score", shared_size=shared)
    bias = bool(hf.use_bias)
    return decoder(hf, rotary_layers(hf, interleaved=True), moe=moe, mlp_bias=bias, head_bias=bias, **biases(bias))


def _flex_olmo(hf: Any) -> DecoderConfig:
    return dataclasses.replace(_olmoe(hf), norm_placement="post")


def _mellum(hf: Any) -> DecoderConfig:
    moe = mixture(hf, hf.num_experts, layers=marked_sparse_layers(hf), renormalise=hf.norm_topk_prob)
    layers = rotary_layers(hf, hf.layer_types, qk_norm=rms_qk_norm(hf))
    return decoder(hf, layers, moe=moe, **biases(hf.attention_bias))


def _hunyuan_v1_moe(hf: Any) -> DecoderConfig:
    moe = mixture(
        hf,
        _equal_in_all_layers(hf, "num_experts"),
        experts_per_token=_equal_in_all_layers(hf, "moe_topk"),
        intermediate_size=hf.intermediate_size,
        shared_size=hf.intermediate_size,
    )
    layers = static_ntk(hf, rotary_layers(hf, qk_norm=rms_qk_norm(hf, after_rope=True)))
    return decoder(hf, layers, moe=moe, **biases(hf.attention_bias))


def _equal_in_all_layers(hf: Any, name: str) -> int:
    """A number, or the value shared by all layers if it is a list. Raises TideError if layers differ."""
    value = getattr(hf, name)
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise TideError(f"{hf.model_type} with {name}={value!r} is not supported, only one value for all layers")
    return values.pop()


def _cohere2_moe(hf: Any) -> DecoderConfig:
    if hf.shared_expert_combination_strategy not in ("sum", "average"):
        strategy = hf.shared_expert_combination_strategy
        raise TideError(
            f"cohere2_moe with shared_expert_combination_strategy={strategy!r} is not supported, only sum and average"
        )
    average = hf.num_shared_experts > 0 and hf.shared_expert_combination_strategy == "average"
    share = 0.5 if average else 1.0
    moe = mixture(
        hf,
        hf.num_experts,
        layers=marked_sparse_layers(hf),
        score=hf.expert_selection_fn,
        renormalise=hf.expert_selection_fn == "softmax" or hf.norm_topk_prob,
        scale=share,
        shared_size=shared_width(hf, hf.num_shared_experts),
        shared_scale=share,
    )
    rotated_prefix = hf.prefix_dense_sliding_window_pattern == 1
    kinds = zip(hf.layer_types, hf.mlp_layer_types, strict=True)
    no_rope = [kind == "full_attention" and not (block == "dense" and rotated_prefix) for kind, block in kinds]
    return decoder(
        hf,
        rotary_layers(hf, hf.layer_types, no_rope=no_rope, interleaved=True),
        moe=moe,
        intermediate_size=first_set(hf, "prefix_dense_intermediate_size", "intermediate_size"),
        norm="layer" if hf.rms_norm_eps is None else "rms",
        parallel_residual=True,
        shared_norm=True,
        logit_scale=hf.logit_scale,
        **biases(hf.attention_bias),
    )


def _aria_text(hf: Any) -> DecoderConfig:
    require(hf, hidden_act="silu")
    moe = mixture(
        hf,
        hf.moe_num_experts,
        experts_per_token=hf.moe_topk,
        shared_size=shared_width(hf, hf.moe_num_shared_experts),
    )
    return decoder(hf, rotary_layers(hf), moe=moe, mlp_bias=hf.mlp_bias, **biases(hf.attention_bias))


def _dbrx(hf: Any) -> DecoderConfig:
    attention, ffn = hf.attn_config, hf.ffn_config
    require(ffn, moe_normalize_expert_weights=1.0 if ffn.moe_normalize_expert_weights else None)
    theta = getattr(attention, "rope_theta", None) or hf.rope_parameters["rope_theta"]
    return decoder(
        hf,
        [with_rope(layer, theta=float(theta)) for layer in rotary_layers(hf)],
        moe=MoEConfig(
            num_experts=ffn.moe_num_experts,
            experts_per_token=ffn.moe_top_k,
            intermediate_size=ffn.ffn_hidden_size,
            renormalise=ffn.moe_normalize_expert_weights is not None,
        ),
        norm="layer",
        norm_eps=1e-5,
        intermediate_size=ffn.ffn_hidden_size,
        activation=ffn.ffn_act_fn["name"],
        clip_qkv=attention.clip_qkv,
    )


def _gpt_oss(hf: Any) -> DecoderConfig:
    require(hf, swiglu_alpha=1.702)
    return decoder(
        hf,
        rotary_layers(hf, hf.layer_types, sinks=True),
        moe=mixture(hf, hf.num_local_experts, router_bias=True, expert_bias=True),
        activation="swiglu_oai",
        activation_limit=hf.swiglu_limit,
        **biases(hf.attention_bias),
    )


def _llama4(hf: Any) -> DecoderConfig:
    moe = mixture(
        hf,
        hf.num_local_experts,
        layers=tuple(hf.moe_layers),
        score="sigmoid",
        renormalise=False,
        scale_input=True,
        shared_size=hf.intermediate_size,
    )
    kinds = zip(hf.no_rope_layers, hf.layer_types, strict=True)
    layers = [_llama4_attention(hf, bool(rotated), kind) for rotated, kind in kinds]
    return decoder(hf, layers, moe=moe, intermediate_size=hf.intermediate_size_mlp, **biases(hf.attention_bias))


def _llama4_attention(hf: Any, rotated: bool, kind: str) -> AttentionType:
    """Layers with rotary embedding norm rotated queries and keys; others scale queries up with the position."""
    tuned = hf.attn_temperature_tuning and not rotated
    return AttentionType(
        scale=head_dim(hf) ** -0.5,
        chunk=hf.attention_chunk_size if kind == "chunked_attention" else None,
        rope=rope_config(hf, head_dim(hf), interleaved=True) if rotated else None,
        qk_norm=rms_qk_norm(hf, scale=False, after_rope=True) if hf.use_qk_norm and rotated else None,
        query_scaling=QueryScaling(hf.attn_scale, hf.floor_scale, offset=1) if tuned else None,
    )


def _jetmoe(hf: Any) -> DecoderConfig:
    experts = mixture(hf, hf.num_local_experts)
    return decoder(
        hf,
        rotary_layers(hf),
        moe=dataclasses.replace(experts, output_bias=True),
        attention_experts=experts,
        layer_norm_eps=1e-6,
    )


GPT_OSS_EXPERTS = {
    "mlp.experts.gate_up_proj": (Target("mlp.experts.gate_up", takes.alternating_halves),),
    "mlp.experts.gate_up_proj_bias": (Target("mlp.experts.gate_up_bias", takes.alternating_halves),),
    "mlp.experts.down_proj": (Target("mlp.experts.down"),),
    "mlp.experts.down_proj_bias": (Target("mlp.experts.down_bias"),),
}
LLAMA4_MLP = {
    **mlp("feed_forward", "mlp"),
    **mlp("feed_forward.shared_expert", "mlp.shared"),
    **linear("feed_forward.router", "mlp.router"),
    "feed_forward.experts.gate_up_proj": (Target("mlp.experts.gate_up", takes.split_halves),),
    "feed_forward.experts.down_proj": (Target("mlp.experts.down"),),
}
ARIA_EXPERTS = {
    "mlp.experts.fc1.weight": (Target("mlp.experts.gate_up", takes.split_halves),),
    "mlp.experts.fc2.weight": (Target("mlp.experts.down"),),
}
ERNIE_CORRECTION = {"mlp.moe_statics.e_score_correction_bias": (Target("mlp.correction", takes.flatten),)}
HUNYUAN_EXPERTS = {**linear("mlp.gate.wg", "mlp.router"), **mlp("mlp.shared_mlp", "mlp.shared")}
JETMOE = {
    **linear("self_attention.experts.router.layer", "attention.router"),
    "self_attention.experts.input_linear.weight": (Target("attention.q", takes.expert_queries),),
    "self_attention.experts.output_linear.weight": (Target("attention.out", takes.expert_outputs),),
    "self_attention.experts.bias": (Target("attention.out_bias"),),
    "self_attention.kv_proj.weight": (Target("attention.kv.kernel", takes.keys_values),),
    **linear("mlp.router.layer", "mlp.router"),
    "mlp.input_linear.weight": (Target("mlp.experts.gate_up", takes.stacked_halves),),
    "mlp.output_linear.weight": (Target("mlp.experts.down", takes.transpose),),
    "mlp.bias": (Target("mlp.output_bias"),),
}
DBRX = (
    *outer_rules("transformer.wte", "transformer.norm_f"),
    *layer_rules(
        "transformer.blocks",
        norm("norm_attn_norm.norm_1", "pre_attention_norm"),
        norm("norm_attn_norm.norm_2", "pre_mlp_norm"),
        fused_qkv("norm_attn_norm.attn.Wqkv", takes.fused_q, takes.fused_kv),
        linear("norm_attn_norm.attn.out_proj", "attention.out", takes.heads_in),
        linear("ffn.router.layer", "mlp.router"),
        {
            "ffn.experts.mlp.w1": (Target("mlp.experts.gate_up", takes.experts_out, ":, :, 0"),),
            "ffn.experts.mlp.v1": (Target("mlp.experts.gate_up", takes.experts_out, ":, :, 1"),),
            "ffn.experts.mlp.w2": (Target("mlp.experts.down", takes.experts_in),),
        },
    ),
)
FAMILIES: dict[str, Family] = {
    **sigmoid_experts.FAMILIES,
    "mixtral": Family(_mixtral, llama_weights(PRE_NORMS, MIXTRAL_EXPERTS)),
    "qwen2_moe": Family(_qwen2_moe),
    "qwen3_moe": Family(_qwen3_moe),
    "olmoe": Family(_olmoe),
    "phimoe": Family(_phimoe, llama_weights(PRE_NORMS, MIXTRAL_EXPERTS)),
    "gpt_oss": Family(_gpt_oss, llama_weights(PRE_NORMS, GPT_OSS_EXPERTS)),
    "llama4_text": Family(_llama4, llama_weights(PRE_NORMS, LLAMA4_MLP)),
    "ernie4_5_moe": Family(_ernie4_5_moe, llama_weights(PRE_NORMS, ERNIE_CORRECTION, top=WITHOUT_MTP)),
    "flex_olmo": Family(_flex_olmo, llama_weights(POST_NORMS)),
    "mellum": Family(_mellum, llama_weights(top=WITHOUT_MTP)),
    "hunyuan_v1_moe": Family(_hunyuan_v1_moe, llama_weights(PRE_NORMS, HUNYUAN_EXPERTS)),
    "cohere2_moe": Family(_cohere2_moe),
    "aria_text": Family(_aria_text, llama_weights(PRE_NORMS, ARIA_EXPERTS)),
    "dbrx": Family(_dbrx, DBRX),
    "jetmoe": Family(_jetmoe, llama_weights(PRE_NORMS, JETMOE)),
}

"""Architectures with mixtures of experts, whose matrices GGUF stacks along an extra axis."""

from __future__ import annotations

from typing import Any

import numpy as np

from convert.sources.gguf.architectures.base import (
    ATTENTION,
    EXPERTS,
    LLAMA,
    PERMUTED,
    Architecture,
    Names,
    bias_settings,
    decoder,
    expect_attention_only,
    expert_groups,
    expert_settings,
    granite_multipliers,
    qkv_clamp,
    rms_norm_eps,
    routed_scale,
    transpose,
    window_settings,
)
from convert.sources.gguf.hyperparameters import Hyperparameters
from convert.sources.gguf.tensors import Config, PartOf, To

Values = dict[str, Any]


def to_row(a: np.ndarray, c: Config) -> np.ndarray:
    """A vector as a matrix with one row; some versions of llama.cpp's converter dropped such axes."""
    return a.reshape(1, -1)


MIXTRAL_EXPERTS: Names = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": To("block_sparse_moe.experts.{i}.w1"),
    "ffn_up_exps": To("block_sparse_moe.experts.{i}.w3"),
    "ffn_down_exps": To("block_sparse_moe.experts.{i}.w2"),
}
GRANITE_EXPERTS: Names = {
    "ffn_gate_inp": "block_sparse_moe.router.layer",
    "ffn_gate_exps": PartOf("block_sparse_moe.input_linear", 0),
    "ffn_up_exps": PartOf("block_sparse_moe.input_linear", 1),
    "ffn_down_exps": "block_sparse_moe.output_linear",
    "ffn_gate_shexp": PartOf("shared_mlp.input_linear", 0, stacked=False),
    "ffn_up_shexp": PartOf("shared_mlp.input_linear", 1, stacked=False),
    "ffn_down_shexp": "shared_mlp.output_linear",
}
SHARED_EXPERT: Names = {
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": To("mlp.shared_expert_gate", to_row),
}
_QWEN: Names = {**LLAMA, **EXPERTS}


def mixtral(hp: Hyperparameters) -> Values:
    """Mixtral, which GGUF calls llama."""
    values = decoder(hp, "mixtral", **rms_norm_eps(hp), **expert_settings(hp, "num_local_experts"), sliding_window=None)
    values.pop("moe_intermediate_size", None)
    return values


def _qwen2_moe(hp: Hyperparameters) -> Values:
    shared = hp.take("expert_shared_feed_forward_length")
    return decoder(
        hp,
        "qwen2_moe",
        **rms_norm_eps(hp),
        **expert_settings(hp),
        qkv_bias=hp.has("attn_q.bias"),
        norm_topk_prob=False,
        shared_expert_intermediate_size=shared,
        decoder_sparse_step=1,
    )


def _qwen3_moe(hp: Hyperparameters) -> Values:
    hp.ignore("rope.dimension_sections", "n_deepstack_layers", "expert_shared_feed_forward_length")
    return decoder(hp, "qwen3_moe", **rms_norm_eps(hp), **bias_settings(hp), **expert_settings(hp), norm_topk_prob=True)


def _olmoe(hp: Hyperparameters) -> Values:
    return decoder(
        hp,
        "olmoe",
        **rms_norm_eps(hp),
        **bias_settings(hp),
        **expert_settings(hp),
        norm_topk_prob=False,
        clip_qkv=qkv_clamp(hp),
    )


def _phimoe(hp: Hyperparameters) -> Values:
    """Phi-3.5-MoE. A file has longrope's usual attention factor, not the one in the model's configuration."""
    window = hp.take("attention.sliding_window") or None
    values = decoder(hp, "phimoe", **rms_norm_eps(hp), **bias_settings(hp), **expert_settings(hp, "num_local_experts"))
    rope = values["rope_parameters"]
    if rope["rope_type"] == "longrope":
        rope["short_mscale"] = rope["long_mscale"] = rope["attention_factor"]
    return values | {"sliding_window": window, "lm_head_bias": "output.bias" in hp.tensors}


def _granite_moe(hp: Hyperparameters) -> Values:
    shared = hp.take("expert_shared_feed_forward_length")
    expect_attention_only(hp)
    return decoder(
        hp,
        "granitemoeshared" if shared else "granitemoe",
        **rms_norm_eps(hp),
        **bias_settings(hp),
        **granite_multipliers(hp),
        **expert_settings(hp, "num_local_experts"),
        **({"shared_intermediate_size": shared} if shared else {}),
    )


def _ernie4_5_moe(hp: Hyperparameters) -> Values:
    hp.ignore("expert_shared_feed_forward_length")
    moe = expert_settings(hp, "moe_num_experts")
    return decoder(
        hp,
        "ernie4_5_moe",
        **rms_norm_eps(hp),
        use_bias=hp.has("attn_q.bias"),
        moe_num_experts=moe["moe_num_experts"],
        moe_k=moe["num_experts_per_tok"],
        moe_intermediate_size=moe["moe_intermediate_size"],
        moe_num_shared_experts=hp.take("expert_shared_count"),
        moe_layer_start_index=hp.take("leading_dense_block_count"),
        moe_layer_interval=hp.take("interleave_moe_layer_step"),
    )


def _hunyuan_moe(hp: Hyperparameters) -> Values:
    hp.ignore("expert_shared_feed_forward_length")
    hp.expect("expert_shared_count", 1)
    moe = expert_settings(hp)
    return decoder(
        hp,
        "hunyuan_v1_moe",
        **rms_norm_eps(hp),
        **bias_settings(hp),
        num_experts=moe["num_experts"],
        moe_topk=moe["num_experts_per_tok"],
        moe_intermediate_size=moe["moe_intermediate_size"],
    )


def _gpt_oss(hp: Hyperparameters) -> Values:
    window = window_settings(hp)
    moe = expert_settings(hp, "num_local_experts")
    hp.ignore("feed_forward_length")
    values = decoder(
        hp,
        "gpt_oss",
        **rms_norm_eps(hp),
        **window,
        attention_bias=hp.has("attn_q.bias"),
        intermediate_size=moe.pop("moe_intermediate_size"),
        **moe,
    )
    if values["rope_parameters"]["rope_type"] == "yarn":
        # llama.cpp truncates the ramp's bounds to integers; the model was trained without truncation.
        values["rope_parameters"]["truncate"] = False
    return values


def _dbrx(hp: Hyperparameters) -> Values:
    moe = expert_settings(hp)
    values = decoder(hp, "dbrx", attn_config={"clip_qkv": qkv_clamp(hp)}, without=("hidden_act", "head_dim"))
    hp.expect("attention.layer_norm_epsilon", 1e-5)
    values["attn_config"] |= {
        "kv_n_heads": values["num_key_value_heads"],
        "rope_theta": values["rope_parameters"]["rope_theta"],
    }
    ffn = {
        "ffn_hidden_size": values["intermediate_size"],
        "moe_num_experts": moe["num_experts"],
        "moe_top_k": moe["num_experts_per_tok"],
        "moe_normalize_expert_weights": 1.0,
    }
    return values | {"ffn_config": ffn, "max_seq_len": values["max_position_embeddings"]}


def _join_experts(a: np.ndarray, c: Config) -> np.ndarray:
    """[experts, width, hidden] to [experts * width, hidden]."""
    return a.reshape(-1, c["hidden_size"])


def _join_transposed_experts(a: np.ndarray, c: Config) -> np.ndarray:
    """[experts, hidden, width] to [experts * width, hidden]."""
    return a.swapaxes(1, 2).reshape(-1, c["hidden_size"])


def _minimax_m2(hp: Hyperparameters) -> Values:
    moe = expert_settings(hp, "num_local_experts", scores="sigmoid")
    width = moe.pop("moe_intermediate_size")
    hp.ignore("feed_forward_length")
    return decoder(hp, "minimax_m2", **rms_norm_eps(hp), **moe, intermediate_size=width, partial=True)


def _afmoe(hp: Hyperparameters) -> Values:
    hp.expect("expert_weights_norm", True)
    hp.expect("expert_group_count", 0, 1)
    hp.expect("expert_group_used_count", 0, 1)
    return decoder(
        hp,
        "afmoe",
        **window_settings(hp),
        **rms_norm_eps(hp),
        **expert_settings(hp, scores="sigmoid"),
        attention_bias=hp.has("attn_q.bias"),
        num_dense_layers=hp.take("leading_dense_block_count"),
        num_shared_experts=hp.take("expert_shared_count"),
        route_scale=routed_scale(hp),
        mup_enabled=True,
    )


def _exaone_moe(hp: Hyperparameters) -> Values:
    window = window_settings(hp)
    shared = hp.take("expert_shared_count")
    values = _sigmoid_decoder(hp, "exaone_moe", "num_experts", num_shared_experts=shared, **window)
    dense = values["first_k_dense_replace"]
    return values | {"mlp_layer_types": ["dense"] * dense + ["sparse"] * (hp.layers - dense)}


def _sigmoid_decoder(hp: Hyperparameters, model_type: str, count: str, **fields: Any) -> Values:
    """Ordinary attention with DeepSeek-V3's experts."""
    moe = expert_settings(hp, count, scores="sigmoid")
    hp.ignore("expert_shared_feed_forward_length")
    return decoder(
        hp,
        model_type,
        **rms_norm_eps(hp),
        **bias_settings(hp),
        **moe,
        **expert_groups(hp),
        norm_topk_prob=hp.take("expert_weights_norm"),
        routed_scaling_factor=routed_scale(hp),
        first_k_dense_replace=hp.take("leading_dense_block_count"),
        **fields,
    )


def _glm4_moe(hp: Hyperparameters) -> Values:
    hp.expect("rope.dimension_sections", None)
    shared = hp.take("expert_shared_count")
    qk_norm = hp.has("attn_q_norm.weight")
    return _sigmoid_decoder(
        hp, "glm4_moe", "n_routed_experts", n_shared_experts=shared, use_qk_norm=qk_norm, partial=True
    )


def _dots1(hp: Hyperparameters) -> Values:
    return _sigmoid_decoder(hp, "dots1", "n_routed_experts", n_shared_experts=hp.take("expert_shared_count"))


def _llama4(hp: Hyperparameters) -> Values:
    """Llama 4. Settings missing from files are equal in all published models.

    Chunks have 8192 tokens, and every fourth layer has no chunks and no rotary embedding. The model with 128 experts
    does not norm queries and keys. A window of 0 means that all layers see all tokens.
    """
    hp.ignore("leading_dense_block_count")
    whole = hp.take("attention.sliding_window") == 0
    moe = expert_settings(hp, "num_local_experts")
    inner, wide = moe.pop("moe_intermediate_size"), hp.take("feed_forward_length")
    rotated = [int(whole or (layer + 1) % 4 != 0) for layer in range(hp.layers)]
    kinds = ["full_attention" if whole or not rotates else "chunked_attention" for rotates in rotated]
    return decoder(
        hp,
        "llama4_text",
        **rms_norm_eps(hp),
        **moe,
        attention_bias=hp.has("attn_q.bias"),
        intermediate_size=inner,
        intermediate_size_mlp=wide,
        interleave_moe_layer_step=hp.take("interleave_moe_layer_step"),
        use_qk_norm=moe["num_local_experts"] != 128,
        no_rope_layers=rotated,
        layer_types=kinds,
        attention_chunk_size=8192,
        attn_temperature_tuning=True,
        floor_scale=8192,
        attn_scale=0.1,
    )


_GPT_OSS_GATE_UP = {"axis": 1, "undo": transpose, "alternating": True}
ARCHITECTURES: dict[str, Architecture] = {
    "qwen2moe": Architecture(
        _qwen2_moe,
        {**_QWEN, **SHARED_EXPERT},
    ),
    "qwen3moe": Architecture(_qwen3_moe, _QWEN),
    "qwen3vlmoe": Architecture(_qwen3_moe, _QWEN),
    "olmoe": Architecture(_olmoe, _QWEN),
    "phimoe": Architecture(_phimoe, {**LLAMA, **MIXTRAL_EXPERTS}),
    "granitemoe": Architecture(_granite_moe, {**LLAMA, **PERMUTED, **GRANITE_EXPERTS}),
    "ernie4_5-moe": Architecture(
        _ernie4_5_moe,
        {**_QWEN, "exp_probs_b.bias": To("mlp.moe_statics.e_score_correction_bias", to_row)},
    ),
    "hunyuan-moe": Architecture(
        _hunyuan_moe,
        {
            **_QWEN,
            "attn_q_norm": "self_attn.query_layernorm",
            "attn_k_norm": "self_attn.key_layernorm",
            "ffn_gate_inp": "mlp.gate.wg",
            "ffn_gate_shexp": "mlp.shared_mlp.gate_proj",
            "ffn_up_shexp": "mlp.shared_mlp.up_proj",
            "ffn_down_shexp": "mlp.shared_mlp.down_proj",
        },
    ),
    "gpt-oss": Architecture(
        _gpt_oss,
        {
            **ATTENTION,
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks.weight": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
            "ffn_gate_exps.weight": PartOf("mlp.experts.gate_up_proj", 0, **_GPT_OSS_GATE_UP),
            "ffn_up_exps.weight": PartOf("mlp.experts.gate_up_proj", 1, **_GPT_OSS_GATE_UP),
            "ffn_down_exps.weight": PartOf("mlp.experts.down_proj", 0, undo=transpose),
            "ffn_gate_exps.bias": PartOf("mlp.experts.gate_up_proj_bias", 0, alternating=True),
            "ffn_up_exps.bias": PartOf("mlp.experts.gate_up_proj_bias", 1, alternating=True),
            "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
        },
    ),
    "glm4moe": Architecture(_glm4_moe, {**_QWEN, "post_attention_norm": "post_attention_layernorm"}),
    "dots1": Architecture(_dots1, _QWEN),
    "dbrx": Architecture(
        _dbrx,
        {
            "attn_norm": "norm_attn_norm.norm_1",
            "attn_qkv": "norm_attn_norm.attn.Wqkv",
            "attn_output": "norm_attn_norm.attn.out_proj",
            "attn_output_norm": "norm_attn_norm.norm_2",
            "ffn_gate_inp": "ffn.router.layer",
            "ffn_gate_exps.weight": To("ffn.experts.mlp.w1", _join_experts),
            "ffn_up_exps.weight": To("ffn.experts.mlp.v1", _join_experts),
            "ffn_down_exps.weight": To("ffn.experts.mlp.w2", _join_transposed_experts),
        },
        top={"token_embd": "transformer.wte", "output_norm": "transformer.norm_f", "output": "lm_head"},
        layers="transformer.blocks",
    ),
    "minimax-m2": Architecture(
        _minimax_m2,
        {
            **LLAMA,
            **MIXTRAL_EXPERTS,
            "exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias",
        },
    ),
    "afmoe": Architecture(
        _afmoe,
        {
            **_QWEN,
            "attn_gate": "self_attn.gate_proj",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_mlp_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
            "ffn_gate_inp": "mlp.router.gate",
            "exp_probs_b.bias": "mlp.expert_bias",
        },
    ),
    "exaone-moe": Architecture(_exaone_moe, {**_QWEN, "exp_probs_b.bias": "mlp.e_score_correction_bias"}),
    "llama4": Architecture(
        _llama4,
        {
            **LLAMA,
            "ffn_gate": "feed_forward.gate_proj",
            "ffn_up": "feed_forward.up_proj",
            "ffn_down": "feed_forward.down_proj",
            "ffn_gate_inp": "feed_forward.router",
            "ffn_gate_exps.weight": PartOf("feed_forward.experts.gate_up_proj", 0, axis=1, undo=transpose),
            "ffn_up_exps.weight": PartOf("feed_forward.experts.gate_up_proj", 1, axis=1, undo=transpose),
            "ffn_down_exps.weight": PartOf("feed_forward.experts.down_proj", 0, undo=transpose),
            "ffn_gate_shexp": "feed_forward.shared_expert.gate_proj",
            "ffn_up_shexp": "feed_forward.shared_expert.up_proj",
            "ffn_down_shexp": "feed_forward.shared_expert.down_proj",
        },
    ),
}

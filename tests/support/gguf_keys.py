"""llama.cpp's hyperparameters of Hugging Face configurations, as its converter writes them: one function a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gguf import ExpertGatingFuncType, GGUFWriter, RopeScalingType
from gguf_hparams import HParams


def common_keys(w: GGUFWriter, hp: HParams) -> None:
    """`TextModel.set_gguf_parameters`."""
    optional = {
        w.add_context_length: ("max_position_embeddings", "n_ctx", "n_positions"),
        w.add_embedding_length: ("hidden_size", "n_embd"),
        w.add_feed_forward_length: ("intermediate_size", "n_inner"),
        w.add_head_count: ("num_attention_heads", "n_head", "n_heads"),
        w.add_head_count_kv: ("num_key_value_heads",),
        w.add_layer_norm_rms_eps: ("rms_norm_eps", "norm_eps"),
        w.add_layer_norm_eps: ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        w.add_expert_count: ("num_local_experts", "num_experts"),
        w.add_expert_used_count: ("num_experts_per_tok",),
        w.add_expert_group_count: ("n_group",),
        w.add_expert_group_used_count: ("topk_group",),
        w.add_key_length: ("head_dim",),
        w.add_value_length: ("head_dim",),
    }
    for add, names in optional.items():
        if (value := hp.find(*names)) is not None:
            add(value)
    rope_keys(w, hp)
    w.add_file_type(0)


def rope_keys(w: GGUFWriter, hp: HParams) -> None:
    rope = hp.rope
    kind, factor = rope.get("rope_type"), rope.get("factor") or 1.0
    if kind == "linear":
        w.add_rope_scaling_type(RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(factor)
    elif kind == "yarn":
        w.add_rope_scaling_type(RopeScalingType.YARN)
        w.add_rope_scaling_factor(factor)
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name, add in (
            ("attention_factor", w.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", w.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", w.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(name) is not None:
                add(rope[name])
    elif kind == "longrope":
        w.add_rope_scaling_type(RopeScalingType.LONGROPE)
    if rope.get("rope_theta") is not None:
        w.add_rope_freq_base(rope["rope_theta"])


def rotated(hp: HParams) -> int:
    return int(hp.head_dim * (hp.rope.get("partial_rotary_factor") or 1.0))


def plain_keys(w: GGUFWriter, hp: HParams, **changes: Any) -> None:
    """The keys that recipes without the common ones share; `changes` replace values."""
    values = {
        "context_length": hp.find("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
        "embedding_length": hp.hidden,
        "feed_forward_length": hp.find("intermediate_size", "n_inner", "ffn_hidden_size", default=4 * hp.hidden),
        "head_count": hp.heads,
    } | changes
    for name, value in values.items():
        if value is not None:
            getattr(w, f"add_{name}")(value)
    w.add_file_type(0)


def llama_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_vocab_size(hp["vocab_size"])
    w.add_rope_dimension_count(hp.head_dim)


def rotary_count(w: GGUFWriter, hp: HParams) -> None:
    w.add_rope_dimension_count(rotated(hp))


def pattern(w: GGUFWriter, hp: HParams) -> None:
    if hp.get("sliding_window") is not None:
        w.add_sliding_window(hp["sliding_window"])
        w.add_sliding_window_pattern([kind == "sliding_attention" for kind in hp["layer_types"]])


def granite_keys(w: GGUFWriter, hp: HParams) -> None:
    llama_keys(w, hp)
    w.add_attention_scale(hp["attention_multiplier"])
    w.add_embedding_scale(hp["embedding_multiplier"])
    w.add_residual_scale(hp["residual_multiplier"])
    w.add_logit_scale(hp["logits_scaling"])
    if hp.get("shared_intermediate_size"):
        w.add_expert_shared_feed_forward_length(hp["shared_intermediate_size"])


def minicpm_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_embedding_scale(hp["embedding_multiplier"])
    w.add_residual_scale(hp["residual_multiplier"])
    w.add_logit_scale(hp["logits_scaling"])


def ministral3_keys(w: GGUFWriter, hp: HParams) -> None:
    llama_keys(w, hp)
    w.add_rope_scaling_yarn_log_mul(hp.rope["mscale_all_dim"])
    w.add_attn_temperature_scale(hp.rope["llama_4_scaling_beta"])


def gemma_keys(w: GGUFWriter, hp: HParams) -> None:
    heads = {"head_count_kv": hp.kv_heads, "key_length": hp.head_dim, "value_length": hp.head_dim}
    plain_keys(w, hp, **heads, layer_norm_rms_eps=hp["rms_norm_eps"])


def gemma2_keys(w: GGUFWriter, hp: HParams) -> None:
    gemma_keys(w, hp)
    w.add_attn_logit_softcapping(hp["attn_logit_softcapping"])
    w.add_final_logit_softcapping(hp["final_logit_softcapping"])
    w.add_sliding_window(hp["sliding_window"])


def gemma3_keys(w: GGUFWriter, hp: HParams) -> None:
    if hp.get("final_logit_softcapping"):
        w.add_final_logit_softcapping(hp["final_logit_softcapping"])
    w.add_sliding_window(hp["sliding_window"])
    w.add_rope_freq_base_swa(hp["rope_parameters"]["sliding_attention"]["rope_theta"])


def gemma4_keys(w: GGUFWriter, hp: HParams) -> None:
    if hp.get("final_logit_softcapping"):
        w.add_final_logit_softcapping(hp["final_logit_softcapping"])
    pattern(w, hp)
    w.add_shared_kv_layers(hp["num_kv_shared_layers"])
    w.add_embedding_length_per_layer_input(hp["hidden_size_per_layer_input"])
    slides = [kind == "sliding_attention" for kind in hp["layer_types"]]
    whole = next(iter(hp["per_layer_config"].values()))  # the layers that see all tokens
    for suffix, width in (("", whole["head_dim"]), ("_swa", hp.head_dim)):
        for name in (f"key_length{suffix}", f"value_length{suffix}", f"rope_dimension_count{suffix}"):
            getattr(w, f"add_{name}")(width)
    if "num_key_value_heads" in whole:
        w.add_head_count_kv([hp.kv_heads if slide else whole["num_key_value_heads"] for slide in slides])
    w.add_rope_freq_base_swa(hp["rope_parameters"]["sliding_attention"]["rope_theta"])


def gpt_neox_keys(w: GGUFWriter, hp: HParams) -> None:
    plain_keys(w, hp, rope_dimension_count=rotated(hp), layer_norm_eps=hp["layer_norm_eps"])
    w.add_parallel_residual(hp["use_parallel_residual"])


def falcon_keys(w: GGUFWriter, hp: HParams) -> None:
    kv = hp["num_kv_heads"] if hp["new_decoder_architecture"] else 1
    w.add_tensor_data_layout("jploski")
    plain_keys(w, hp, head_count_kv=kv, layer_norm_eps=hp["layer_norm_epsilon"])


def mpt_keys(w: GGUFWriter, hp: HParams) -> None:
    attention = hp["attn_config"]
    plain_keys(w, hp, layer_norm_eps=1e-5, max_alibi_bias=float(attention["alibi_bias_max"]))
    if attention["clip_qkv"] is not None:
        w.add_clamp_kqv(attention["clip_qkv"])


def phi2_keys(w: GGUFWriter, hp: HParams) -> None:
    changes = {"head_count_kv": hp.kv_heads, "layer_norm_eps": hp["layer_norm_eps"]}
    plain_keys(w, hp, **changes, rope_dimension_count=rotated(hp))


def phi3_keys(w: GGUFWriter, hp: HParams) -> None:
    changes = {"head_count_kv": hp.kv_heads, "layer_norm_rms_eps": hp["rms_norm_eps"]}
    plain_keys(w, hp, **changes, rope_dimension_count=rotated(hp))
    w.add_rope_scaling_orig_ctx_len(original_context(hp))
    w.add_rope_freq_base(hp.rope["rope_theta"])
    w.add_sliding_window(hp.get("sliding_window") or 0)
    stretch = hp["max_position_embeddings"] / original_context(hp)
    if hp.rope["rope_type"] == "longrope":
        w.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(stretch) / np.log(original_context(hp)))))


def original_context(hp: HParams) -> int:
    default = hp.get("original_max_position_embeddings") or hp["max_position_embeddings"]
    return hp.rope.get("original_max_position_embeddings") or default


def phimoe_keys(w: GGUFWriter, hp: HParams) -> None:
    phi3_keys(w, hp)
    w.add_expert_used_count(hp["num_experts_per_tok"])
    w.add_expert_count(hp["num_local_experts"])


def stablelm_keys(w: GGUFWriter, hp: HParams) -> None:
    changes = {"head_count_kv": hp.kv_heads, "layer_norm_eps": hp["layer_norm_eps"]}
    plain_keys(w, hp, **changes, rope_dimension_count=rotated(hp))
    w.add_parallel_residual(hp["use_parallel_residual"])


def olmo_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_layer_norm_eps(1e-5)
    if hp.get("clip_qkv") is not None:
        w.add_clamp_kqv(hp["clip_qkv"])


def cohere_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_logit_scale(hp["logit_scale"])
    w.add_rope_scaling_type(RopeScalingType.NONE)


def cohere2_keys(w: GGUFWriter, hp: HParams) -> None:
    cohere_keys(w, hp)
    w.add_sliding_window(hp["sliding_window"])
    w.add_vocab_size(hp["vocab_size"])
    w.add_rope_dimension_count(hp.hidden // hp.heads)


def glm_keys(w: GGUFWriter, hp: HParams) -> None:
    changes = {"head_count_kv": hp.kv_heads, "layer_norm_rms_eps": hp["rms_norm_eps"]}
    plain_keys(w, hp, **changes, rope_dimension_count=rotated(hp), rope_freq_base=hp.rope["rope_theta"])


def nemotron_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_vocab_size(hp["vocab_size"])
    w.add_layer_norm_eps(hp["norm_eps"])
    rotary_count(w, hp)
    w.add_rope_scaling_type(RopeScalingType.NONE)


def qwen2_moe_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_expert_feed_forward_length(hp["moe_intermediate_size"])
    if hp.get("shared_expert_intermediate_size"):
        w.add_expert_shared_feed_forward_length(hp["shared_expert_intermediate_size"])


def routed_keys(w: GGUFWriter, hp: HParams) -> None:
    """What DeepSeek's and GLM's and dots' experts have in common."""
    dense = hp.get("mlp_layer_types", []).count("dense")  # what newer configurations have instead
    w.add_leading_dense_block_count(hp.find("first_k_dense_replace", default=dense))
    w.add_expert_feed_forward_length(hp["moe_intermediate_size"])
    w.add_expert_count(hp["n_routed_experts"])
    w.add_expert_shared_count(hp["n_shared_experts"])
    w.add_expert_weights_scale(hp["routed_scaling_factor"])
    if hp["norm_topk_prob"]:
        w.add_expert_weights_norm(True)


def glm4_moe_keys(w: GGUFWriter, hp: HParams) -> None:
    rotary_count(w, hp)
    routed_keys(w, hp)
    w.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    w.add_nextn_predict_layers(hp.get("num_nextn_predict_layers") or 0)


def dbrx_keys(w: GGUFWriter, hp: HParams) -> None:
    attention, ffn = hp["attn_config"], hp["ffn_config"]
    plain_keys(w, hp, feed_forward_length=ffn["ffn_hidden_size"], head_count_kv=attention["kv_n_heads"])
    w.add_rope_freq_base(attention["rope_theta"])
    w.add_clamp_kqv(attention["clip_qkv"])
    w.add_expert_count(ffn["moe_num_experts"])
    w.add_expert_used_count(ffn["moe_top_k"])
    w.add_layer_norm_eps(1e-5)


def minimax_m2_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_expert_feed_forward_length(hp["intermediate_size"])
    rotary_count(w, hp)
    w.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)


def afmoe_keys(w: GGUFWriter, hp: HParams) -> None:
    llama_keys(w, hp)
    w.add_expert_shared_count(hp["num_shared_experts"])
    w.add_expert_feed_forward_length(hp["moe_intermediate_size"])
    w.add_leading_dense_block_count(hp["num_dense_layers"])
    w.add_expert_weights_norm(True)
    w.add_expert_weights_scale(hp["route_scale"])
    w.add_sliding_window(hp["sliding_window"])


def exaone_moe_keys(w: GGUFWriter, hp: HParams) -> None:
    pattern(w, hp)
    w.add_expert_feed_forward_length(hp["moe_intermediate_size"])
    w.add_expert_shared_count(hp["num_shared_experts"])
    w.add_expert_shared_feed_forward_length(hp["moe_intermediate_size"] * hp["num_shared_experts"])
    w.add_expert_weights_scale(hp["routed_scaling_factor"])
    w.add_expert_weights_norm(hp["norm_topk_prob"])
    w.add_leading_dense_block_count(hp["first_k_dense_replace"])
    w.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    w.add_nextn_predict_layers(0)
    w.add_rope_scaling_type(RopeScalingType.NONE)


def dots1_keys(w: GGUFWriter, hp: HParams) -> None:
    routed_keys(w, hp)
    w.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)


def ernie4_5_moe_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_expert_count(hp["moe_num_experts"])
    w.add_expert_used_count(hp["moe_k"])
    w.add_interleave_moe_layer_step(hp["moe_layer_interval"])
    w.add_leading_dense_block_count(hp["moe_layer_start_index"])
    w.add_expert_feed_forward_length(hp["moe_intermediate_size"])
    w.add_expert_shared_count(hp["moe_num_shared_experts"])
    if hp["moe_num_shared_experts"]:
        w.add_expert_shared_feed_forward_length(hp["intermediate_size"] // hp.kv_heads)


def hunyuan_moe_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_expert_shared_feed_forward_length(hp["intermediate_size"])
    w.add_expert_feed_forward_length(hp["intermediate_size"])
    w.add_expert_used_count(hp["moe_topk"])
    w.add_expert_shared_count(1)


def hunyuan_keys(w: GGUFWriter, hp: HParams) -> None:
    if hp.rope["rope_type"] == "dynamic":
        width = hp.head_dim
        w.add_rope_freq_base(hp.rope["rope_theta"] * hp.rope["alpha"] ** (width / (width - 2)))
        w.add_rope_scaling_type(RopeScalingType.NONE)
        w.add_rope_scaling_factor(1)
        w.add_rope_scaling_orig_ctx_len(256 * 1024)


def gpt_oss_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_sliding_window(hp["sliding_window"])
    w.add_expert_feed_forward_length(hp["intermediate_size"])


def llama4_keys(w: GGUFWriter, hp: HParams) -> None:
    llama_keys(w, hp)
    w.add_feed_forward_length(hp["intermediate_size_mlp"])
    w.add_interleave_moe_layer_step(hp["interleave_moe_layer_step"])
    w.add_expert_feed_forward_length(hp["intermediate_size"])
    if all(kind == "full_attention" for kind in hp["layer_types"]):
        w.add_sliding_window(0)


def deepseek_keys(w: GGUFWriter, hp: HParams, *, absorbed: bool = True) -> None:
    head, rank = hp["qk_nope_head_dim"] + hp["qk_rope_head_dim"], hp["kv_lora_rank"]
    w.add_vocab_size(hp["vocab_size"])
    if hp.get("q_lora_rank") is not None:
        w.add_q_lora_rank(hp["q_lora_rank"])
    w.add_kv_lora_rank(rank)
    if absorbed:
        w.add_head_count_kv(1)
        w.add_key_length(rank + hp["qk_rope_head_dim"])
        w.add_value_length(rank)
        w.add_key_length_mla(head)
        w.add_value_length_mla(hp["v_head_dim"])
    else:
        w.add_key_length(head)
        w.add_value_length(hp["v_head_dim"])
    w.add_rope_dimension_count(hp["qk_rope_head_dim"])
    if hp.get("n_routed_experts") is None:
        w.add_leading_dense_block_count(hp.layers)
        w.add_expert_feed_forward_length(hp["intermediate_size"])
        w.add_expert_shared_count(0)
    else:
        routed_keys(w, hp)
    if hp["model_type"] not in ("deepseek_v2", "youtu"):
        w.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    if (scale := hp.rope.get("mscale_all_dim")) is not None:
        w.add_rope_scaling_yarn_log_mul(0.1 * scale)


def old_deepseek_keys(w: GGUFWriter, hp: HParams) -> None:
    deepseek_keys(w, hp, absorbed=False)


def minicpm3_keys(w: GGUFWriter, hp: HParams) -> None:
    plain_keys(w, hp, head_count_kv=hp.kv_heads, layer_norm_rms_eps=hp["rms_norm_eps"], vocab_size=hp["vocab_size"])
    if hp.get("q_lora_rank") is not None:
        w.add_q_lora_rank(hp["q_lora_rank"])
    w.add_kv_lora_rank(hp["kv_lora_rank"])
    w.add_key_length(hp["qk_nope_head_dim"] + hp["qk_rope_head_dim"])
    w.add_rope_dimension_count(hp["qk_rope_head_dim"])


def with_eps(**fields: str) -> Callable[[GGUFWriter, HParams], None]:
    """Plain keys with an eps, given the writer's name and config.json's."""

    def keys(w: GGUFWriter, hp: HParams) -> None:
        changes = {name: hp[field] for name, field in fields.items()}
        plain_keys(w, hp, **changes)

    return keys


def xielu_values(w: GGUFWriter, tensors: dict[str, np.ndarray], hp: HParams) -> None:
    """Apertus' activation has parameters, which the converter makes hyperparameters: a list over layers for each."""
    for name in ("alpha_n", "alpha_p", "beta", "eps"):
        values = [float(tensors[f"model.layers.{i}.mlp.act_fn.{name}"].item()) for i in range(hp.layers)]
        getattr(w, f"add_xielu_{name}")(values)

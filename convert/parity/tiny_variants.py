"""More configurations of supported model types, besides the default ones, to measure parity on."""

from __future__ import annotations

from typing import Any

from convert.parity.tiny_recurrent import RECURRENT_VARIANTS

_SLIDING, _FULL = "sliding_attention", "full_attention"
_GROUPED = {"n_group": 4, "topk_group": 2, "n_routed_experts": 8, "num_experts_per_tok": 3}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe-dense": ("afmoe", {"num_dense_layers": 5, "mup_enabled": False}),
    "apertus-default-rope": ("apertus", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "axk2-grouped": ("axk2", _GROUPED | {"attention_bias": False}),
    "bart-scaled": ("bart", {"scale_embedding": True}),
    "bert-relu": ("bert", {"hidden_act": "relu"}),
    "codegen-partial": ("codegen", {"rotary_dim": 4}),
    "cohere-qk-norm": ("cohere", {"use_qk_norm": True, "attention_bias": False}),
    "cohere2_moe-shared": ("cohere2_moe", {"expert_selection_fn": "sigmoid", "num_shared_experts": 2}),
    "cohere2_moe-dense-first": (
        "cohere2_moe",
        {"mlp_layer_types": ["dense"] + ["sparse"] * 4, "norm_topk_prob": False, "num_shared_experts": 0},
    ),
    "dbrx-one-expert": ("dbrx", {"ffn_config": {"moe_top_k": 1, "moe_normalize_expert_weights": None}}),
    "deepseek_v2-no-q-lora": ("deepseek_v2", {"q_lora_rank": None, "attention_bias": False}),
    "deepseek_v2-grouped": (
        "deepseek_v2",
        _GROUPED | {"topk_method": "group_limited_greedy", "norm_topk_prob": True},
    ),
    "deepseek_v3-no-q-lora": ("deepseek_v3", {"q_lora_rank": None, "rope_interleave": False}),
    "deepseek_v3-yarn": (
        "deepseek_v3",
        {"rope_parameters": _YARN | {"rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 1.3}},
    ),
    "dots3_note_text-full": ("dots3_note_text", _GROUPED | {"use_sliding_window": False, "use_dsa": False}),
    "dots3_note_text-narrow-first": (
        "dots3_note_text",
        {
            "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL, _SLIDING],
            "use_dsa": False,
            "attention_bias": False,
            "swa_kv_lora_rank": 30,
        },
    ),
    "ernie4_5_moe-interval": ("ernie4_5_moe", {"moe_layer_interval": 2, "moe_layer_start_index": 0}),
    "exaone4-full": ("exaone4", {"sliding_window": None, "layer_types": [_FULL] * 5}),
    "falcon-mha": ("falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon-parallel-bias": ("falcon", {"multi_query": True, "bias": True, "alibi": False}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-new-one-norm": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "gemma-relu": ("gemma", {"hidden_act": "relu", "attention_bias": False}),
    "gemma2-no-caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3_text-default": ("gemma3_text", {"rope_scaling": None, "final_logit_softcapping": None}),
    "gemma3n_text-own-kv": ("gemma3n_text", {"num_kv_shared_layers": 0}),
    "gemma4_text-kv": (
        "gemma4_text",
        {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "gpt2-by-layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-unscaled": (
        "gpt2",
        {"scale_attn_weights": False, "tie_word_embeddings": False, "activation_function": "relu"},
    ),
    "gpt_bigcode-mha": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    "gpt_neox-no-bias": ("gpt_neox", {"rotary_pct": 1.0, "attention_bias": False, "hidden_act": "gelu_fast"}),
    "gpt_oss-default-rope": ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "hunyuan_v1_dense-dynamic": (
        "hunyuan_v1_dense",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}},
    ),
    "internlm3-dynamic": (
        "internlm3",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 6.0}, "max_position_embeddings": 16},
    ),
    "jetmoe-one": ("jetmoe", {"num_experts_per_tok": 1}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False}),
    "llama4_text-dense": ("llama4_text", {"moe_layers": [], "use_qk_norm": False, "attn_temperature_tuning": False}),
    "llama4_text-moe": ("llama4_text", {"interleave_moe_layer_step": 1, "num_experts_per_tok": 2}),
    "longcat_flash-plain": (
        "longcat_flash",
        {"zero_expert_num": 0, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "mixtral-window": ("mixtral", {"sliding_window": None, "num_experts_per_tok": 1}),
    "mpt-clipped": ("mpt", {"attn_config": {"clip_qkv": 1.2, "softmax_scale": 0.3}}),
    "mpt-qk-norm": ("mpt", {"attn_config": {"qk_ln": True}}),
    "nemotron-bare": ("nemotron", {"attention_bias": False, "mlp_bias": False, "head_dim": None}),
    "olmo-clipped": ("olmo", {"clip_qkv": 0.9}),
    "olmoe-clipped": ("olmoe", {"clip_qkv": 0.9, "norm_topk_prob": True}),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt-projected": ("opt", {"word_embed_proj_dim": 20, "enable_bias": False}),
    "opt-bare-norms": ("opt", {"layer_norm_elementwise_affine": False, "_remove_final_layer_norm": True}),
    "persimmon-plain": ("persimmon", {"qk_layernorm": False}),
    "phi-qk-norm": ("phi", {"qk_layernorm": True}),
    "phi3-longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.3, 1.5],
                "long_factor": [1.0, 2.0, 3.0, 4.0],
                "original_max_position_embeddings": 16,
            },
            "original_max_position_embeddings": 16,
            "sliding_window": None,
        },
    ),
    "phimoe-bare": ("phimoe", {"attention_bias": False, "lm_head_bias": False, "sliding_window": None}),
    "qwen2-full": ("qwen2", {"use_sliding_window": False, "tie_word_embeddings": False}),
    "qwen2_moe-every-layer": (
        "qwen2_moe",
        {"decoder_sparse_step": 1, "mlp_only_layers": [2], "qkv_bias": False, "norm_topk_prob": True},
    ),
    "qwen3-full": ("qwen3", {"use_sliding_window": False, "attention_bias": False}),
    "roformer-value": ("roformer", {"rotary_value": True}),
    "seed_oss-biases": ("seed_oss", {"attention_bias": False, "attention_out_bias": True}),
    "smollm3-full": ("smollm3", {"use_sliding_window": False, "no_rope_layer_interval": 2}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": False}),
    "stablelm-qk-norm": ("stablelm", {"qk_layernorm": True}),
    "starcoder2-full": ("starcoder2", {"sliding_window": None, "use_bias": False, "tie_word_embeddings": True}),
    "trocr-no-norm": ("trocr", {"scale_embedding": True, "layernorm_embedding": False}),
    "xglm-unscaled": ("xglm", {"scale_embedding": False}),
    "xlm-sinusoidal": ("xlm", {"sinusoidal_embeddings": True, "gelu_activation": False}),
    "xmod-pre-norm": ("xmod", {"pre_norm": True, "adapter_layer_norm": True, "ln_before_adapter": False}),
    "youtu-no-q-lora": ("youtu", {"q_lora_rank": None, "rope_interleave": False}),
    "apertus-gelu": ("apertus", {"hidden_act": "gelu"}),
    "bert-cross": ("bert", {"add_cross_attention": True}),
    "bert-tied": ("bert", {"tie_word_embeddings": True}),
    "big_bird-scaled": ("big_bird", {"rescale_embeddings": True, "use_bias": False}),
    "cohere-qk-norm-one-kv": ("cohere", {"use_qk_norm": True, "num_key_value_heads": 1}),
    "cohere_compass_text-nope": (
        "cohere_compass_text",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": None,
            },
            "logit_scale": None,
        },
    ),
    "electra-same": ("electra", {"embedding_size": 48}),
    "ernie-task": ("ernie", {"use_task_id": True}),
    "ernie4_5-bare": ("ernie4_5", {"use_bias": False, "tie_word_embeddings": True}),
    "falcon-serial": ("falcon", {"parallel_attn": False}),
    "gemma4_text-caps": ("gemma4_text", {"final_logit_softcapping": 9.0}),
    "gpt_neox_japanese-partial": ("gpt_neox_japanese", {"rotary_pct": 0.5}),
    "granite_swa-thetas": (
        "granite_swa",
        {
            "layer_rope_theta": [1e4, 0, 5e3, 1e4, 0],
            "embedding_multiplier": 1.7,
            "logits_scaling": 0.6,
            "residual_multiplier": 0.8,
            "attention_multiplier": 0.4,
        },
    ),
    "hyperclovax-post": (
        "hyperclovax",
        {"embedding_multiplier": 1.7, "logits_scaling": 1.6, "residual_multiplier": 0.8, "use_post_norm": True},
    ),
    "ministral3-scaled": (
        "ministral3",
        {
            "rope_parameters": _YARN
            | {
                "original_max_position_embeddings": 6,
                "llama_4_scaling_beta": 0.7,
                "mscale": 1.0,
                "mscale_all_dim": 1.3,
            }
        },
    ),
    "modernbert-decoder-biases": (
        "modernbert-decoder",
        {
            "norm_bias": True,
            "classifier_bias": True,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2-one-kv": ("olmo2", {"num_key_value_heads": 1}),
    "phi3-partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "roberta-pad": ("roberta", {"pad_token_id": 1}),
    "stablelm-both": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "glm4_moe-plain": (
        "glm4_moe",
        {
            "use_qk_norm": False,
            "attention_bias": False,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "first_k_dense_replace": 3,
            "head_dim": 14,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
    ),
    "deepseek_v2-yarn": (
        "deepseek_v2",
        {
            "q_lora_rank": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 40.0,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
                "beta_fast": 32,
                "beta_slow": 1,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "phimoe-longrope": (
        "phimoe",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.3, 1.5],
                "long_factor": [1.0, 2.0, 3.0, 4.0],
                "short_mscale": 1.24,
                "long_mscale": 1.24,
                "original_max_position_embeddings": 64,
            },
            "original_max_position_embeddings": 64,
            "max_position_embeddings": 128,
        },
    ),
    "cohere2_moe-rms": (
        "cohere2_moe",
        {
            "rms_norm_eps": 1e-05,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "sparse"],
            "layer_types": [
                "full_attention",
                "sliding_attention",
                "sliding_attention",
                "sliding_attention",
                "full_attention",
            ],
            "expert_selection_fn": "sigmoid",
            "norm_topk_prob": False,
            "num_shared_experts": 2,
            "shared_expert_combination_strategy": "sum",
        },
    ),
    "cohere2_moe-prefix": (
        "cohere2_moe",
        {
            "prefix_dense_sliding_window_pattern": 2,
            "mlp_layer_types": ["dense", "dense", "sparse", "sparse", "sparse"],
            "layer_types": [
                "full_attention",
                "sliding_attention",
                "sliding_attention",
                "sliding_attention",
                "full_attention",
            ],
            "prefix_dense_intermediate_size": 36,
        },
    ),
    "gpt_oss-limit": ("gpt_oss", {"swiglu_limit": 0.5, "num_experts_per_tok": 3, "attention_bias": False}),
    "minimax_m3-dense": (
        "minimax_m3_vl_text",
        {"mlp_layer_types": ["dense", "sparse", "sparse", "dense", "sparse"], "swiglu_limit": 0.7},
    ),
    "minimax_m2-partial": ("minimax_m2", {"rotary_dim": 6}),
    "hunyuan_v1_moe-dynamic": (
        "hunyuan_v1_moe",
        {
            "moe_topk": [2, 2, 2, 2, 2],
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0},
        },
    ),
    "granitemoe_swa-theta": (
        "granitemoe_swa",
        {
            "layer_rope_theta": [10000.0, 0, 500.0, 0, 10000.0],
            "shared_intermediate_size": 0,
            "embedding_multiplier": 1.7,
            "logits_scaling": 0.6,
            "residual_multiplier": 0.8,
            "attention_multiplier": 0.4,
        },
    ),
    "dots1-grouped": (
        "dots1",
        {
            "n_group": 4,
            "topk_group": 2,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.7,
        },
    ),
    "laguna-channel": (
        "laguna",
        {
            "gating": "per-element",
            "num_attention_heads_per_layer": None,
            "moe_router_logit_softcapping": 1.5,
            "moe_routed_scaling_factor": 1.7,
            "rope_parameters": None,
            "layer_types": [
                "full_attention",
                "sliding_attention",
                "sliding_attention",
                "sliding_attention",
                "sliding_attention",
            ],
        },
    ),
    "mimo-full": (
        "mimo_v2_flash",
        {"attention_value_scale": None, "attention_bias": False, "v_head_dim": 18, "num_attention_heads": 8},
    ),
    "jetmoe-eps": ("jetmoe", {"rms_norm_eps": 0.1, "num_experts_per_tok": 3, "tie_word_embeddings": True}),
    "glm_moe_dsa-short": (
        "glm_moe_dsa",
        {"index_topk": 64, "indexer_types": ["full", "full", "shared", "shared", "full"]},
    ),
} | RECURRENT_VARIANTS
"""Maps a name for tests and tables to the model type and fields that override those of `TYPES`."""

REFUSED_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_text-moe": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 20},
    ),
    "gemma4_text-per-layer": ("gemma4_text", {"hidden_size_per_layer_input": 20}),
}
"""Variants of supported types that are refused by name."""

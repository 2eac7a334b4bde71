"""Fields that some model types need, besides those in `convert.parity.tiny`, to build tiny models."""

from __future__ import annotations

from typing import Any

_SLIDING, _FULL = "sliding_attention", "full_attention"
_MIXED = [_FULL, _SLIDING, _SLIDING, _FULL, _SLIDING]
_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"]
_MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 16}
_GROUPED = {"n_group": 4, "topk_group": 2, "n_routed_experts": 8, "num_experts_per_tok": 3}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
# More keys than the test texts have: if an indexer drops keys, the result differs from dense attention.
_INDEXER = {"index_topk": 40, "index_head_dim": 8, "index_n_heads": 4}

TYPES: dict[str, dict[str, Any]] = {
    "afmoe": {"mup_enabled": True, "route_scale": 1.7, "num_dense_layers": 1},
    "aria_text": {"moe_num_shared_experts": 3},
    "axk1": _GROUPED,
    "axk2": _INDEXER,
    "bailing_hybrid": _GROUPED | {"num_local_experts": 8, "layer_group_size": 3},
    "bamba": _MAMBA | {"attn_layer_indices": [1, 3]},
    "beam": {"num_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "big_bird": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 50, "encoder_hash_byte_group_size": [3, 4]},
    "codegen": {"n_head": 4, "rotary_dim": 8},
    "cohere": {"logit_scale": 0.7, "tie_word_embeddings": True},
    "cohere2": {"logit_scale": 0.7, "tie_word_embeddings": True},
    "cohere2_moe": {"logit_scale": 0.7, "tie_word_embeddings": True, "num_experts_per_tok": 2},
    "cohere_compass_text": {
        "logit_scale": 0.7,
        "layer_types": _MIXED,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in (_SLIDING, _FULL)},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 1e4},
        "ffn_config": {"moe_num_experts": 5, "moe_top_k": 2},
    },
    "deepseek_v2": {"first_k_dense_replace": 1, "num_experts_per_tok": 2, "routed_scaling_factor": 1.3},
    "deepseek_v3": _GROUPED,
    "deepseek_v32": _GROUPED | _INDEXER,
    "dots1": {"max_window_layers": 2, "sliding_window": 7, "layer_types": _MIXED},
    "dots3_note_text": _INDEXER
    | {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 18,
        "swa_kv_lora_rank": 14,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 10,
        "swa_v_head_dim": 12,
    },
    "dots3_note": {
        "vision_config": {
            "pyramid_num_routed": [-1] * 4 + [5],
            "adapter_in_dim": 48,
            "adapter_out_dim": 48,
            "mlp_bias": False,
        },
        "audio_config": {"adapter_input_size": 48, "adapter_out_dim": 48},
    },
    "electra": {"embedding_size": 20},
    "exaone4": {"sliding_window_pattern": 4},
    "falcon_h1": {"mamba_d_ssm": 96} | _MAMBA,
    "falcon": {"num_kv_heads": None},
    "gemma3_text": {
        "head_dim": 16,
        "num_hidden_layers": 6,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 24,
        "final_logit_softcapping": 9.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "tie_word_embeddings": True,
    },
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 24},
    "gemma3n_text": {
        "num_hidden_layers": 10,
        "num_kv_shared_layers": 4,
        "hidden_size_per_layer_input": 20,
        "laurel_rank": 10,
        "activation_sparsity_pattern": [0.95] * 3 + [0.0] * 7,
        "tie_word_embeddings": True,
    },
    "gemma4_text": {
        "num_hidden_layers": 6,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "tie_word_embeddings": True,
    },
    "gemma3": {"text_config": {"final_logit_softcapping": None}},  # the whole model does not apply it
    "gemma4": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gemma4_unified_text": {"num_hidden_layers": 6, "global_head_dim": 16, "tie_word_embeddings": True},
    "gemma4_assistant": {
        "num_centroids": 8,
        "centroid_intermediate_top_k": 4,
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 6,
        },
    },
    "gemma4_unified_assistant": {
        "num_centroids": 8,
        "centroid_intermediate_top_k": 4,
        "text_config": {"num_kv_shared_layers": 6},
    },
    "glm4_moe": _GROUPED | {"use_qk_norm": True},
    "glm4_moe_lite": _GROUPED,
    "glm_moe_dsa": _GROUPED | _INDEXER,
    "gpt2": {"tie_word_embeddings": True},
    "gpt-sw3": {"tie_word_embeddings": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 2], [["global"], 1]], "tie_word_embeddings": True},
    "gpt_neox": {"rotary_pct": 0.5},
    "gptj": {"rotary_dim": 4},
    "granite": {
        "embedding_multiplier": 1.7,
        "logits_scaling": 0.6,
        "residual_multiplier": 0.8,
        "attention_multiplier": 0.4,
    },
    "granitemoehybrid": _MAMBA
    | {
        "layer_types": [_FULL] * 5,
        "position_embedding_type": "rope",
        "embedding_multiplier": 1.7,
        "logits_scaling": 0.6,
        "residual_multiplier": 0.8,
        "attention_multiplier": 0.4,
    },
    "helium": {"head_dim": 8},
    "hy_v4": _INDEXER,
    "inkling_text": {"logits_mup_width_multiplier": 2.0},
    "kimi_linear": _GROUPED | {"num_local_experts": 8},
    "laguna": {"layer_types": _MIXED, "num_attention_heads_per_layer": [6, 4, 6, 6, 4]},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": ["conv", _FULL, "conv", _FULL, "conv"]},
    "llama4_text": {"attention_chunk_size": 7, "floor_scale": 5, "attn_scale": 0.3, "interleave_moe_layer_step": 2},
    "longcat_flash": {"num_layers": 4, "zero_expert_num": 3, "moe_topk": 3},
    "mamba2": {"num_heads": 8, "head_dim": 12, "n_groups": 2, "state_size": 16},
    "mellum": {"layer_types": _MIXED},
    "mimo_v2_flash": {"head_dim": 18, "num_attention_heads": 8},
    "minicpm3": {"head_dim": 12},
    "minimax": {
        f"{part}_{name}_factor": factor
        for part in ("mlp", "full_attn", "linear_attn")
        for name, factor in (("alpha", 3.5), ("beta", 0.8))
    },
    "minimax_m3_vl_text": {"rotary_dim": 6, "index_head_dim": 12, "index_n_heads": 2},
    "ministral": {"layer_types": _MIXED},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", _FULL, "mlp", _FULL],
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 12,
        "n_groups": 2,
        "n_routed_experts": 8,
    },
    "moshi": {"sliding_window": 64},
    # transformers stores the filters of queries, keys and values as thirds, so these need equal widths.
    "olmo_hybrid": _LINEAR | {"linear_key_head_dim": 20},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2, "tie_word_embeddings": True},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2, "decoder_sparse_step": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2, "head_dim": 14},
    "qwen3_5_text": _LINEAR | {"head_dim": 16},
    "qwen3_5_moe_text": _LINEAR | {"head_dim": 16},
    "qwen3_moe": {"use_sliding_window": True, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "qwen3_next": _LINEAR | {"head_dim": 16},
    "qwen4_exp_text": _LINEAR
    | {
        "head_dim": 16,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 50,
    },
    "recurrent_gemma": {"logits_soft_cap": 9.0},
    "reformer": {
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (16, 32),
        "attn_layers": ("local", "lsh", "local", "lsh", "local"),
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "feed_forward_size": 72,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "rembert": {"input_embedding_size": 20, "output_embedding_size": 28},
    "roc_bert": {
        "pronunciation_embed_dim": 20,
        "pronunciation_vocab_size": 30,
        "shape_embed_dim": 28,
        "shape_vocab_size": 40,
    },
    "roformer": {"embedding_size": 20},
    "smollm3": {"use_sliding_window": True, "max_window_layers": 2},
    "stablelm": {"head_dim": 8},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni", "d_head": 8},
    "xlstm": {"hidden_size": 128, "num_heads": 4, "use_bias": False},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "de_DE"},
    "zamba": {"layers_block_type": _HYBRID},
    "zamba2": {
        "layers_block_type": _HYBRID,
        "n_mamba_heads": 8,
        "mamba_d_state": 16,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 20, "layer_types": ["hybrid"] * 5},
}
"""Fields that a model type needs in addition to the common ones."""

"""`convert.parity.tiny_variants` of types that have recurrent layers."""

from __future__ import annotations

from typing import Any

_SLIDING, _FULL = "sliding_attention", "full_attention"
_MULTIPLIED = {
    "attention_bias": False,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.6,
    "key_multiplier": 0.7,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.8,
    "ssm_multipliers": [0.7, 0.9, 1.1, 1.3, 0.6],
    "mlp_multipliers": [0.8, 1.4],
    "embedding_multiplier": 1.5,
    "lm_head_multiplier": 0.9,
}

RECURRENT_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bailing_hybrid-no-limit": ("bailing_hybrid", {"kda_safe_gate": False, "attention_bias": False}),
    "bamba-groups": ("bamba", {"mamba_n_groups": 2, "mamba_proj_bias": True}),
    "granitemoehybrid-nope": ("granitemoehybrid", {"position_embedding_type": None}),
    "granitemoehybrid-dense": (
        "granitemoehybrid",
        {"num_local_experts": 0, "num_experts_per_tok": 0, "tie_word_embeddings": True},
    ),
    "granitemoehybrid-recurrent": (
        "granitemoehybrid",
        {"layer_types": ["linear_attention", _FULL, _FULL, "linear_attention", _FULL], "mamba_n_groups": 2},
    ),
    "granitemoehybrid-recurrent-nope": (
        "granitemoehybrid",
        {
            "layer_types": ["linear_attention", "linear_attention", _FULL, "linear_attention", "linear_attention"],
            "position_embedding_type": "nope",
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
        },
    ),
    "jamba-dense": (
        "jamba",
        {"num_experts": 1, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "jamba-bias": ("jamba", {"mamba_proj_bias": True, "mamba_conv_bias": False, "tie_word_embeddings": True}),
    "kimi_linear-no-q-lora": ("kimi_linear", {"q_lora_rank": None, "attention_bias": False}),
    "lfm2-attention": ("lfm2", {"full_attn_idxs": [0, 1, 2, 3, 4]}),
    "lfm2-conv-bias": ("lfm2", {"conv_bias": True, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True}),
    "lfm2_moe-plain": ("lfm2_moe", {"use_expert_bias": False, "norm_topk_prob": False, "routed_scaling_factor": 1.3}),
    "lfm3-pre": ("lfm3", {"use_sandwich_norm": False, "use_attention_gate": False}),
    "mamba-plain": (
        "mamba",
        {"intermediate_size": 80, "use_bias": False, "use_conv_bias": False, "tie_word_embeddings": True},
    ),
    "mamba2-plain": ("mamba2", {"use_bias": False, "tie_word_embeddings": True}),
    "minimax-attention": ("minimax", {"layer_types": [_FULL] * 5}),
    "minimax-lightning": ("minimax", {"layer_types": ["linear_attention"] * 5}),
    "minimax-plain": (
        "minimax",
        {"sliding_window": None, "head_dim": None}
        | {f"{part}_{name}_factor": 1 for part in ("mlp", "full_attn", "linear_attn") for name in ("alpha", "beta")},
    ),
    "nemotron_h-dense": (
        "nemotron_h",
        {"layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"]},
    ),
    "olmo_hybrid-nope": ("olmo_hybrid", {"rope_parameters": {"rope_theta": None, "rope_type": "default"}}),
    "olmo_hybrid-rates": ("olmo_hybrid", {"linear_allow_neg_eigval": False, "attention_bias": False}),
    "qwen3_5_text-one-head": ("qwen3_5_text", {"linear_num_key_heads": 4, "linear_num_value_heads": 4}),
    "qwen3_next-attention": ("qwen3_next", {"layer_types": [_FULL] * 5}),
    "qwen3_next-plain": (
        "qwen3_next",
        {"attention_bias": False, "mlp_only_layers": [0, 2], "norm_topk_prob": False, "tie_word_embeddings": True},
    ),
    "recurrent_gemma-gelu": (
        "recurrent_gemma",
        {
            "block_types": ["recurrent", _SLIDING],
            "hidden_activation": "gelu",
            "attention_bias": False,
            "partial_rotary_factor": 1.0,
            "tie_word_embeddings": True,
        },
    ),
    "zamba-one-head": ("zamba", {"n_mamba_heads": 1, "mamba_conv_bias": False, "tie_word_embeddings": True}),
    "zamba2-blocks": (
        "zamba2",
        {
            "layers_block_type": ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid"],
            "num_mem_blocks": 2,
            "use_mem_rope": True,
            "use_shared_attention_adapter": True,
            "num_key_value_heads": 6,
            "mamba_ngroups": 2,
            "add_bias_linear": True,
            "tie_word_embeddings": True,
        },
    ),
    "rwkv-rescaled": ("rwkv", {"rescale_every": 2, "intermediate_size": None, "tie_word_embeddings": True}),
    "xlstm-caps": ("xlstm", {"qk_dim_factor": 1.0, "gate_soft_cap": 3.0, "output_logit_soft_cap": 4.0}),
    "falcon_h1-multiplied": ("falcon_h1", _MULTIPLIED),
    "falcon_h1-norm": (
        "falcon_h1",
        {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_n_groups": 2, "tie_word_embeddings": True},
    ),
    "falcon_h1-norm-first": (
        "falcon_h1",
        {"mamba_rms_norm": True, "mamba_n_groups": 2, "mamba_proj_bias": True, "projectors_bias": True},
    ),
    "minimax-factors": (
        "minimax",
        {
            "mlp_alpha_factor": 2.0,
            "mlp_beta_factor": 0.7,
            "full_attn_alpha_factor": 1.5,
            "full_attn_beta_factor": 1.2,
            "linear_attn_alpha_factor": 0.9,
            "linear_attn_beta_factor": 1.3,
        },
    ),
}

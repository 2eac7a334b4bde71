"""Keys of config.json that transformers' models read although their configuration classes don't declare them.

A transformers class keeps every key it finds. Only declared keys and those listed here are settings of the model; all
others are dropped before a family reads the configuration. A test runs transformers' models and compares the keys that
they read with these tables.
"""

from __future__ import annotations


def _types(names: str) -> frozenset[str]:
    return frozenset(names.split())


HEAD_DIM = _types(
    "apertus bamba bitnet cohere doge dots1 emu3_text_model ernie4_5_moe exaone4 exaone_moe flex_olmo glm4_moe granite "
    "granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared jamba lfm2 lfm2_moe nanochat olmo olmo2 "
    "olmo3 olmo_hybrid olmoe phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3_moe smollm3 starcoder2"
)
"""Model types whose head width is an undeclared `head_dim`."""

HEAD_DIM_OF_ROTATION = _types(
    "dbrx gpt_neox gpt_neox_japanese modernbert-decoder persimmon qwen2_5_vl_text qwen2_vl_text stablelm"
)
"""Model types that use an undeclared `head_dim` for the rotation only: it must equal the width of a head."""

PARTIAL_ROTARY = _types(
    "bamba glm glm4 glm4_moe glm4_moe_lite gpt_neox gpt_neox_japanese laguna mimo_v2_flash minimax_m2 "
    "minimax_m3_vl_text nemotron persimmon phi phi3 phi4_multimodal qwen3_5_moe_text "
    "qwen3_5_text qwen3_next recurrent_gemma stablelm"
)
"""Model types that rotate only the share `partial_rotary_factor` of a head."""

WHOLE_ROTARY = _types("mellum solar_open")
"""Model types that read `partial_rotary_factor` and fail for every rope type. Other types fail for all but "default",
for which they don't read it."""

PER_LAYER: dict[str, frozenset[str]] = {
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _types("head_dim num_key_value_heads")),
    "dots3_note_text": _types(
        "head_dim kv_lora_rank num_attention_heads num_key_value_heads q_lora_rank qk_nope_head_dim qk_rope_head_dim "
        "v_head_dim"
    ),
}
"""Keys of `per_layer_config` (values of single layers) that a family reads."""

"""Gemma's lineage: norms with a unit offset, scaled embeddings, softcaps."""

from __future__ import annotations

from typing import Any

from convert.configuration.rope import rope_config
from convert.families.base import Family, biases, decoder, require, rms_qk_norm, rotary_layers
from convert.weights import takes
from convert.weights.parts import SANDWICH_NORMS, linear, llama_weights
from convert.weights.rules import Target
from tide_jax.model.architecture import AttentionType, DecoderConfig


def _gemma_like(hf: Any, layers: list[AttentionType], **flags: Any) -> DecoderConfig:
    require(hf, use_bidirectional_attention=False)
    common = {"norm_unit_offset": True, "embedding_scale": hf.hidden_size**0.5} | biases(hf.attention_bias)
    return decoder(hf, layers, **common, **flags)


def _gemma(hf: Any) -> DecoderConfig:
    # transformers does not read hidden_activation, which some checkpoints also have
    return _gemma_like(hf, rotary_layers(hf), activation=hf.hidden_act)


def _gemma2(hf: Any) -> DecoderConfig:
    return _decoder_with_softcaps(hf, norm_placement="sandwich")


def _vaultgemma(hf: Any) -> DecoderConfig:
    return _decoder_with_softcaps(hf)


def _decoder_with_softcaps(hf: Any, **flags: Any) -> DecoderConfig:
    return _gemma_like(
        hf,
        rotary_layers(hf, hf.layer_types, hf.query_pre_attn_scalar**-0.5),
        attention_softcap=hf.attn_logit_softcapping,
        logit_softcap=hf.final_logit_softcapping,
        **flags,
    )


def _gemma3(hf: Any) -> DecoderConfig:
    require(hf, attn_logit_softcapping=None)
    qk_norm = rms_qk_norm(hf, unit_offset=True)
    return _gemma_like(
        hf,
        rotary_layers(hf, hf.layer_types, hf.query_pre_attn_scalar**-0.5, qk_norm=qk_norm),
        norm_placement="sandwich",
        logit_softcap=hf.final_logit_softcapping,
    )


def _gemma4(hf: Any) -> DecoderConfig:
    require(hf, num_kv_shared_layers=0, hidden_size_per_layer_input=0, enable_moe_block=False)
    if hf.use_bidirectional_attention != "vision":  # "vision" changes nothing for text
        require(hf, use_bidirectional_attention=False)
    return decoder(
        hf.per_layer_config[0],  # takes head sizes from layer 0; _gemma4_attention sets them for each layer
        [_gemma4_attention(hf, layer, kind) for layer, kind in enumerate(hf.layer_types)],
        norm_placement="sandwich",
        layer_scale=True,
        embedding_scale=hf.hidden_size**0.5,
        logit_softcap=hf.final_logit_softcapping,
        **biases(hf.attention_bias),
    )


def _gemma4_attention(hf: Any, layer: int, kind: str) -> AttentionType:
    sliding, layer_config = kind == "sliding_attention", hf.per_layer_config[layer]
    return AttentionType(
        scale=1.0,
        window=hf.sliding_window if sliding else None,
        rope=rope_config(hf, layer_config.head_dim, kind),
        qk_norm=rms_qk_norm(hf),
        head_dim=layer_config.head_dim,
        num_kv_heads=layer_config.num_key_value_heads,
        value_norm=True,
        keys_as_values=hf.attention_k_eq_v and not sliding,
    )


SANDWICH = llama_weights(SANDWICH_NORMS)
GEMMA4 = llama_weights(
    SANDWICH_NORMS,
    linear("self_attn.q_proj", "attention.q", takes.query_heads, takes.query_heads),
    linear("self_attn.k_proj", "attention.kv", takes.kv_heads, takes.kv_heads, slot=":, 0"),
    linear("self_attn.v_proj", "attention.kv", takes.kv_heads, takes.kv_heads, slot=":, 1"),
    linear("self_attn.o_proj", "attention.out", takes.query_heads_in),
    {"layer_scalar": (Target("output_scale"),)},
)
FAMILIES: dict[str, Family] = {
    "gemma": Family(_gemma),
    "gemma2": Family(_gemma2, SANDWICH, overflows_float16=True),
    "gemma3_text": Family(_gemma3, SANDWICH, overflows_float16=True),
    "vaultgemma": Family(_vaultgemma, SANDWICH),
    "gemma4_text": Family(_gemma4, GEMMA4),
    "gemma4_unified_text": Family(_gemma4, GEMMA4),
}

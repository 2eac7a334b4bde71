"""Families with attention and MLP in parallel on one norm: Cohere and Phi."""

from __future__ import annotations

from typing import Any

from convert.families.base import Family, biases, decoder, norm_eps, plain_layer_norm, rotary_layers
from convert.weights.parts import PRE_NORMS, llama_weights, outer_rules, plain_mlp
from tide_jax.model.architecture import AttentionType, DecoderConfig, QKNorm


def _parallel_decoder(hf: Any, layers: list[AttentionType]) -> DecoderConfig:
    return decoder(
        hf,
        layers,
        norm="layer",
        parallel_residual=True,
        shared_norm=True,
        logit_scale=1.0 if hf.logit_scale is None else hf.logit_scale,
        **biases(hf.attention_bias),
    )


def _cohere(hf: Any) -> DecoderConfig:
    qk_norm = QKNorm(kind="layer", eps=norm_eps(hf), per_head=True) if hf.use_qk_norm else None
    return _parallel_decoder(hf, rotary_layers(hf, interleaved=True, qk_norm=qk_norm))


def _cohere2(hf: Any) -> DecoderConfig:
    no_rope = [kind != "sliding_attention" or hf.sliding_window is None for kind in hf.layer_types]
    return _parallel_decoder(hf, rotary_layers(hf, hf.layer_types, interleaved=True, no_rope=no_rope))


def _cohere_compass(hf: Any) -> DecoderConfig:
    no_rope = [hf.rope_parameters[kind] is None for kind in hf.layer_types]
    return _parallel_decoder(hf, rotary_layers(hf, hf.layer_types, no_rope=no_rope))


def _phi(hf: Any) -> DecoderConfig:
    qk_norm = QKNorm(kind="layer", eps=norm_eps(hf), bias=True) if hf.qk_layernorm else None
    flags = plain_layer_norm(parallel_residual=True, shared_norm=True, head_bias=True)
    return decoder(hf, rotary_layers(hf, qk_norm=qk_norm), **flags)


PHI = llama_weights(
    PRE_NORMS, plain_mlp("mlp.fc1", "mlp.fc2"), top=outer_rules("[model.]embed_tokens", "[model.]final_layernorm")
)
FAMILIES: dict[str, Family] = {
    "cohere": Family(_cohere),
    "cohere2": Family(_cohere2),
    "cohere_compass_text": Family(_cohere_compass),
    "phi": Family(_phi, PHI),
}

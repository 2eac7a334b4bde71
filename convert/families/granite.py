"""Granite and relatives: multipliers on embeddings, residuals, attention scores and logits (Yang et al. 2022, muP)."""

from __future__ import annotations

from typing import Any

from convert.families.base import Family, biases, decoder, rotary_layers, with_rope
from convert.weights.parts import PRE_NORMS, llama_weights, norm
from tide_jax.model.architecture import AttentionType, DecoderConfig


def _scaled_decoder(hf: Any, layers: list[AttentionType], logit_scale: float, **flags: Any) -> DecoderConfig:
    return decoder(
        hf,
        layers,
        embedding_scale=hf.embedding_multiplier,
        residual_scale=hf.residual_multiplier,
        logit_scale=logit_scale,
        mlp_bias=hf.mlp_bias,
        **biases(hf.attention_bias),
        **flags,
    )


def _granite(hf: Any) -> DecoderConfig:
    return _scaled_decoder(hf, rotary_layers(hf, scale=hf.attention_multiplier), 1 / hf.logits_scaling)


def _granite_swa(hf: Any) -> DecoderConfig:
    thetas = hf.layer_rope_theta
    layers = rotary_layers(
        hf, hf.layer_types, hf.attention_multiplier, no_rope=[not theta for theta in thetas], sinks=True
    )
    layers = [with_rope(a, theta=float(theta)) if theta else a for a, theta in zip(layers, thetas, strict=True)]
    return _scaled_decoder(hf, layers, 1 / hf.logits_scaling)


def _hyperclovax(hf: Any) -> DecoderConfig:
    placement = "sandwich" if hf.use_post_norm else "pre"
    layers = rotary_layers(hf, scale=hf.attention_multiplier)
    return _scaled_decoder(hf, layers, hf.logits_scaling, norm_placement=placement)


HYPERCLOVAX = llama_weights(
    PRE_NORMS, {**norm("post_norm1", "post_attention_norm"), **norm("post_norm2", "post_mlp_norm")}
)
FAMILIES: dict[str, Family] = {
    "granite": Family(_granite),
    "granite_swa": Family(_granite_swa),
    "hyperclovax": Family(_hyperclovax, HYPERCLOVAX),
}

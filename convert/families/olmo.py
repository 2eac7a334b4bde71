"""Families whose norms differ from Llama's: after a sublayer, or without weights."""

from __future__ import annotations

from typing import Any

from convert.families.base import Family, biases, decoder, rms_qk_norm, rotary_layers, with_rope
from convert.weights.parts import POST_NORMS, PRE_NORMS, llama_weights, plain_mlp
from tide_jax.model.architecture import DecoderConfig


def _olmo(hf: Any) -> DecoderConfig:
    return decoder(
        hf,
        rotary_layers(hf),
        norm="layer",
        norm_scale=False,
        norm_eps=1e-5,
        clip_qkv=hf.clip_qkv,
        **biases(hf.attention_bias),
    )


def _olmo2(hf: Any) -> DecoderConfig:
    layers = rotary_layers(hf, getattr(hf, "layer_types", None), qk_norm=rms_qk_norm(hf, all_heads=True))
    return decoder(hf, layers, norm_placement="post", **biases(hf.attention_bias))


def _exaone4(hf: Any) -> DecoderConfig:
    no_rope = [hf.sliding_window is not None and kind != "sliding_attention" for kind in hf.layer_types]
    layers = rotary_layers(hf, hf.layer_types, no_rope=no_rope, qk_norm=rms_qk_norm(hf))
    return decoder(hf, layers, norm_placement="post")


def _nanochat(hf: Any) -> DecoderConfig:
    layers = rotary_layers(hf, qk_norm=rms_qk_norm(hf, scale=False, after_rope=True))
    return decoder(
        hf,
        [with_rope(layer, reverse=True) for layer in layers],
        norm_scale=False,
        embedding_norm=True,
        mlp_gated=False,
        logit_softcap=hf.final_logit_softcapping,
        **biases(hf.attention_bias),
    )


POST = llama_weights(POST_NORMS)
FAMILIES: dict[str, Family] = {
    "olmo": Family(_olmo),
    "olmo2": Family(_olmo2, POST),
    "olmo3": Family(_olmo2, POST),
    "exaone4": Family(_exaone4, POST),
    "nanochat": Family(_nanochat, llama_weights(PRE_NORMS, plain_mlp("mlp.fc1", "mlp.fc2"))),
}

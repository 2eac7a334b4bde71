"""GLM: rotates half of each head's channels, in neighbouring pairs."""

from __future__ import annotations

from typing import Any

from convert.families.base import Family, biases, decoder, rotary_layers
from convert.weights.parts import llama_weights, norm
from tide_jax.model.architecture import DecoderConfig


def _glm(hf: Any, **flags: Any) -> DecoderConfig:
    return decoder(hf, rotary_layers(hf, interleaved=True), **biases(hf.attention_bias, out=False), **flags)


def _glm4(hf: Any) -> DecoderConfig:
    return _glm(hf, norm_placement="sandwich")


GLM4_NORMS = {
    **norm("input_layernorm", "pre_attention_norm"),
    **norm("post_self_attn_layernorm", "post_attention_norm"),
    **norm("post_attention_layernorm", "pre_mlp_norm"),
    **norm("post_mlp_layernorm", "post_mlp_norm"),
}
FAMILIES: dict[str, Family] = {
    "glm": Family(_glm),
    "glm4": Family(_glm4, llama_weights(GLM4_NORMS), overflows_float16=True),
}

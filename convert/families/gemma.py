"""Gemma's lineage: norms with a unit offset, scaled embeddings, softcaps."""

from __future__ import annotations

from typing import Any

from convert.families.base import Family, biases, decoder, require, rms_qk_norm, rotary
from convert.weights.parts import SANDWICH_NORMS, llama_weights
from tide_jax.architecture import DecoderConfig


def _gemma3(hf: Any) -> DecoderConfig:
    require(hf, use_bidirectional_attention=False, attn_logit_softcapping=None)
    qk_norm = rms_qk_norm(hf, unit_offset=True)
    return decoder(
        hf,
        rotary(hf, hf.layer_types, hf.query_pre_attn_scalar**-0.5, qk_norm=qk_norm),
        norm_unit_offset=True,
        norm_placement="sandwich",
        embedding_scale=hf.hidden_size**0.5,
        logit_softcap=hf.final_logit_softcapping,
        **biases(hf.attention_bias),
    )


FAMILIES: dict[str, Family] = {
    "gemma3_text": Family(_gemma3, llama_weights(SANDWICH_NORMS)),
}

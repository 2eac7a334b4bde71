"""Llama and the families that differ from it by a flag or two."""

from __future__ import annotations

from typing import Any

from convert.families.base import Family, biases, decoder, rms_qk_norm, rotary, windowed
from tide_jax.architecture import DecoderConfig


def _llama(hf: Any) -> DecoderConfig:
    return decoder(hf, rotary(hf), mlp_bias=hf.mlp_bias, **biases(hf.attention_bias))


def _mistral(hf: Any) -> DecoderConfig:
    return decoder(hf, rotary(hf, windowed(hf)))


def _qwen2(hf: Any) -> DecoderConfig:
    return decoder(hf, rotary(hf, hf.layer_types), qkv_bias=True)


def _qwen3(hf: Any) -> DecoderConfig:
    return decoder(hf, rotary(hf, hf.layer_types, qk_norm=rms_qk_norm(hf)), **biases(hf.attention_bias))


FAMILIES: dict[str, Family] = {
    "llama": Family(_llama),
    "mistral": Family(_mistral),
    "qwen2": Family(_qwen2),
    "qwen3": Family(_qwen3),
}

"""Families with mixtures of experts and ordinary attention."""

from __future__ import annotations

from typing import Any

from convert.families.base import Family, decoder, rotary, windowed
from convert.weights.parts import MIXTRAL_EXPERTS, PRE_NORMS, llama_weights
from tide_jax.architecture import DecoderConfig, MoEConfig


def _mixtral(hf: Any) -> DecoderConfig:
    moe = MoEConfig(
        num_experts=hf.num_local_experts,
        experts_per_token=hf.num_experts_per_tok,
        intermediate_size=hf.intermediate_size,
    )
    return decoder(hf, rotary(hf, windowed(hf)), moe=moe)


FAMILIES: dict[str, Family] = {
    "mixtral": Family(_mixtral, llama_weights(PRE_NORMS, MIXTRAL_EXPERTS)),
}

"""MiniMax-01: lightning attention, and sublayers whose output is added to their scaled, normed input."""

from __future__ import annotations

import dataclasses
from typing import Any

from convert.families.base import Family, decoder, head_dim, require, rotary_layers, uniform_layer_types
from convert.families.mixtures import mixture
from convert.families.numbers import positive
from convert.families.recurrent import mixed
from convert.weights.parts import MIXTRAL_EXPERTS, OUTER_RULES, PRE_NORMS, llama_weights
from convert.weights.recurrent_parts import lightning
from convert.weights.rules import ignore
from tide_jax.model.architecture import AddScales, DecoderConfig
from tide_jax.model.recurrent.types import LightningType


def _minimax(hf: Any) -> DecoderConfig:
    require(hf, hidden_act="silu")
    kind = LightningType(heads=hf.num_attention_heads, head_dim=head_dim(hf))
    layers = mixed(hf, {"linear_attention": kind}, rotary_layers(hf, uniform_layer_types(hf)))
    return decoder(
        hf,
        [_fading(layer, i / (hf.num_hidden_layers - 1 + 1e-5)) for i, layer in enumerate(layers)],
        normed_residual=True,
        stream_scale=positive(hf, "full_attn_alpha_factor"),
        residual_scale=positive(hf, "full_attn_beta_factor"),
        recurrent_scales=_factors(hf, "linear_attn"),
        mlp_scales=_factors(hf, "mlp"),
        moe=mixture(hf, hf.num_local_experts),
    )


def _fading(layer: Any, depth: float) -> Any:
    """A layer's type with its rate of fading, which falls to almost nothing at a depth of 1."""
    return dataclasses.replace(layer, fade=1 - depth + 1e-5) if isinstance(layer, LightningType) else layer


def _factors(hf: Any, part: str) -> AddScales:
    return AddScales(*(positive(hf, f"{part}_{name}_factor") for name in ("alpha", "beta")))


MINIMAX = llama_weights(
    PRE_NORMS,
    lightning("self_attn"),
    MIXTRAL_EXPERTS,
    top=(
        *OUTER_RULES,
        ignore(
            r"(model\.)?layers\.\d+\.self_attn\.(slope_rate|(query|key|diagonal)_decay)",
            "how fast heads fade is computed from the configuration",
        ),
    ),
)
FAMILIES: dict[str, Family] = {"minimax": Family(_minimax, MINIMAX)}

"""RecurrentGemma: Griffin (De et al. 2024, arXiv:2402.19427) with Gemma's norms, embedding scale and softcap."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from convert.families.base import Family, biases, decoder, rotary_layers
from convert.families.numbers import count, share
from convert.families.recurrent import NO_LIMIT, attention_kinds, mixed
from convert.weights.parts import attention, layer_rules, mlp, norm, outer_rules
from convert.weights.recurrent_parts import rg_lru
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.recurrent.types import RgLruType


def _recurrent_gemma(hf: Any) -> DecoderConfig:
    kind = RgLruType(
        blocks=hf.num_attention_heads,
        block_dim=share(hf, "lru_width", "num_attention_heads"),
        width=count(hf, "conv1d_width"),
        activation=hf.hidden_activation,
    )
    return decoder(
        hf,
        mixed(hf, {"linear_attention": kind}, rotary_layers(hf, attention_kinds(hf))),
        intermediate_size=hf.intermediate_size // 2,
        max_positions=NO_LIMIT,
        norm_unit_offset=True,
        mlp_bias=True,
        embedding_scale=float(jnp.bfloat16(hf.hidden_size**0.5)),  # transformers rounds it in every dtype
        logit_softcap=hf.logits_soft_cap,
        **biases(hf.attention_bias, out=True),
    )


GRIFFIN = (
    *outer_rules("[model.]embed_tokens", "[model.]final_norm"),
    *layer_rules(
        "[model.]layers",
        norm("temporal_pre_norm", "pre_attention_norm"),
        attention("temporal_block", out="o_proj"),
        rg_lru("temporal_block"),
        norm("channel_pre_norm", "pre_mlp_norm"),
        mlp("mlp_block", "mlp"),
    ),
)
FAMILIES: dict[str, Family] = {"recurrent_gemma": Family(_recurrent_gemma, GRIFFIN)}

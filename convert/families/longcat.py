"""LongCat-Flash (Meituan 2025, arXiv:2509.01322): two attentions and two MLPs in a layer, and experts beside them.

One of its layers is two of the model's. The experts run in the first and their output is added by the second.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from convert.families.base import Family
from convert.families.latent import latent_decoder, latent_rotary_layers
from convert.families.mixtures import WITHOUT_MTP, mixture
from convert.families.numbers import count, positive
from convert.weights.parts import experts, in_module, latent_attention, layer_rules, linear, mlp, norm
from convert.weights.rules import Rule, Target
from tide_jax.model.architecture import DecoderConfig


def _longcat_flash(hf: Any) -> DecoderConfig:
    moe = mixture(
        hf,
        hf.n_routed_experts,
        zero_experts=hf.zero_expert_num or 0,
        layers=tuple(range(0, hf.num_hidden_layers, 2)),
        renormalise=False,
        scale=positive(hf, "routed_scaling_factor"),
        correction="score",
    )
    config = latent_decoder(hf, latent_rotary_layers(hf, interleaved=True), moe=moe, carried="shortcut")
    assert config.latent is not None
    latent = dataclasses.replace(
        config.latent,
        q_scale=(hf.hidden_size / count(hf, "q_lora_rank")) ** 0.5,
        kv_scale=(hf.hidden_size / count(hf, "kv_lora_rank")) ** 0.5,
    )
    return dataclasses.replace(config, latent=latent)


def _half(number: int) -> tuple[Rule, ...]:
    """Rules for one of the two attentions with its MLP."""
    return layer_rules(
        "[model.]layers",
        latent_attention(f"self_attn.{number}"),
        mlp(f"mlps.{number}", "mlp"),
        norm(f"input_layernorm.{number}", "pre_attention_norm"),
        norm(f"post_attention_layernorm.{number}", "pre_mlp_norm"),
        place=lambda layer: 2 * layer + number,
    )


_EXPERTS = in_module(
    "shortcut",
    {
        **linear("mlp.router.classifier", "mlp.router"),
        "mlp.router.e_score_correction_bias": (Target("mlp.correction"),),
        **experts("mlp.experts"),
    },
)
LONGCAT = (
    *WITHOUT_MTP,
    Rule(
        r"model\.layers\.\d+\.mlp\.experts\.(?P<expert>\d+)\..*",
        reason="experts that return the token as it is have no weights",
        blank=True,
        past="expert",
    ),
    *_half(0),
    *_half(1),
    *layer_rules("[model.]layers", _EXPERTS, place=lambda layer: 2 * layer),
)
FAMILIES: dict[str, Family] = {"longcat_flash": Family(_longcat_flash, LONGCAT)}

"""Granite and relatives: multipliers on embeddings, residuals, attention scores and logits (Yang et al. 2022, muP)."""

from __future__ import annotations

from typing import Any

from convert.families.base import Family, biases, decoder, layers_without_rope, rotary_layers, with_rope
from convert.families.mixtures import mixture
from convert.families.recurrent import attention_kinds, mamba2_of, mixed
from convert.weights import takes
from convert.weights.parts import PRE_NORMS, layer_rules, linear, llama_weights, norm
from convert.weights.recurrent_parts import state_space
from convert.weights.rules import Target
from tide_jax.model.architecture import DecoderConfig


def _scaled_decoder(hf: Any, layers: list[Any], logit_scale: float, **flags: Any) -> DecoderConfig:
    return decoder(
        hf,
        layers,
        embedding_scale=hf.embedding_multiplier,
        residual_scale=hf.residual_multiplier,
        logit_scale=logit_scale,
        mlp_bias=getattr(hf, "mlp_bias", False),
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


def _granitemoe(hf: Any) -> DecoderConfig:
    return _granite_mixture(hf, rotary_layers(hf, scale=hf.attention_multiplier))


def _granitemoe_swa(hf: Any) -> DecoderConfig:
    thetas = hf.layer_rope_theta
    no_rope = [not theta for theta in thetas]
    layers = rotary_layers(hf, hf.layer_types, hf.attention_multiplier, no_rope=no_rope, sinks=True)
    return _granite_mixture(
        hf, [with_rope(a, theta=float(theta)) if theta else a for a, theta in zip(layers, thetas, strict=True)]
    )


def _granitemoehybrid(hf: Any) -> DecoderConfig:
    """Granite 4.0. In models without experts, the shared MLP is the only MLP."""
    scale, kinds = hf.attention_multiplier, attention_kinds(hf)
    rotated = hf.position_embedding_type == "rope"
    attention = rotary_layers(hf, kinds, scale) if rotated else layers_without_rope(hf, scale)
    layers = mixed(hf, {"linear_attention": mamba2_of(hf)}, attention)
    flags = {} if rotated else {"positions": "none"}
    if not hf.num_local_experts:
        return _scaled_decoder(
            hf, layers, 1 / hf.logits_scaling, intermediate_size=hf.shared_intermediate_size, **flags
        )
    return _granite_mixture(hf, layers, **flags)


def _granite_mixture(hf: Any, layers: list[Any], **flags: Any) -> DecoderConfig:
    shared = getattr(hf, "shared_intermediate_size", 0)
    return _scaled_decoder(
        hf, layers, 1 / hf.logits_scaling, moe=mixture(hf, hf.num_local_experts, shared_size=shared), **flags
    )


GRANITE_EXPERTS = {
    **linear("block_sparse_moe.router.layer", "mlp.router"),
    "block_sparse_moe.input_linear.weight": (Target("mlp.experts.gate_up", takes.stacked_halves),),
    "block_sparse_moe.output_linear.weight": (Target("mlp.experts.down", takes.transpose),),
    **linear("block_sparse_moe.router", "mlp.router"),
    "block_sparse_moe.experts.gate_up_proj": (Target("mlp.experts.gate_up", takes.stacked_halves),),
    "block_sparse_moe.experts.down_proj": (Target("mlp.experts.down", takes.transpose),),
}
GRANITE_SHARED = {
    **linear("shared_mlp.input_linear", "mlp.shared.gate_up", takes.halves),
    **linear("shared_mlp.output_linear", "mlp.shared.down"),
}
GRANITE_DENSE = {
    **linear("shared_mlp.input_linear", "mlp.gate_up", takes.halves),
    **linear("shared_mlp.output_linear", "mlp.down"),
}
GRANITE = llama_weights(PRE_NORMS, GRANITE_EXPERTS, GRANITE_SHARED)
GRANITE_HYBRID = (
    *llama_weights(PRE_NORMS, GRANITE_EXPERTS, state_space("mamba")),
    *layer_rules("[model.]layers", GRANITE_SHARED, when=lambda config: config.moe is not None),
    *layer_rules("[model.]layers", GRANITE_DENSE, when=lambda config: config.moe is None),
)
HYPERCLOVAX = llama_weights(
    PRE_NORMS, {**norm("post_norm1", "post_attention_norm"), **norm("post_norm2", "post_mlp_norm")}
)
FAMILIES: dict[str, Family] = {
    "granite": Family(_granite),
    "granite_swa": Family(_granite_swa),
    "granitemoe": Family(_granitemoe, GRANITE),
    "granitemoeshared": Family(_granitemoe, GRANITE),
    "granitemoe_swa": Family(_granitemoe_swa, GRANITE),
    "granitemoehybrid": Family(_granitemoehybrid, GRANITE_HYBRID),
    "hyperclovax": Family(_hyperclovax, HYPERCLOVAX),
}

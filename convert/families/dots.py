"""dots3, whose kinds of layers have latent attention of different shapes."""

from __future__ import annotations

from typing import Any

from convert.configuration.rope import rope_config
from convert.families.base import Family, biases, decoder
from convert.families.latent import WITHOUT_INDEXER, without_indexer
from convert.families.mixtures import WITHOUT_MTP, marked_sparse_layers, sigmoid_mixture
from convert.weights import takes
from convert.weights.parts import LATENT_ATTENTION, PRE_NORMS, Names, layer_rules, linear, llama_weights, norm
from convert.weights.rules import Rule, Target
from tide_jax.model.architecture import AttentionType, DecoderConfig, LatentConfig


def _attention(hf: Any, layer: int, kind: str) -> AttentionType:
    own = hf.per_layer_config[layer]
    return AttentionType(
        scale=(own.qk_nope_head_dim + own.qk_rope_head_dim) ** -0.5,
        window=hf.sliding_window if kind == "sliding_attention" else None,
        rope=rope_config(hf, own.qk_rope_head_dim, kind, interleaved=True),
        num_heads=own.num_attention_heads,
        latent=LatentConfig(
            kv_rank=own.kv_lora_rank,
            q_rank=own.q_lora_rank,
            nope_dim=own.qk_nope_head_dim,
            rope_dim=own.qk_rope_head_dim,
            value_dim=own.v_head_dim,
            norm_eps=hf.rms_norm_eps,
            q_scale=(hf.hidden_size / own.q_lora_rank) ** 0.5,
            kv_scale=(hf.hidden_size / own.kv_lora_rank) ** 0.5,
            key_norm=True,
        ),
    )


def _dots3_note(hf: Any) -> DecoderConfig:
    layers = [_attention(hf, layer, kind) for layer, kind in enumerate(hf.layer_types)]
    shared = hf.shared_experts_intermediate_size * hf.n_shared_experts
    config = decoder(
        hf.per_layer_config[0],
        layers,
        latent=layers[0].latent,
        attention_gate="head",
        moe=sigmoid_mixture(hf, hf.n_routed_experts, layers=marked_sparse_layers(hf), shared_size=shared),
        **biases(hf.attention_bias),
    )
    return without_indexer(hf, config) if "indexed_attention" in hf.layer_types else config


def _heads_of_type(number: int) -> tuple[Rule, ...]:
    """Rules for what depends on the heads of layers that have the configuration's attention type of a number."""
    keys, values = takes.of_type(number, takes.latent_keys), takes.of_type(number, takes.latent_values)
    return layer_rules(
        "model.layers",
        linear("self_attn.q_b_proj", "attention.q", takes.of_type(number, takes.query_heads)),
        {
            "self_attn.kv_b_proj.weight": (
                Target("attention.k_up.kernel", keys),
                Target("attention.v_up.kernel", values),
            )
        },
        linear("self_attn.o_proj", "attention.out", takes.of_type(number, takes.query_heads_in)),
        layers=lambda config: [i for i, found in enumerate(config.layer_pattern) if found == number],
    )


_SAME_IN_ALL: Names = {
    name: targets
    for name, targets in LATENT_ATTENTION.items()
    if not name.startswith(("self_attn.q_b_proj", "self_attn.kv_b_proj", "self_attn.o_proj"))
}
DOTS3 = (
    *llama_weights(
        PRE_NORMS,
        norm("self_attn.k_rope_only_layernorm", "attention.key_norm"),
        linear("self_attn.g_proj", "attention.gate", takes.attention_gate),
        attention=_SAME_IN_ALL,
        top=WITHOUT_MTP,
    ),
    *_heads_of_type(0),
    *_heads_of_type(1),
    WITHOUT_INDEXER,
)
FAMILIES: dict[str, Family] = {"dots3_note_text": Family(_dots3_note, DOTS3)}

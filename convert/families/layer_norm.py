"""Families with LayerNorm and rotary embedding: between the GPT lineage and Llama."""

from __future__ import annotations

from typing import Any

from convert.families.base import (
    Family,
    biases,
    decoder,
    norm_eps,
    plain_layer_norm,
    rotary_layers,
    uniform_layer_types,
)
from convert.families.llama import UNGATED
from convert.weights import takes
from convert.weights.parts import (
    PRE_NORMS,
    attention,
    embedding_norm_rules,
    fused_qkv,
    layer_rules,
    linear,
    llama_weights,
    norm,
    outer_rules,
    plain_mlp,
)
from convert.weights.rules import Target, move
from tide_jax.model.architecture import DecoderConfig, HeadTransform, QKNorm

_Q, _KV = 0, slice(1, 3)


def _nemotron(hf: Any) -> DecoderConfig:
    return _jais2(hf, norm_unit_offset=True)


def _jais2(hf: Any, **flags: Any) -> DecoderConfig:
    flags = plain_layer_norm(mlp_bias=hf.mlp_bias, **biases(hf.attention_bias), **flags)
    return decoder(hf, rotary_layers(hf), **flags)


def _starcoder2(hf: Any) -> DecoderConfig:
    return decoder(
        hf,
        rotary_layers(hf, uniform_layer_types(hf)),
        **plain_layer_norm(mlp_bias=hf.use_bias, **biases(hf.use_bias)),
    )


def _persimmon(hf: Any) -> DecoderConfig:
    qk_norm = QKNorm(kind="layer", eps=norm_eps(hf), bias=True) if hf.qk_layernorm else None
    return decoder(hf, rotary_layers(hf, qk_norm=qk_norm), **plain_layer_norm())


def _stablelm(hf: Any) -> DecoderConfig:
    qk_norm = QKNorm(kind="layer", eps=norm_eps(hf), per_head=True) if hf.qk_layernorm else None
    return decoder(
        hf,
        rotary_layers(hf, qk_norm=qk_norm),
        norm="layer",
        norm_bias=True,
        parallel_residual=hf.use_parallel_residual,
        shared_norm=hf.use_parallel_residual,
        qkv_bias=hf.use_qkv_bias,
    )


def _modernbert(hf: Any) -> DecoderConfig:
    return decoder(
        hf,
        rotary_layers(hf, hf.layer_types),
        norm="layer",
        norm_bias=hf.norm_bias,
        embedding_norm=True,
        first_norm=False,
        mlp_bias=hf.mlp_bias,
        head_transform=HeadTransform(hf.classifier_activation, bias=hf.classifier_bias),
        head_bias=hf.decoder_bias,
        **biases(hf.attention_bias),
    )


PERSIMMON = llama_weights(
    PRE_NORMS,
    fused_qkv("self_attn.query_key_value", takes.fused_by_head(_Q), takes.fused_by_head(_KV)),
    plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    top=outer_rules("[model.]embed_tokens", "[model.]final_layernorm"),
)
STABLELM = llama_weights(
    PRE_NORMS,
    {
        f"self_attn.{side}_layernorm.norms.{{head}}.weight": (Target(f"attention.{side}_norm.scale", slot="{head}"),)
        for side in ("q", "k")
    },
)
MODERNBERT = (
    *outer_rules("[model.]embeddings.tok_embeddings", "[model.]final_norm", "decoder"),
    *embedding_norm_rules("[model.]embeddings.norm"),
    move("lm_head.dense.weight", Target("head_transform.dense.kernel", takes.transpose)),
    move("lm_head.dense.bias", Target("head_transform.dense.bias")),
    move("lm_head.norm.weight", Target("head_transform.norm.scale")),
    move("lm_head.norm.bias", Target("head_transform.norm.bias")),
    *layer_rules(
        "[model.]layers",
        norm("attn_norm", "pre_attention_norm"),
        norm("mlp_norm", "pre_mlp_norm"),
        attention("attn", out="Wo"),
        linear("mlp.Wi", "mlp.gate_up", takes.halves, takes.halves),
        linear("mlp.Wo", "mlp.down"),
    ),
)
FAMILIES: dict[str, Family] = {
    "nemotron": Family(_nemotron, UNGATED),
    "jais2": Family(_jais2, UNGATED),
    "starcoder2": Family(_starcoder2, llama_weights(PRE_NORMS, plain_mlp("mlp.c_fc", "mlp.c_proj"))),
    "persimmon": Family(_persimmon, PERSIMMON),
    "stablelm": Family(_stablelm, STABLELM),
    "modernbert-decoder": Family(_modernbert, MODERNBERT),
}

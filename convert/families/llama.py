"""Llama and families that differ by few flags: RMS norms before each sublayer, rotary embedding."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from convert.families.base import (
    Family,
    biases,
    decoder,
    require,
    rms_qk_norm,
    rotary_layers,
    static_ntk,
    uniform_layer_types,
)
from convert.weights import takes
from convert.weights.parts import PRE_NORMS, attention, layer_rules, linear, llama_weights, norm, outer_rules, plain_mlp
from convert.weights.rules import Target, ignore
from tide_jax.errors import TideError
from tide_jax.model.architecture import DecoderConfig, QueryScaling


def _llama(hf: Any) -> DecoderConfig:
    return decoder(hf, rotary_layers(hf), mlp_bias=hf.mlp_bias, **biases(hf.attention_bias))


def _arcee(hf: Any) -> DecoderConfig:
    return dataclasses.replace(_llama(hf), mlp_gated=False)


def _seed_oss(hf: Any) -> DecoderConfig:
    return decoder(hf, rotary_layers(hf), mlp_bias=hf.mlp_bias, **biases(hf.attention_bias, out=hf.attention_out_bias))


def _smollm3(hf: Any) -> DecoderConfig:
    no_rope = [not rotated for rotated in hf.no_rope_layers]
    kinds = rotary_layers(hf, hf.layer_types, no_rope=no_rope)
    return decoder(hf, kinds, mlp_bias=hf.mlp_bias, **biases(hf.attention_bias))


def _helium(hf: Any) -> DecoderConfig:
    kinds = rotary_layers(hf, interleaved=True)
    return decoder(hf, kinds, mlp_bias=hf.mlp_bias, **biases(hf.attention_bias, out=False))


def _ernie4_5(hf: Any) -> DecoderConfig:
    return decoder(hf, rotary_layers(hf, interleaved=True), mlp_bias=bool(hf.use_bias), **biases(bool(hf.use_bias)))


def _mistral(hf: Any) -> DecoderConfig:
    return decoder(hf, rotary_layers(hf, uniform_layer_types(hf)))


def _ministral(hf: Any) -> DecoderConfig:
    return decoder(hf, rotary_layers(hf, hf.layer_types))


def _ministral3(hf: Any) -> DecoderConfig:
    settings = hf.rope_parameters
    beta, period = settings.get("llama_4_scaling_beta"), settings.get("original_max_position_embeddings")
    scaling = QueryScaling(float(beta), float(period)) if beta and period else None
    return decoder(hf, rotary_layers(hf, uniform_layer_types(hf), query_scaling=scaling))


def _cwm(hf: Any) -> DecoderConfig:
    return decoder(hf, rotary_layers(hf, hf.layer_types), mlp_bias=hf.mlp_bias)


def _qwen2(hf: Any) -> DecoderConfig:
    return decoder(hf, rotary_layers(hf, hf.layer_types), qkv_bias=True)


def _qwen3(hf: Any) -> DecoderConfig:
    return decoder(
        hf, rotary_layers(hf, getattr(hf, "layer_types", None), qk_norm=rms_qk_norm(hf)), **biases(hf.attention_bias)
    )


def _hunyuan(hf: Any) -> DecoderConfig:
    kinds = static_ntk(hf, rotary_layers(hf, qk_norm=rms_qk_norm(hf, after_rope=True)))
    return decoder(hf, kinds, **biases(hf.attention_bias))


def _apertus(hf: Any) -> DecoderConfig:
    return decoder(hf, rotary_layers(hf, qk_norm=rms_qk_norm(hf)), mlp_gated=False, **biases(hf.attention_bias))


def _diffllama(hf: Any) -> DecoderConfig:
    if hf.num_key_value_heads % 2:
        raise TideError(
            f"diffllama with num_key_value_heads={hf.num_key_value_heads} is not supported, only an even number"
        )
    initial = [0.8 - 0.6 * math.exp(-0.3 * layer) for layer in range(hf.num_hidden_layers)]
    kinds = [dataclasses.replace(kind, differential=d) for kind, d in zip(rotary_layers(hf), initial, strict=True)]
    return decoder(hf, kinds, **biases(hf.attention_bias))


def _doge(hf: Any) -> DecoderConfig:
    require(hf, is_moe=False)  # its router mixes the tokens of a batch
    return decoder(
        hf,
        rotary_layers(hf, uniform_layer_types(hf), qk_norm=rms_qk_norm(hf), dynamic_mask=True),
        # longer contexts mask some keys depending on their content
        max_positions=min(hf.max_position_embeddings, hf.keep_window_size),
        residual_weights=True,
        mlp_bias=hf.mlp_bias,
        **biases(hf.attention_bias),
    )


def _moshi(hf: Any) -> DecoderConfig:
    # transformers' window only shortens the cache; up to that length both ways to run a text agree
    positions = min(hf.max_position_embeddings, hf.sliding_window or hf.max_position_embeddings)
    return decoder(hf, rotary_layers(hf), intermediate_size=hf.ffn_dim // 2, max_positions=positions, extra_tokens=1)


def _bitnet(hf: Any) -> DecoderConfig:
    return decoder(hf, rotary_layers(hf), sub_norm=True, **biases(hf.attention_bias))


UNGATED = llama_weights(PRE_NORMS, plain_mlp("mlp.up_proj", "mlp.down_proj"))
APERTUS = llama_weights(
    {**norm("attention_layernorm", "pre_attention_norm"), **norm("feedforward_layernorm", "pre_mlp_norm")},
    plain_mlp("mlp.up_proj", "mlp.down_proj"),
    {
        f"mlp.act_fn.{name}": (Target(f"mlp.act.{name}", takes.one_element_vector),)
        for name in ("alpha_p", "alpha_n", "beta", "eps")
    },
)
BITNET = llama_weights(
    PRE_NORMS,
    norm("self_attn.attn_sub_norm", "attention.sub_norm", takes.heads_bias),
    norm("mlp.ffn_sub_norm", "mlp.sub_norm"),
)
DIFFLLAMA = llama_weights(
    PRE_NORMS,
    {
        f"self_attn.lambda_{side}{half + 1}": (Target("attention.weights", slot=f"{half}, {i}"),)
        for half in (0, 1)
        for i, side in enumerate("qk")
    },
)
DOGE = llama_weights(
    PRE_NORMS,
    linear("self_attn.dt_proj", "attention.score"),
    {
        "self_attn.A": (Target("attention.strength"),),
        "input_residual": (Target("attention_residual"),),
        "post_attention_residual": (Target("mlp_residual"),),
    },
)
MOSHI = (
    *outer_rules("[decoder.][model.]embed_tokens", "[decoder.][model.]norm", "[decoder.]lm_head"),
    ignore(r"(embed_tokens\.\d+|depth_decoder|audio_encoder)\..*", "belongs to the audio streams"),
    *layer_rules(
        "[decoder.][model.]layers",
        PRE_NORMS,
        attention("self_attn", "q_proj.linear", "k_proj.linear", "v_proj.linear", "o_proj.linear"),
        linear("mlp.fc1", "mlp.gate_up", takes.halves),
        linear("mlp.fc2", "mlp.down"),
    ),
)
PHI4_MULTIMODAL = (
    *llama_weights(),
    ignore(r"model\.embed_tokens_extend\..*", "reads images and sound, which are left out"),
)
FAMILIES: dict[str, Family] = {
    "llama": Family(_llama),
    "iquestcoder": Family(_llama),
    "internlm3": Family(_llama),
    "emu3_text_model": Family(_llama),
    "arcee": Family(_arcee, UNGATED),
    "seed_oss": Family(_seed_oss),
    "smollm3": Family(_smollm3),
    "helium": Family(_helium),
    "ernie4_5": Family(_ernie4_5),
    "mistral": Family(_mistral),
    "ministral": Family(_ministral),
    "ministral3": Family(_ministral3),
    "cwm": Family(_cwm),
    "phi3": Family(_mistral),
    "phi4_multimodal": Family(_mistral, PHI4_MULTIMODAL),
    "qwen2": Family(_qwen2),
    "qwen3": Family(_qwen3),
    # Text decoders of multimodal models: on text, their three-dimensional rotary embedding equals the ordinary one.
    "qwen2_vl_text": Family(_qwen2),
    "qwen2_5_vl_text": Family(_qwen2),
    "qwen3_vl_text": Family(_qwen3),
    "hunyuan_v1_dense": Family(_hunyuan),
    "apertus": Family(_apertus, APERTUS),
    "bitnet": Family(_bitnet, BITNET),
    "doge": Family(_doge, DOGE),
    "moshi": Family(_moshi, MOSHI),
    "diffllama": Family(_diffllama, DIFFLLAMA),
}

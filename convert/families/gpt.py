"""The GPT lineage: LayerNorm, MLPs without a gate, biases, and absolute positions or early rotary embeddings."""

from __future__ import annotations

import dataclasses
from typing import Any

from convert.families import alibi, opt
from convert.families.base import (
    Family,
    biases,
    decoder,
    head_dim,
    layers_without_rope,
    learned_positions,
    plain_layer_norm,
    require,
    rotary_layers,
)
from convert.weights import takes
from convert.weights.parts import (
    PRE_NORMS,
    Names,
    attention,
    fused_qkv,
    ignore_sinusoidal_table,
    layer_rules,
    linear,
    norm,
    outer_rules,
    plain_mlp,
)
from convert.weights.rules import Rule, Target, ignore, move
from tide_jax.errors import TideError
from tide_jax.model.architecture import AttentionType, DecoderConfig, RopeConfig

_Q, _KV = 0, slice(1, 3)


def _mlp_width(hf: Any) -> int:
    return hf.n_inner or 4 * hf.hidden_size


def _gpt2(hf: Any) -> DecoderConfig:
    require(hf, add_cross_attention=False)
    scale = head_dim(hf) ** -0.5 if hf.scale_attn_weights else 1.0
    scale_by_layer = getattr(hf, "scale_attn_by_inverse_layer_idx", False)
    return decoder(
        hf,
        [AttentionType(scale=scale / (i + 1) if scale_by_layer else scale) for i in range(hf.num_hidden_layers)],
        intermediate_size=_mlp_width(hf),
        **learned_positions(hf.max_position_embeddings),
        **plain_layer_norm(),
    )


def _openai_gpt(hf: Any) -> DecoderConfig:
    return decoder(
        hf,
        layers_without_rope(hf),
        intermediate_size=4 * hf.hidden_size,
        activation="gelu_new" if hf.afn == "gelu" else hf.afn,
        norm_placement="residual",
        final_norm=False,
        **learned_positions(hf.max_position_embeddings),
        **plain_layer_norm(),
    )


def _gpt_neo(hf: Any) -> DecoderConfig:
    if unknown := set(hf.attention_layers) - {"global", "local"}:
        raise TideError(f"gpt_neo with layer type {', '.join(sorted(unknown))} is not supported, only global and local")
    windows = [hf.window_size if kind == "local" else None for kind in hf.attention_layers]
    return decoder(
        hf,
        [AttentionType(scale=1.0, window=window) for window in windows],
        intermediate_size=hf.intermediate_size or 4 * hf.hidden_size,
        **learned_positions(hf.max_position_embeddings),
        **plain_layer_norm(**biases(False, out=True)),
    )


def _gptj(hf: Any) -> DecoderConfig:
    if not hf.rotary_dim:
        raise TideError(
            f"{hf.model_type} with rotary_dim={hf.rotary_dim!r} is not supported, only a number of channels"
        )
    rope = RopeConfig(theta=10000.0, rotary_dim=hf.rotary_dim, interleaved=True)
    return decoder(
        hf,
        layers_without_rope(hf, rope=rope),
        intermediate_size=_mlp_width(hf),
        parallel_residual=True,
        shared_norm=True,
        head_bias=True,
        **plain_layer_norm(**biases(False)),
    )


def _gpt_neox(hf: Any) -> DecoderConfig:
    return decoder(
        hf,
        rotary_layers(hf),
        parallel_residual=hf.use_parallel_residual,
        **plain_layer_norm(**biases(hf.attention_bias)),
    )


def _gpt_neox_japanese(hf: Any) -> DecoderConfig:
    *body, last = rotary_layers(hf)
    return decoder(
        hf,
        [*body, dataclasses.replace(last, out_bias=True)],
        intermediate_size=int(hf.hidden_size * hf.intermediate_multiple_size),
        **plain_layer_norm(mlp_bias=False, **biases(False)),
    )


def _ctrl(hf: Any) -> DecoderConfig:
    require(hf, layer_norm_epsilon=1e-6)  # what its layers use, whatever the configuration says of the final norm
    return decoder(
        hf,
        layers_without_rope(hf),
        intermediate_size=hf.dff,
        activation="relu",
        positions="sinusoidal",
        embedding_scale=hf.hidden_size**0.5,
        head_bias=True,
        **plain_layer_norm(),
    )


def _conv1d_mlp(up: str, down: str) -> Names:
    """GPT-2's Conv1D weights are [in, out] already."""
    return {
        f"{up}.weight": (Target("mlp.up.kernel"),),
        f"{up}.bias": (Target("mlp.up.bias"),),
        f"{down}.weight": (Target("mlp.down.kernel"),),
        f"{down}.bias": (Target("mlp.down.bias"),),
    }


_CAUSAL_MASK = ignore(
    r"(\w+\.)?(h|layers)\.\d+\.(attn|attention)\.(attention\.)?(bias|masked_bias|causal_mask)",
    "a causal mask",
)
_POSITIONS = move("[transformer.]wpe.weight", Target("positions.kernel"))
_TOP = (*outer_rules("[transformer.]wte", "[transformer.]ln_f"), _POSITIONS, _CAUSAL_MASK)
_LN: Names = {**norm("ln_1", "pre_attention_norm"), **norm("ln_2", "pre_mlp_norm")}
_CONV1D: Names = {
    **fused_qkv("attn.c_attn", takes.blocks(3, _Q), takes.blocks(3, _KV)),
    **linear("attn.c_proj", "attention.out", takes.conv1d_in),
    **_conv1d_mlp("mlp.c_fc", "mlp.c_proj"),
}
GPT2 = (*_TOP, *layer_rules("[transformer.]h", _LN, _CONV1D))
OPENAI_GPT = (
    *outer_rules("[transformer.]tokens_embed", "[transformer.]ln_f"),
    move("[transformer.]positions_embed.weight", Target("positions.kernel")),
    _CAUSAL_MASK,
    *layer_rules("[transformer.]h", norm("ln_1", "post_attention_norm"), norm("ln_2", "post_mlp_norm"), _CONV1D),
)
GPT_BIGCODE = (
    *_TOP,
    *layer_rules(
        "[transformer.]h",
        _LN,
        fused_qkv("attn.c_attn", takes.grouped_q, takes.grouped_kv),
        linear("attn.c_proj", "attention.out", takes.heads_in),
        plain_mlp("mlp.c_fc", "mlp.c_proj"),
    ),
)
GPT_NEO = (
    *_TOP,
    *layer_rules("[transformer.]h", _LN, attention("attn.attention"), plain_mlp("mlp.c_fc", "mlp.c_proj")),
)
_CODEGEN_QKV: Names = {
    "attn.qkv_proj.weight": (
        Target("attention.q.kernel", takes.codegen_blocks(0)),
        Target("attention.kv.kernel", takes.codegen_blocks(2), ":, :, 0"),
        Target("attention.kv.kernel", takes.codegen_blocks(1), ":, :, 1"),
    )
}
GPTJ = (
    *_TOP,
    *layer_rules("[transformer.]h", _LN, attention("attn"), _CODEGEN_QKV, plain_mlp("mlp.fc_in", "mlp.fc_out")),
)


def _gpt_neox_weights(prefix: str) -> tuple[Rule, ...]:
    return (
        *outer_rules(f"[{prefix}.]embed_in", f"[{prefix}.]final_layer_norm", "embed_out"),
        _CAUSAL_MASK,
        *layer_rules(
            f"[{prefix}.]layers",
            PRE_NORMS,
            fused_qkv("attention.query_key_value", takes.fused_by_head(_Q), takes.fused_by_head(_KV)),
            linear("attention.dense", "attention.out", takes.heads_in),
            {"attention.dense_bias": (Target("attention.out.bias"),)},
            plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        ),
    )


CTRL = (
    *outer_rules("[transformer.]w", "[transformer.]layernorm"),
    ignore_sinusoidal_table("[transformer.]pos_encoding"),
    *layer_rules(
        "[transformer.]h",
        norm("layernorm1", "pre_attention_norm"),
        norm("layernorm2", "pre_mlp_norm"),
        attention("multi_head_attention", "Wq", "Wk", "Wv", "dense"),
        plain_mlp("ffn.0", "ffn.2"),
    ),
)
FAMILIES: dict[str, Family] = {
    "gpt2": Family(_gpt2, GPT2),
    "gpt-sw3": Family(_gpt2, GPT2),
    "openai-gpt": Family(_openai_gpt, OPENAI_GPT),
    "gpt_bigcode": Family(_gpt2, GPT_BIGCODE),
    "gpt_neo": Family(_gpt_neo, GPT_NEO),
    "gptj": Family(_gptj, GPTJ),
    "codegen": Family(_gptj, GPTJ),
    "gpt_neox": Family(_gpt_neox, _gpt_neox_weights("gpt_neox")),
    "gpt_neox_japanese": Family(_gpt_neox_japanese, _gpt_neox_weights("gpt_neox_japanese")),
    "ctrl": Family(_ctrl, CTRL),
    **alibi.FAMILIES,
    **opt.FAMILIES,
}

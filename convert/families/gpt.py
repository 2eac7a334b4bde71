"""The GPT lineage: LayerNorm, plain MLPs, biases, absolute positions or early rotary embeddings."""

from __future__ import annotations

from typing import Any

from convert.families.base import Family, biases, decoder, head_dim, plain_layer_norm, require, rotary
from convert.rules import Target, ignore, move
from convert.weights import takes
from convert.weights.parts import PRE_NORMS, fused_qkv, layers, linear, norm, outside, plain_mlp
from tide_jax.architecture import AttentionType, DecoderConfig

_Q, _KV = 0, slice(1, 3)


def _gpt2(hf: Any) -> DecoderConfig:
    require(hf, add_cross_attention=False)
    scale = head_dim(hf) ** -0.5 if hf.scale_attn_weights else 1.0
    by_layer = hf.scale_attn_by_inverse_layer_idx
    return decoder(
        hf,
        [AttentionType(scale=scale / (i + 1) if by_layer else scale) for i in range(hf.num_hidden_layers)],
        intermediate_size=hf.n_inner or 4 * hf.hidden_size,
        positions="learned",
        learned_positions=hf.max_position_embeddings,
        num_kv_heads=hf.num_attention_heads,
        **plain_layer_norm(),
    )


def _gpt_neox(hf: Any) -> DecoderConfig:
    return decoder(
        hf,
        rotary(hf),
        parallel_residual=hf.use_parallel_residual,
        num_kv_heads=hf.num_attention_heads,
        **plain_layer_norm(**biases(hf.attention_bias)),
    )


GPT2 = (
    *outside("[transformer.]wte", "[transformer.]ln_f"),
    move("[transformer.]wpe.weight", Target("positions.kernel")),
    ignore(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", "a causal mask"),
    *layers(
        "[transformer.]h",
        norm("ln_1", "pre_attention_norm"),
        norm("ln_2", "pre_mlp_norm"),
        fused_qkv("attn.c_attn", takes.blocks(3, _Q), takes.blocks(3, _KV)),
        linear("attn.c_proj", "attention.out", takes.conv1d_in),
        {
            "mlp.c_fc.weight": (Target("mlp.up.kernel"),),
            "mlp.c_fc.bias": (Target("mlp.up.bias"),),
            "mlp.c_proj.weight": (Target("mlp.down.kernel"),),
            "mlp.c_proj.bias": (Target("mlp.down.bias"),),
        },
    ),
)
GPT_NEOX = (
    *outside("[gpt_neox.]embed_in", "[gpt_neox.]final_layer_norm", "embed_out"),
    ignore(r"(gpt_neox\.)?layers\.\d+\.attention\.(masked_)?bias", "a causal mask"),
    *layers(
        "[gpt_neox.]layers",
        PRE_NORMS,
        fused_qkv("attention.query_key_value", takes.interleaved(_Q), takes.interleaved(_KV)),
        linear("attention.dense", "attention.out", takes.heads_in),
        plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
)
FAMILIES: dict[str, Family] = {
    "gpt2": Family(_gpt2, GPT2),
    "gpt_neox": Family(_gpt_neox, GPT_NEOX),
}

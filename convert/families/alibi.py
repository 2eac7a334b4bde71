"""Families with linear attention biases instead of position embeddings: BLOOM, MPT, Falcon and its rotary variants."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convert.families.base import (
    Family,
    biases,
    decoder,
    layers_without_rope,
    plain_layer_norm,
    require,
    rotary_layers,
)
from convert.weights import takes
from convert.weights.parts import (
    PRE_NORMS,
    embedding_norm_rules,
    fused_qkv,
    layer_rules,
    linear,
    norm,
    outer_rules,
    plain_mlp,
)
from tide_jax.errors import TideError
from tide_jax.model.architecture import DecoderConfig


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Slope of each head's bias (Press et al. 2022, arXiv:2108.12409, section 3), with the authors' extension.

    If the number of heads is not a power of two, the rest are every other slope of the next power of two.
    """
    largest = 2 ** math.floor(math.log2(heads))
    own = _geometric_slopes(largest, np.arange(1, largest + 1))
    return (*own, *_geometric_slopes(2 * largest, np.arange(1, 2 * (heads - largest), 2)))


def _geometric_slopes(heads: int, powers: np.ndarray) -> tuple[float, ...]:
    ratio = np.float32(2.0 ** -(8.0 / heads))
    return tuple(float(slope) for slope in ratio ** powers.astype(np.float32))


def mpt_slopes(heads: int) -> tuple[float, ...]:
    """MPT's slopes: those of the next power of two heads. With fewer heads, the even-numbered slopes come first."""
    count = 2 ** math.ceil(math.log2(heads))
    slopes = _geometric_slopes(count, np.arange(1, count + 1))
    return slopes if count == heads else (*slopes[1::2], *slopes[::2])[:heads]


def _bloom(hf: Any) -> DecoderConfig:
    require(hf, apply_residual_connection_post_layernorm=False)
    return decoder(
        hf,
        layers_without_rope(hf, alibi=alibi_slopes(hf.num_attention_heads)),
        intermediate_size=4 * hf.hidden_size,
        max_positions=getattr(hf, "seq_length", 2048),
        activation="gelu_new",
        positions="none",
        embedding_norm=True,
        **plain_layer_norm(),
    )


def _mpt(hf: Any) -> DecoderConfig:
    attention = hf.attn_config
    require(hf, no_bias=True, logit_scale=None)
    # The reference always uses alibi_bias_max=8 and ignores the field.
    supported = {"alibi": True, "alibi_bias_max": 8, "prefix_lm": False, "attn_type": "multihead_attention"}
    for name, value in supported.items():
        if (found := getattr(attention, name)) != value:
            raise TideError(f"mpt with attn_config.{name}={found!r} is not supported, only {name}={value!r}")
    return decoder(
        hf,
        layers_without_rope(hf, attention.softmax_scale, alibi=mpt_slopes(hf.num_attention_heads)),
        intermediate_size=4 * hf.hidden_size,
        max_positions=hf.max_seq_len,
        activation="gelu",
        positions="none",
        clip_qkv=attention.clip_qkv or None,
        **plain_layer_norm(norm_bias=False, mlp_bias=False, **biases(False)),
    )


def _falcon(hf: Any) -> DecoderConfig:
    new_architecture = hf.new_decoder_architecture
    norms = hf.num_ln_in_parallel_attn or (2 if new_architecture else 1)
    if new_architecture:
        require(hf, parallel_attn=True)
    elif norms == 2:
        raise TideError("falcon with num_ln_in_parallel_attn=2 is not supported without new_decoder_architecture=True")
    slopes = alibi_slopes(hf.num_attention_heads)
    return decoder(
        hf,
        layers_without_rope(hf, alibi=slopes, alibi_bfloat16=True) if hf.alibi else rotary_layers(hf),
        num_kv_heads=1 if hf.multi_query and not new_architecture else hf.num_kv_heads,
        intermediate_size=hf.ffn_hidden_size,
        activation=hf.activation,
        positions="none" if hf.alibi else "rope",
        parallel_residual=hf.parallel_attn,
        shared_norm=hf.parallel_attn and norms == 1,
        **plain_layer_norm(mlp_bias=hf.bias, **biases(hf.bias)),
    )


_LAYER = {
    **fused_qkv("self_attention.query_key_value", takes.grouped_q, takes.grouped_kv),
    **linear("self_attention.dense", "attention.out", takes.heads_in),
    **plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    **PRE_NORMS,
}
_TOP = outer_rules("[transformer.]word_embeddings", "[transformer.]ln_f")
BLOOM = (
    *_TOP,
    *embedding_norm_rules("[transformer.]word_embeddings_layernorm"),
    *layer_rules("[transformer.]h", _LAYER),
)
FALCON = (
    *_TOP,
    *layer_rules("[transformer.]h", _LAYER, norm("ln_attn", "pre_attention_norm"), norm("ln_mlp", "pre_mlp_norm")),
)
MPT = (
    *outer_rules("[transformer.]wte", "[transformer.]norm_f"),
    *layer_rules(
        "[transformer.]blocks",
        fused_qkv("attn.Wqkv", takes.fused_q, takes.fused_kv),
        linear("attn.out_proj", "attention.out", takes.heads_in),
        plain_mlp("ffn.up_proj", "ffn.down_proj"),
        norm("norm_1", "pre_attention_norm"),
        norm("norm_2", "pre_mlp_norm"),
    ),
)
FAMILIES: dict[str, Family] = {
    "bloom": Family(_bloom, BLOOM),
    "falcon": Family(_falcon, FALCON),
    "mpt": Family(_mpt, MPT),
}

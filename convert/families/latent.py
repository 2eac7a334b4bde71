"""Families with multi-head latent attention: DeepSeek's lineage."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

from convert.families.base import Family, biases, decoder, rotary_layers
from convert.families.mixtures import (
    WITHOUT_MTP,
    layers_after,
    marked_sparse_layers,
    mixture,
    shared_width,
    sigmoid_mixture,
)
from convert.weights import takes
from convert.weights.parts import LATENT_ATTENTION, PRE_NORMS, Names, linear, llama_weights, norm
from convert.weights.rules import Target, ignore
from tide_jax.errors import TideError
from tide_jax.model.architecture import AttentionType, DecoderConfig, LatentConfig, MoEConfig
from tide_jax.model.recurrent.types import RecurrentType

logger = logging.getLogger(__name__)


def latent_scale(hf: Any) -> float:
    """Factor of query-key products; `head_dim` of these configurations covers only the rotated part."""
    return (hf.qk_nope_head_dim + hf.qk_rope_head_dim) ** -0.5


def latent_rotary_layers(
    hf: Any, layer_types: Sequence[str] | None = None, *, interleaved: bool
) -> list[AttentionType]:
    """Returns each layer's latent attention, with rotary embedding; see `rotary_layers`."""
    return rotary_layers(hf, layer_types, scale=latent_scale(hf) * _temperature(hf) ** 2, interleaved=interleaved)


def latent_decoder(
    hf: Any, layers: Sequence[AttentionType | RecurrentType], *, raw_queries: bool = False, **flags: Any
) -> DecoderConfig:
    """A decoder with latent attention."""
    latent = LatentConfig(
        kv_rank=hf.kv_lora_rank,
        q_rank=getattr(hf, "q_lora_rank", None),
        nope_dim=hf.qk_nope_head_dim,
        rope_dim=hf.qk_rope_head_dim,
        value_dim=hf.v_head_dim,
        raw_queries=raw_queries,
    )
    return decoder(
        hf,
        layers,
        latent=latent,
        head_dim=hf.qk_nope_head_dim + hf.qk_rope_head_dim,
        num_kv_heads=hf.num_attention_heads,
        **(biases(hf.attention_bias) | flags),
    )


def _latent_decoder(hf: Any, *, interleaved: bool, **flags: Any) -> DecoderConfig:
    return latent_decoder(hf, latent_rotary_layers(hf, interleaved=interleaved), **flags)


def _temperature(hf: Any) -> float:
    """The factor by which DeepSeek's YaRN scales both queries and keys, besides its change to the rotary tables."""
    settings = hf.rope_parameters
    mscale, factor = settings.get("mscale_all_dim"), settings.get("factor")
    if settings.get("rope_type", "default") == "default" or not mscale or not factor or factor <= 1:
        return 1.0
    return 0.1 * mscale * math.log(factor) + 1.0


def _deepseek_v2(hf: Any) -> DecoderConfig:
    if hf.topk_method not in ("greedy", "group_limited_greedy"):
        raise TideError(
            f"deepseek_v2 with topk_method={hf.topk_method!r} is not supported, only greedy and group_limited_greedy"
        )
    grouped = hf.topk_method == "group_limited_greedy"
    moe = mixture(
        hf,
        hf.n_routed_experts,
        layers=layers_after(hf, hf.first_k_dense_replace),
        renormalise=False,
        scale=hf.routed_scaling_factor,
        groups=hf.n_group if grouped else 1,
        groups_kept=hf.topk_group if grouped else 1,
        group_score="max",
        shared_size=shared_width(hf, hf.n_shared_experts),
    )
    return _latent_decoder(hf, interleaved=True, moe=moe, mlp_bias=hf.mlp_bias)


def _deepseek_v3(hf: Any) -> DecoderConfig:
    return _latent_decoder(
        hf, interleaved=hf.rope_interleave, moe=_experts(hf, layers_after(hf, hf.first_k_dense_replace))
    )


def _glm4_moe_lite(hf: Any) -> DecoderConfig:
    return _latent_decoder(hf, interleaved=hf.rope_interleave, moe=_experts(hf, marked_sparse_layers(hf)))


def _axk1(hf: Any) -> DecoderConfig:
    moe = _experts(hf, marked_sparse_layers(hf), output_norm=True)
    return _latent_decoder(hf, interleaved=hf.rope_interleave, moe=moe)


def _experts(hf: Any, layers: tuple[int, ...], **flags: Any) -> MoEConfig:
    shared = {"shared_size": shared_width(hf, hf.n_shared_experts)}
    return sigmoid_mixture(hf, hf.n_routed_experts, layers=layers, **(shared | flags))


def _sparse_attention(hf: Any) -> DecoderConfig:
    return without_indexer(hf, _latent_decoder(hf, interleaved=True, moe=_experts(hf, marked_sparse_layers(hf))))


def _axk2(hf: Any) -> DecoderConfig:
    """Gated norms, and an attention gate that is made from the queries' bottleneck, as the queries are."""
    config = _latent_decoder(
        hf,
        interleaved=True,
        raw_queries=True,
        attention_gate="channel",
        norm_gate_rank=hf.gated_norm_rank,
        moe=_experts(hf, marked_sparse_layers(hf), others_score_zero=True),
    )
    return without_indexer(hf, config)


def without_indexer(hf: Any, config: DecoderConfig) -> DecoderConfig:
    """Decoder whose indexer picks `index_topk` keys for each query; contexts up to that length need no indexer."""
    if hf.index_topk >= config.max_positions:
        return config
    logger.warning(
        "%s attends to at most %d tokens, which an indexer chooses; the indexer is not implemented, so the context is "
        "cut from %d to %d tokens, where no choice is needed",
        *(hf.model_type, hf.index_topk, config.max_positions, hf.index_topk),
    )
    return dataclasses.replace(config, max_positions=hf.index_topk)


def _youtu(hf: Any) -> DecoderConfig:
    return _latent_decoder(hf, interleaved=hf.rope_interleave)


def _minicpm3(hf: Any) -> DecoderConfig:
    return _latent_decoder(
        hf,
        interleaved=False,
        embedding_scale=float(hf.scale_emb),
        residual_scale=hf.scale_depth / math.sqrt(hf.num_hidden_layers),
        logit_scale=hf.dim_model_base / hf.hidden_size,
        mlp_bias=hf.mlp_bias,
    )


WEIGHTS = llama_weights(attention=LATENT_ATTENTION, top=WITHOUT_MTP)
AXK1 = llama_weights(
    PRE_NORMS, norm("post_mlp_layernorm", "mlp.output_norm"), attention=LATENT_ATTENTION, top=WITHOUT_MTP
)
WITHOUT_INDEXER = ignore(r"model\.layers\.\d+\.self_attn\.indexer\..*", "the indexer of sparse attention")
INDEXED = (*WEIGHTS, WITHOUT_INDEXER)


def _gated_norm(name: str, path: str) -> Names:
    """A norm that may have a gate."""
    return {
        **norm(name, path),
        **norm(f"{name}.norm", f"{path}.norm"),
        **linear(f"{name}.W_down", f"{path}.gate_in"),
        **linear(f"{name}.W_up", f"{path}.gate_out"),
    }


AXK2_ATTENTION: Names = {
    **LATENT_ATTENTION,
    "self_attn.q_b_proj.weight": (
        Target("attention.q.kernel", takes.latent_queries),
        Target("attention.gate.kernel", takes.latent_gate),
    ),
}
AXK2 = (
    *llama_weights(
        _gated_norm("input_layernorm", "pre_attention_norm"),
        _gated_norm("post_attention_layernorm", "pre_mlp_norm"),
        attention=AXK2_ATTENTION,
        top=WITHOUT_MTP,
    ),
    WITHOUT_INDEXER,
)
FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family(_deepseek_v2, WEIGHTS),
    "deepseek_v3": Family(_deepseek_v3, WEIGHTS),
    "glm4_moe_lite": Family(_glm4_moe_lite, WEIGHTS),
    "axk1": Family(_axk1, AXK1),
    "axk2": Family(_axk2, AXK2),
    "deepseek_v32": Family(_sparse_attention, INDEXED),
    "glm_moe_dsa": Family(_sparse_attention, INDEXED),
    "youtu": Family(_youtu, WEIGHTS),
    "minicpm3": Family(_minicpm3, WEIGHTS),
}

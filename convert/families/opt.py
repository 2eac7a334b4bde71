"""Decoders of the fairseq lineage: OPT, XGLM, BioGPT. Positions start at 2."""

from __future__ import annotations

from typing import Any

from convert.families.base import Family, biases, decoder, layers_without_rope, learned_positions, plain_layer_norm
from convert.weights.parts import (
    FAIRSEQ,
    FAIRSEQ_POST_NORMS,
    FAIRSEQ_PRE_NORMS,
    ignore_sinusoidal_table,
    layer_rules,
    outer_rules,
    width_projection_rules,
)
from convert.weights.rules import Target, ignore, move
from tide_jax.errors import TideError
from tide_jax.model.architecture import DecoderConfig

_OFFSET = 2
EPS = 1e-5  # torch's default: no field of the configuration changes it


def _opt(hf: Any) -> DecoderConfig:
    before, affine = hf.do_layer_norm_before, hf.layer_norm_elementwise_affine
    return decoder(
        hf,
        layers_without_rope(hf),
        embedding_size=None if hf.word_embed_proj_dim == hf.hidden_size else hf.word_embed_proj_dim,
        intermediate_size=hf.ffn_dim,
        norm_eps=EPS,
        norm_placement="pre" if before else "residual",
        final_norm=before and not hf._remove_final_layer_norm,
        norm_scale=affine,
        **learned_positions(hf.max_position_embeddings, _OFFSET),
        **plain_layer_norm(norm_bias=affine, mlp_bias=hf.enable_bias, **biases(hf.enable_bias)),
    )


def _xglm(hf: Any) -> DecoderConfig:
    if (hf.pad_token_id or 0) >= _OFFSET:
        raise TideError(f"xglm with pad_token_id={hf.pad_token_id} is not supported, only one below {_OFFSET}")
    return decoder(
        hf,
        layers_without_rope(hf),
        intermediate_size=hf.ffn_dim,
        norm_eps=EPS,
        positions="sinusoidal",
        position_offset=_OFFSET,
        sinusoid_endpoint=True,
        embedding_scale=hf.hidden_size**0.5 if hf.scale_embedding else None,
        **plain_layer_norm(),
    )


def _biogpt(hf: Any) -> DecoderConfig:
    return decoder(
        hf,
        layers_without_rope(hf),
        norm_eps=EPS,
        embedding_scale=hf.hidden_size**0.5 if hf.scale_embedding else None,
        **learned_positions(hf.max_position_embeddings, _OFFSET),
        **plain_layer_norm(),
    )


VERSION = ignore(r"(model\.)?(decoder\.)?version", "a version number")
OPT = (
    VERSION,
    *outer_rules("[model.]decoder.embed_tokens", "[model.]decoder.final_layer_norm"),
    move("[model.]decoder.embed_positions.weight", Target("positions.kernel")),
    *width_projection_rules("[model.]decoder.project_in", "[model.]decoder.project_out"),
    *layer_rules("[model.]decoder.layers", FAIRSEQ),
    *layer_rules("[model.]decoder.layers", FAIRSEQ_PRE_NORMS, when=lambda config: config.norm_placement == "pre"),
    *layer_rules("[model.]decoder.layers", FAIRSEQ_POST_NORMS, when=lambda config: config.norm_placement != "pre"),
)
XGLM = (
    VERSION,
    *outer_rules("[model.]embed_tokens", "[model.]layer_norm"),
    ignore_sinusoidal_table("[model.]embed_positions.weights"),
    *layer_rules("[model.]layers", FAIRSEQ, FAIRSEQ_PRE_NORMS),
)
BIOGPT = (
    *outer_rules("[biogpt.]embed_tokens", "[biogpt.]layer_norm", "output_projection"),
    move("[biogpt.]embed_positions.weight", Target("positions.kernel")),
    *layer_rules("[biogpt.]layers", FAIRSEQ, FAIRSEQ_PRE_NORMS),
)
FAMILIES: dict[str, Family] = {
    "opt": Family(_opt, OPT),
    "xglm": Family(_xglm, XGLM),
    "biogpt": Family(_biogpt, BIOGPT),
}

"""Causal decoders built like an encoder: BERT and its relatives, plus BART's from `seq2seq`."""

from __future__ import annotations

from typing import Any

import numpy as np

from convert.families import seq2seq
from convert.families.base import (
    Family,
    biases,
    decoder,
    head_dim,
    layers_without_rope,
    learned_positions,
    plain_layer_norm,
    require,
)
from convert.weights.parts import Names, attention, has_own_head, has_tied_head, layer_rules, linear, plain_mlp
from convert.weights.rules import Rule, Target, ignore, move
from tide_jax.errors import TideError
from tide_jax.model.architecture import AttentionType, DecoderConfig, HeadTransform, RopeConfig


def _encoder(hf: Any, attention_types: list[AttentionType] | None = None, **flags: Any) -> DecoderConfig:
    """Configuration of a BERT relative that is a decoder."""
    if not getattr(hf, "is_decoder", True):
        raise TideError(
            f"{hf.model_type} attends in both directions unless config.json says is_decoder=true: "
            "only a decoder can be converted"
        )
    require(hf, position_embedding_type="absolute")
    shared: dict[str, Any] = {
        "norm_placement": "residual",
        "final_norm": False,
        "embedding_norm": True,
        "added_embeddings": 1,
        "head_transform": HeadTransform(hf.hidden_act),
        "head_bias": True,
    }
    return decoder(hf, attention_types or layers_without_rope(hf), **shared | plain_layer_norm() | flags)


def _bert(hf: Any, **flags: Any) -> DecoderConfig:
    return _encoder(hf, **learned_positions(hf.max_position_embeddings), **flags)


def _without_segments(hf: Any) -> DecoderConfig:
    return _bert(hf, added_embeddings=0, head_transform=None)


def _ernie(hf: Any) -> DecoderConfig:
    return _bert(hf, added_embeddings=2 if hf.use_task_id else 1)


def _big_bird(hf: Any) -> DecoderConfig:
    require(hf, attention_type="original_full")
    scale = hf.hidden_size**0.5 if hf.rescale_embeddings else None
    return _bert(hf, embedding_scale=scale, **biases(hf.use_bias, out=True))


def _megatron_bert(hf: Any) -> DecoderConfig:
    return _bert(hf, norm_placement="pre", final_norm=True, embedding_norm=False)


def _electra(hf: Any) -> DecoderConfig:
    return _bert(hf, head_transform=HeadTransform("gelu"), **_embedding_width_flags(hf, hf.embedding_size))


def _rembert(hf: Any) -> DecoderConfig:
    head = HeadTransform(hf.hidden_act, size=hf.output_embedding_size)
    narrow = {"embedding_size": hf.input_embedding_size, "project_after_norm": True}
    return _bert(hf, head_transform=head, tie_embeddings=False, **narrow)


def _roformer(hf: Any) -> DecoderConfig:
    rope = RopeConfig(theta=10000.0, rotary_dim=head_dim(hf), interleaved=True, values=hf.rotary_value)
    return _encoder(hf, layers_without_rope(hf, rope=rope), **_embedding_width_flags(hf, hf.embedding_size))


def _embedding_width_flags(hf: Any, width: int) -> dict[str, Any]:
    """Flags for embeddings whose width differs from the layers'."""
    return {} if width == hf.hidden_size else {"embedding_size": width, "project_after_norm": True}


def _roberta(hf: Any, **flags: Any) -> DecoderConfig:
    """Positions start behind the padding token's id, as in the reference when it is given none."""
    offset = hf.pad_token_id + 1
    rows = hf.max_position_embeddings - offset
    return _encoder(
        hf, max_positions=rows, head_transform=HeadTransform("gelu"), **learned_positions(rows, offset), **flags
    )


def _roberta_prelayernorm(hf: Any) -> DecoderConfig:
    return _roberta(hf, norm_placement="pre", final_norm=True)


def _xlm_roberta_xl(hf: Any) -> DecoderConfig:
    return _roberta(hf, norm_placement="pre", final_norm=True, embedding_norm=False)


def _norm(name: str, path: str) -> Names:
    """A norm's weight and bias, also under the names in the first published checkpoints."""
    weight, bias = (Target(f"{path}.scale"),), (Target(f"{path}.bias"),)
    return {f"{name}.weight": weight, f"{name}.bias": bias, f"{name}.gamma": weight, f"{name}.beta": bias}


def _move_all(names: Names, prefix: str) -> tuple[Rule, ...]:
    return tuple(move(f"{prefix}{name}", *targets) for name, targets in names.items())


def _first_row(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """First row of a table, which applies to every token by default."""
    return a[0]


_LAYER: Names = {
    **attention("attention", "self.query", "self.key", "self.value", "output.dense"),
    **plain_mlp("intermediate.dense", "output.dense"),
    **_norm("attention.output.LayerNorm", "post_attention_norm"),
    **_norm("output.LayerNorm", "post_mlp_norm"),
    **_norm("attention.ln", "pre_attention_norm"),
    **_norm("ln", "pre_mlp_norm"),
    **_norm("attention.self_attn_layer_norm", "pre_attention_norm"),
    **_norm("LayerNorm", "pre_mlp_norm"),
    **_norm("attention.LayerNorm", "pre_attention_norm"),
    **_norm("intermediate.LayerNorm", "pre_mlp_norm"),
}
_OUTER: Names = {
    "embeddings.word_embeddings.weight": (Target("embed.kernel"),),
    "embeddings.position_embeddings.weight": (Target("positions.kernel"),),
    "embeddings.token_type_embeddings.weight": (Target("added.kernel", _first_row, "0"),),
    "embeddings.task_type_embeddings.weight": (Target("added.kernel", _first_row, "1"),),
    **_norm("embeddings.LayerNorm", "embedding_norm"),
    **linear("embeddings_project", "project_in"),
    **linear("encoder.embedding_hidden_mapping_in", "project_in"),
    **_norm("encoder.ln", "final_norm"),
    **_norm("encoder.LayerNorm", "final_norm"),
    **_norm("LayerNorm", "final_norm"),
}


def _head_transform_rules(dense: str, norm: str) -> tuple[Rule, ...]:
    return _move_all({**linear(dense, "head_transform.dense"), **_norm(norm, "head_transform.norm")}, "")


def _head_rules(out: str, bias: str | None = None) -> tuple[Rule, ...]:
    """Rules for the output projection; `bias` names its bias if the projection is tied to the embedding."""
    rules = (
        move(f"{out}.weight", Target("head.kernel"), when=has_own_head),
        ignore(move(f"{out}.weight").pattern, "tied to the token embedding", when=has_tied_head),
    )
    if bias is None:
        return (*rules, move(f"{out}.bias", Target("head.bias")))
    return (
        *rules,
        move(f"{out}.bias", Target("head.bias"), when=has_own_head),
        ignore(move(f"{out}.bias").pattern, f"tied to {bias}", when=has_tied_head),
        move(bias, Target("head.bias"), when=has_tied_head),
        ignore(move(bias).pattern, f"{out}.bias is the one that is added", when=has_own_head),
    )


def _weight_rules(prefix: str, head: tuple[Rule, ...]) -> tuple[Rule, ...]:
    optional = rf"({prefix}\.)?"
    return (
        *head,
        *_move_all(_OUTER, f"[{prefix}.]"),
        *layer_rules(f"[{prefix}.]encoder.layer", _LAYER),
        ignore(rf"{optional}encoder\.layer\.\d+\.crossattention\..*", "attends to an encoder, which is left out"),
        ignore(rf"{optional}pooler\..*|cls\.seq_relationship\..*", "serves classification"),
        ignore(rf"{optional}embeddings\.(position_ids|token_type_ids)", "a range of numbers"),
        ignore(rf"{optional}encoder\.embed_positions\.weight", "rotary angles are computed"),
    )


_CLS_HEAD = (
    *_head_transform_rules("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
    *_head_rules("cls.predictions.decoder", "cls.predictions.bias"),
)
_LM_HEAD = (
    *_head_transform_rules("lm_head.dense", "lm_head.layer_norm"),
    *_head_rules("lm_head.decoder", "lm_head.bias"),
)
_GENERATOR_HEAD = (
    *_head_transform_rules("generator_predictions.dense", "generator_predictions.LayerNorm"),
    *_head_rules("generator_lm_head"),
)
_REMBERT_HEAD = (
    *_head_transform_rules("cls.predictions.dense", "cls.predictions.LayerNorm"),
    *_head_rules("cls.predictions.decoder"),
)
_IMAGE_PARTS = ignore(r"git\.(image_encoder|visual_projection|img_temporal_embedding)\..*", "reads images")
ROBERTA = _weight_rules("roberta", _LM_HEAD)
FAMILIES: dict[str, Family] = {
    **seq2seq.FAMILIES,
    "bert": Family(_bert, _weight_rules("bert", _CLS_HEAD)),
    "bert-generation": Family(_without_segments, _weight_rules("bert", _LM_HEAD)),
    "git": Family(_without_segments, (*_weight_rules("git", _head_rules("output")), _IMAGE_PARTS)),
    "ernie": Family(_ernie, _weight_rules("ernie", _CLS_HEAD)),
    "big_bird": Family(_big_bird, _weight_rules("bert", _CLS_HEAD)),
    "megatron-bert": Family(_megatron_bert, _weight_rules("bert", _CLS_HEAD)),
    "electra": Family(_electra, _weight_rules("electra", _GENERATOR_HEAD)),
    "rembert": Family(_rembert, _weight_rules("rembert", _REMBERT_HEAD)),
    "roformer": Family(_roformer, _weight_rules("roformer", _CLS_HEAD)),
    "roberta": Family(_roberta, ROBERTA),
    "camembert": Family(_roberta, ROBERTA),
    "xlm-roberta": Family(_roberta, ROBERTA),
    "data2vec-text": Family(_roberta, _weight_rules("data2vec_text", _LM_HEAD)),
    "roberta-prelayernorm": Family(_roberta_prelayernorm, _weight_rules("roberta_prelayernorm", _LM_HEAD)),
    "xlm-roberta-xl": Family(_xlm_roberta_xl, ROBERTA),
}

"""Decoders of encoder-decoder models, run without the encoder: *ForCausalLM classes of BART and its relatives."""

from __future__ import annotations

from typing import Any

from convert.families.base import Family, biases, decoder, learned_positions, plain_layer_norm, require
from convert.families.opt import EPS, VERSION
from convert.weights import takes
from convert.weights.parts import (
    FAIRSEQ,
    FAIRSEQ_POST_NORMS,
    FAIRSEQ_PRE_NORMS,
    Names,
    embedding_norm_rules,
    layer_rules,
    outer_rules,
)
from convert.weights.rules import Rule, Target, ignore, move
from tide_jax.model.architecture import AttentionType, DecoderConfig

_SINUSOIDAL: dict[str, Any] = {"positions": "sinusoidal"}


def _decoder(hf: Any, *, pre_norm: bool, **flags: Any) -> DecoderConfig:
    """Decoder of a model whose unprefixed fields (num_hidden_layers, num_attention_heads) describe the encoder."""
    heads, width = hf.decoder_attention_heads, hf.d_model // hf.decoder_attention_heads
    fields: dict[str, Any] = {
        "num_layers": hf.decoder_layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width,
        "intermediate_size": hf.decoder_ffn_dim,
        "norm_eps": EPS,
        "norm_placement": "pre" if pre_norm else "residual",
        "final_norm": pre_norm,
        "embedding_scale": hf.d_model**0.5 if hf.scale_embedding else None,
    }
    return decoder(hf, [AttentionType(scale=width**-0.5)] * hf.decoder_layers, **fields | plain_layer_norm(**flags))


def _bart(hf: Any) -> DecoderConfig:
    return _decoder(hf, pre_norm=False, embedding_norm=True, **learned_positions(hf.max_position_embeddings, 2))


def _mvp(hf: Any) -> DecoderConfig:
    require(hf, use_prompt=False)
    return _bart(hf)


def _mbart(hf: Any) -> DecoderConfig:
    return _decoder(hf, pre_norm=True, embedding_norm=True, **learned_positions(hf.max_position_embeddings, 2))


def _blenderbot(hf: Any) -> DecoderConfig:
    return _decoder(hf, pre_norm=True, **learned_positions(hf.max_position_embeddings))


def _blenderbot_small(hf: Any) -> DecoderConfig:
    positions = learned_positions(hf.max_position_embeddings) | {"positions_after_norm": True}
    return _decoder(hf, pre_norm=False, embedding_norm=True, embedding_scale=None, **positions)  # see _whisper


def _pegasus(hf: Any) -> DecoderConfig:
    return _decoder(hf, pre_norm=True, **_SINUSOIDAL)


def _bigbird_pegasus(hf: Any) -> DecoderConfig:
    return _decoder(hf, pre_norm=True, **learned_positions(hf.max_position_embeddings), **biases(hf.use_bias))


def _marian(hf: Any) -> DecoderConfig:
    require(hf, decoder_vocab_size=hf.vocab_size)
    return _decoder(hf, pre_norm=False, **_SINUSOIDAL)


def _trocr(hf: Any) -> DecoderConfig:
    positions = learned_positions(hf.max_position_embeddings, 2)
    if not hf.use_learned_position_embeddings:
        positions = _SINUSOIDAL | {"position_offset": hf.pad_token_id + 1, "sinusoid_endpoint": True}
    return _decoder(hf, pre_norm=False, embedding_norm=hf.layernorm_embedding, **positions)


def _whisper(hf: Any) -> DecoderConfig:
    positions = learned_positions(hf.max_target_positions) | {"max_positions": hf.max_target_positions}
    # The reference's decoder does not read scale_embedding.
    return _decoder(hf, pre_norm=True, key_bias=False, embedding_scale=None, **positions)


def _weight_rules(
    norms: Names, *more: Names, final_norm: str = "layer_norm", head: str = "lm_head"
) -> tuple[Rule, ...]:
    prefix = "[model.]decoder."
    table = f"{prefix}embed_positions.weight"

    def has_learned_positions(config: DecoderConfig) -> bool:
        return config.positions == "learned"

    def has_computed_positions(config: DecoderConfig) -> bool:
        return config.positions == "sinusoidal"

    return (
        *outer_rules(f"{prefix}embed_tokens", f"{prefix}{final_norm}", head),
        *(embedding_norm_rules(f"{prefix}layernorm_embedding") if final_norm != "layernorm_embedding" else ()),
        move(table, Target("positions.kernel"), when=has_learned_positions),
        ignore(move(table).pattern, "sinusoidal positions are computed", when=has_computed_positions),
        ignore(r"(model\.)?decoder\.layers\.\d+\.encoder_attn.*", "attends to an encoder, which is left out"),
        ignore(r"(model\.)?(encoder|shared)\..*", "belongs to the encoder, which is left out"),
        VERSION,
        ignore("final_logits_bias", "a decoder that runs without its encoder does not add it"),
        *layer_rules(f"{prefix}layers", FAIRSEQ, norms, *more),
    )


BART, MBART = _weight_rules(FAIRSEQ_POST_NORMS), _weight_rules(FAIRSEQ_PRE_NORMS)
BIGBIRD_PEGASUS = _weight_rules(FAIRSEQ_PRE_NORMS, final_norm="layernorm_embedding")
TROCR = _weight_rules(FAIRSEQ_POST_NORMS, head="output_projection")
WHISPER = _weight_rules(
    FAIRSEQ_PRE_NORMS,
    {"self_attn.v_proj.bias": (Target("attention.value_bias", takes.heads_bias),)},
    head="proj_out",
)
FAMILIES: dict[str, Family] = {
    "bart": Family(_bart, BART),
    "plbart": Family(_bart, BART),
    "mvp": Family(_mvp, BART),
    "mbart": Family(_mbart, MBART),
    "blenderbot": Family(_blenderbot, MBART),
    "blenderbot-small": Family(_blenderbot_small, BART),
    "pegasus": Family(_pegasus, MBART),
    "bigbird_pegasus": Family(_bigbird_pegasus, BIGBIRD_PEGASUS),
    "marian": Family(_marian, BART),
    "trocr": Family(_trocr, TROCR),
    "whisper": Family(_whisper, WHISPER),
}

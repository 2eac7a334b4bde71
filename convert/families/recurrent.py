"""Decoders with recurrent layers: short convolutions, Mamba and Mamba-2, alone or between attention layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from convert.families.base import (
    Family,
    biases,
    decoder,
    head_dim,
    layers_without_rope,
    norm_eps,
    require,
    rms_qk_norm,
    rotary_layers,
)
from convert.families.mixtures import layers_after, mixture, sigmoid_mixture
from convert.families.numbers import count, positive, several, share
from convert.weights import takes
from convert.weights.parts import (
    ATTENTION,
    Names,
    attention,
    experts,
    layer_rules,
    linear,
    mlp,
    norm,
    outer_rules,
    plain_mlp,
)
from convert.weights.recurrent_parts import selective, short_conv, state_space
from convert.weights.rules import Rule, Target, ignore
from tide_jax.errors import TideError
from tide_jax.model.architecture import AddScales, AttentionType, DecoderConfig
from tide_jax.model.recurrent.types import (
    NothingType,
    RecurrentType,
    SelectiveType,
    ShortConvType,
    StateSpaceType,
)

_ATTENTION = ("full_attention", "sliding_attention")
NO_LIMIT = 2**20
"""Longest text of models without positions; their configurations name none."""


def mixed(
    hf: Any, recurrent: Mapping[str, AttentionType | RecurrentType], layers: Sequence[AttentionType] = ()
) -> list[Any]:
    """Each layer's type, by its name in `layer_types`.

    Args:
      recurrent: the type of each name that is no ordinary attention.
      layers: each layer's attention, used where the layer has attention.
    """
    known = (*_ATTENTION, *recurrent) if layers else tuple(recurrent)
    if unknown := sorted({str(name) for name in hf.layer_types} - set(known)):
        raise TideError(
            f"{hf.model_type} with layer type {', '.join(unknown)} is not supported, only {', '.join(known)}"
        )
    return [recurrent.get(name) or layers[i] for i, name in enumerate(hf.layer_types)]


def attention_kinds(hf: Any) -> list[str]:
    """`layer_types` with full attention in place of every recurrent layer, for `rotary_layers`."""
    return [name if name in _ATTENTION else "full_attention" for name in hf.layer_types]


def without_attention(hf: Any, kind: RecurrentType, **flags: Any) -> DecoderConfig:
    """A decoder of recurrent layers alone; without feed-forward blocks, unless `flags` say otherwise."""
    fields: dict[str, Any] = {
        "model_type": hf.model_type,
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 1,
        "intermediate_size": 1,
        "mlp_layers": (),
        "max_positions": NO_LIMIT,
        "attention_types": (),
        "recurrent_types": (kind,),
        "layer_pattern": (0,) * hf.num_hidden_layers,
        "norm_eps": norm_eps(hf),
        "positions": "none",
        "tie_embeddings": bool(hf.tie_word_embeddings),
    }
    return DecoderConfig(**(fields | flags))


def _selective(hf: Any, **flags: Any) -> SelectiveType:
    require(hf, hidden_act="silu", time_step_scale=1.0)
    return SelectiveType(
        inner=count(hf, "intermediate_size"),
        state_size=count(hf, "state_size"),
        step_rank=count(hf, "time_step_rank"),
        width=count(hf, "conv_kernel"),
        conv_bias=bool(hf.use_conv_bias),
        bias=bool(hf.use_bias),
        **flags,
    )


def _mamba(hf: Any) -> DecoderConfig:
    return without_attention(hf, _selective(hf))


def _falcon_mamba(hf: Any) -> DecoderConfig:
    return without_attention(hf, _selective(hf, norms="plain", norm_eps=hf.mixer_rms_eps))


def state_space_of(
    hf: Any, *, heads: str, head_dim: str, groups: str, state_size: str, width: str, **flags: Any
) -> StateSpaceType:
    """Mamba-2, whose sizes have different names in each configuration."""
    share(hf, heads, groups)
    return StateSpaceType(
        heads=count(hf, heads),
        head_dim=count(hf, head_dim),
        groups=count(hf, groups),
        state_size=count(hf, state_size),
        width=count(hf, width),
        **flags,
    )


def _limits(hf: Any) -> tuple[float, float]:
    """Least and largest time step; a large number stands for no limit."""
    if not hf.time_step_limit:
        return 0.0, 1e30
    least, most = several(hf, "time_step_limit", 2, zero=True)
    return least, min(most, 1e30)


def _mamba2(hf: Any) -> DecoderConfig:
    require(hf, hidden_act="silu")
    kind = state_space_of(
        hf,
        heads="num_heads",
        head_dim="head_dim",
        groups="n_groups",
        state_size="state_size",
        width="conv_kernel",
        conv_bias=bool(hf.use_conv_bias),
        bias=bool(hf.use_bias),
        step_limit=_limits(hf),
        norm_eps=hf.layer_norm_epsilon,
    )
    return without_attention(hf, kind)


def mamba2_of(hf: Any) -> StateSpaceType:
    """Mamba-2 in hybrids, whose fields begin with ``mamba_``."""
    require(hf, hidden_act="silu")
    return state_space_of(
        hf,
        heads="mamba_n_heads",
        head_dim="mamba_d_head",
        groups="mamba_n_groups",
        state_size="mamba_d_state",
        width="mamba_d_conv",
        conv_bias=bool(hf.mamba_conv_bias),
        bias=bool(hf.mamba_proj_bias),
        step_limit=_limits(hf),
        norm_eps=hf.rms_norm_eps,
    )


def _bamba(hf: Any) -> DecoderConfig:
    layers = mixed(hf, {"linear_attention": mamba2_of(hf)}, rotary_layers(hf, attention_kinds(hf)))
    return decoder(hf, layers, mlp_bias=hf.mlp_bias, **biases(hf.attention_bias))


def _falcon_h1(hf: Any) -> DecoderConfig:
    """Attention and Mamba-2 side by side; every product has a multiplier (muP), those of the attention in one place."""
    require(hf, projectors_bias=bool(hf.mamba_proj_bias))
    if hf.attention_bias:
        require(hf, attention_in_multiplier=1.0, attention_out_multiplier=1.0)
    if hf.mamba_proj_bias:
        require(hf, ssm_in_multiplier=1.0)
    read, (gate, down) = positive(hf, "attention_in_multiplier"), several(hf, "mlp_multipliers", 2)
    scale = head_dim(hf) ** -0.5 * read**2 * positive(hf, "key_multiplier")
    ssm_read = positive(hf, "ssm_in_multiplier")
    norm = "before_gate" if hf.mamba_norm_before_gate else "after_gate"
    beside = dataclasses.replace(
        mamba2_of(hf),
        norm=norm if hf.mamba_rms_norm else "none",
        scales=tuple(ssm_read * multiplier for multiplier in several(hf, "ssm_multipliers", 5)),
        output_scale=positive(hf, "ssm_out_multiplier"),
    )
    return decoder(
        hf,
        rotary_layers(hf, scale=scale),
        recurrent_types=(beside,),
        beside_attention=0,
        value_scale=read * positive(hf, "attention_out_multiplier"),
        mlp_gate_scale=gate,
        mlp_scales=AddScales(update=down),
        mlp_bias=hf.mlp_bias,
        embedding_scale=positive(hf, "embedding_multiplier"),
        logit_scale=positive(hf, "lm_head_multiplier"),
        **biases(hf.attention_bias),
    )


def mamba_of(hf: Any, **flags: Any) -> SelectiveType:
    """Mamba in hybrids, whose fields begin with ``mamba_``."""
    return SelectiveType(
        inner=count(hf, "mamba_expand") * hf.hidden_size,
        state_size=count(hf, "mamba_d_state"),
        step_rank=count(hf, "mamba_dt_rank"),
        width=count(hf, "mamba_d_conv"),
        conv_bias=bool(hf.mamba_conv_bias),
        bias=bool(hf.mamba_proj_bias),
        **flags,
    )


def _jamba(hf: Any) -> DecoderConfig:
    require(hf, hidden_act="silu")
    kind = mamba_of(hf, norms="scaled", norm_eps=hf.rms_norm_eps)
    layers = mixed(hf, {"linear_attention": kind}, layers_without_rope(hf))
    sparse = tuple(i for i, count in enumerate(hf.layers_num_experts) if count > 1)
    moe = mixture(hf, hf.num_experts, renormalise=False, layers=sparse) if sparse else None
    return decoder(hf, layers, positions="none", moe=moe)


def _nemotron_h(hf: Any) -> DecoderConfig:
    """Each layer is one sublayer: Mamba-2, attention, or a feed-forward block."""
    require(hf, mamba_hidden_act="silu", moe_latent_size=None)
    kind = state_space_of(
        hf,
        heads="mamba_num_heads",
        head_dim="mamba_head_dim",
        groups="n_groups",
        state_size="ssm_state_size",
        width="conv_kernel",
        conv_bias=bool(hf.use_conv_bias),
        bias=bool(hf.use_bias),
        step_limit=(float(hf.time_step_min), 1e30),
        norm_eps=hf.layer_norm_epsilon,
    )
    recurrent: dict[str, RecurrentType] = {"linear_attention": kind, "mlp": NothingType(), "moe": NothingType()}
    sparse, dense = (tuple(i for i, name in enumerate(hf.layer_types) if name == of) for of in ("moe", "mlp"))
    moe = None
    if sparse:
        shared = hf.moe_shared_expert_intermediate_size
        moe = sigmoid_mixture(hf, hf.n_routed_experts, layers=sparse, shared_size=shared, gated=False)
    return decoder(
        hf,
        mixed(hf, recurrent, layers_without_rope(hf)),
        norm_eps=hf.layer_norm_epsilon,
        positions="none",
        activation=hf.mlp_hidden_act,
        mlp_gated=False,
        mlp_bias=hf.mlp_bias,
        mlp_layers=tuple(sorted(sparse + dense)),
        moe=moe,
    )


def _lfm2_attention(hf: Any) -> list[Any]:
    layers = rotary_layers(hf, attention_kinds(hf), qk_norm=rms_qk_norm(hf))
    return mixed(hf, {"conv": ShortConvType(width=count(hf, "conv_L_cache"), bias=bool(hf.conv_bias))}, layers)


def _lfm2(hf: Any) -> DecoderConfig:
    size = hf.intermediate_size
    if hf.block_auto_adjust_ff_dim:
        # As LFM2 counts: two thirds of the size, scaled, and rounded up to whole blocks.
        block = count(hf, "block_multiple_of")
        size = block * -(-int(positive(hf, "block_ffn_dim_multiplier") * int(2 * size / 3)) // block)
    return decoder(hf, _lfm2_attention(hf), intermediate_size=size, activation="silu")


def _lfm2_moe(hf: Any) -> DecoderConfig:
    moe = sigmoid_mixture(
        hf,
        hf.num_experts,
        layers=layers_after(hf, hf.num_dense_layers),
        correction="score" if hf.use_expert_bias else "none",
    )
    return decoder(hf, _lfm2_attention(hf), moe=moe, activation="silu")


def _lfm3(hf: Any) -> DecoderConfig:
    return decoder(
        hf,
        _lfm2_attention(hf),
        head_dim=head_dim(hf),
        norm_eps=norm_eps(hf),
        norm_placement="sandwich" if hf.use_sandwich_norm else "pre",
        attention_gate="head" if hf.use_attention_gate else "none",
        activation="silu",
        **biases(hf.attention_bias),
    )


_LFM2_FEED_FORWARD: Names = {
    **mlp("feed_forward", "mlp", "w1", "w3", "w2"),
    **linear("feed_forward.gate", "mlp.router"),
    "feed_forward.expert_bias": (Target("mlp.correction"),),
    **experts("feed_forward.experts", "w1", "w3", "w2"),
}
_LFM2_NORMS: Names = {
    **norm("operator_norm", "pre_attention_norm"),
    **norm("post_operator_norm", "post_attention_norm"),
    **norm("ffn_norm", "pre_mlp_norm"),
    **norm("post_ffn_norm", "post_mlp_norm"),
}
LFM2 = (
    *outer_rules("[model.]embed_tokens", "[model.]embedding_norm"),
    *layer_rules(
        "[model.]layers",
        _LFM2_NORMS,
        ATTENTION,
        linear("self_attn.out_proj", "attention.out", takes.heads_in),
        linear("self_attn.gate_proj", "attention.gate", takes.attention_gate),
        short_conv("conv"),
        _LFM2_FEED_FORWARD,
    ),
)


def _backbone(*names: Names) -> tuple[Rule, ...]:
    """Rules for Mamba's own names of embedding, layers and final norm."""
    return (
        *outer_rules("[backbone.]embeddings", "[backbone.]norm_f"),
        *layer_rules("[backbone.]layers", *names),
    )


MAMBA = _backbone(norm("norm", "pre_attention_norm"), selective("mixer"))
MAMBA2 = _backbone(norm("norm", "pre_attention_norm"), state_space("mixer"))
_FEED_FORWARD: Names = {
    **mlp("feed_forward", "mlp"),
    **linear("feed_forward.router", "mlp.router"),
    **experts("feed_forward.experts"),
    **norm("input_layernorm", "pre_attention_norm"),
    **norm("pre_ff_layernorm", "pre_mlp_norm"),
}


def _with_final_layernorm(*names: Names) -> tuple[Rule, ...]:
    outer = outer_rules("[model.]embed_tokens", "[model.]final_layernorm")
    return (*outer, *layer_rules("[model.]layers", ATTENTION, _FEED_FORWARD, *names))


def _mixing_layers(config: DecoderConfig) -> list[int]:
    """Layers that have attention or a state."""
    return [i for i in range(config.num_layers) if not isinstance(config.layer_type(i), NothingType)]


NEMOTRON_H = (
    *outer_rules("[backbone.]embeddings", "[backbone.]norm_f"),
    ignore(r"mtp\..*", "layers that predict further tokens, for speculative decoding"),
    *layer_rules("[backbone.]layers", norm("norm", "pre_attention_norm"), layers=_mixing_layers),
    *layer_rules("[backbone.]layers", norm("norm", "pre_mlp_norm"), layers=lambda config: config.mlp_layers or ()),
    *layer_rules(
        "[backbone.]layers",
        attention("mixer", out="o_proj"),
        state_space("mixer"),
        plain_mlp("mixer.up_proj", "mixer.down_proj"),
        linear("mixer.gate", "mlp.router"),
        {"mixer.gate.e_score_correction_bias": (Target("mlp.correction"),)},
        linear("mixer.shared_experts.up_proj", "mlp.shared.up"),
        linear("mixer.shared_experts.down_proj", "mlp.shared.down"),
        {
            "mixer.experts.{expert}.up_proj.weight": (
                Target("mlp.experts.gate_up", takes.transpose, "{expert}, :, 0"),
            ),
            "mixer.experts.{expert}.down_proj.weight": (Target("mlp.experts.down", takes.transpose, "{expert}"),),
        },
    ),
)
FAMILIES: dict[str, Family] = {
    "lfm2": Family(_lfm2, LFM2),
    "lfm2_moe": Family(_lfm2_moe, LFM2),
    "lfm3": Family(_lfm3, LFM2),
    "mamba": Family(_mamba, MAMBA),
    "falcon_mamba": Family(_falcon_mamba, MAMBA),
    "mamba2": Family(_mamba2, MAMBA2),
    "nemotron_h": Family(_nemotron_h, NEMOTRON_H),
    "jamba": Family(_jamba, _with_final_layernorm(selective("mamba"))),
    "falcon_h1": Family(_falcon_h1, _with_final_layernorm(state_space("mamba"))),
    "bamba": Family(_bamba, _with_final_layernorm(state_space("mamba"))),
}

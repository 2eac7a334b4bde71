"""Architectures with Mamba or Mamba-2 between attention layers, or beside attention in the same layer.

Between them, a layer without heads of keys and values has no attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from convert.sources.gguf.architectures.base import (
    ATTENTION,
    LLAMA,
    PERMUTED,
    TOP,
    Architecture,
    Names,
    decoder,
    expert_groups,
    expert_settings,
    granite_multipliers,
    rms_norm_eps,
    routed_scale,
    undo_rotary_pairs,
)
from convert.sources.gguf.architectures.mixtures import GRANITE_EXPERTS
from convert.sources.gguf.architectures.recurrent import (
    BACKBONE_TOP,
    by_layer_values,
    expansion,
    head_width,
    key_value_heads,
    layer_types,
    selective_names,
    state_space_names,
    without_rope,
)
from convert.sources.gguf.hyperparameters import Hyperparameters
from convert.sources.gguf.tensors import PartOf, To

Values = dict[str, Any]


# -------------------------------------------------------------------------------------------------------------- names

_FINAL_LAYERNORM: Names = {**TOP, "output_norm": "model.final_layernorm"}
_FEED_FORWARD: Names = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "pre_ff_layernorm",
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
    "ffn_gate_inp": "feed_forward.router",
    "ffn_gate_exps": To("feed_forward.experts.{i}.gate_proj"),
    "ffn_up_exps": To("feed_forward.experts.{i}.up_proj"),
    "ffn_down_exps": To("feed_forward.experts.{i}.down_proj"),
}
_BAMBA: Names = {**ATTENTION, **PERMUTED, **_FEED_FORWARD, **state_space_names("mamba")}
_FALCON_H1: Names = {
    **_BAMBA,
    **ATTENTION,  # rotated as in transformers
    "ffn_norm": "pre_ff_layernorm.weight",  # llama.cpp's name lacks the ending, a slip that it keeps
}
# Without experts, Granite's shared MLP is stored as the layer's MLP.
_GRANITE: Names = {
    **LLAMA,
    **PERMUTED,
    **GRANITE_EXPERTS,
    **state_space_names("mamba"),
    "ffn_gate": PartOf("shared_mlp.input_linear", 0, stacked=False),
    "ffn_up": PartOf("shared_mlp.input_linear", 1, stacked=False),
    "ffn_down": "shared_mlp.output_linear",
}
_NEMOTRON_H: Names = {
    "attn_norm": "norm",
    **state_space_names("mixer"),
    "attn_q": To("mixer.q_proj", undo_rotary_pairs("num_attention_heads")),
    "attn_k": To("mixer.k_proj", undo_rotary_pairs("num_key_value_heads")),
    "attn_v": "mixer.v_proj",
    "attn_output": "mixer.o_proj",
    "ffn_up": "mixer.up_proj",
    "ffn_down": "mixer.down_proj",
    "ffn_gate_inp": "mixer.gate",
    "exp_probs_b.bias": "mixer.gate.e_score_correction_bias",
    "ffn_up_exps": To("mixer.experts.{i}.up_proj"),
    "ffn_down_exps": To("mixer.experts.{i}.down_proj"),
    "ffn_up_shexp": "mixer.shared_experts.up_proj",
    "ffn_down_shexp": "mixer.shared_experts.down_proj",
}


# ------------------------------------------------------------------------------------------------ configuration values


def _hybrid_mamba2(hp: Hyperparameters) -> Values:
    """Mamba-2 in hybrids, whose fields begin with ``mamba_``."""
    heads = hp.take("ssm.time_step_rank")
    return {
        "mamba_n_heads": heads,
        "mamba_d_head": head_width(hp, heads),
        "mamba_n_groups": hp.take("ssm.group_count"),
        "mamba_d_state": hp.take("ssm.state_size"),
        "mamba_d_conv": hp.take("ssm.conv_kernel"),
        "mamba_conv_bias": hp.has("*ssm_conv1d.bias"),
        "mamba_proj_bias": hp.has("*ssm_in.bias"),
    }


def _jamba(hp: Hyperparameters) -> Values:
    by_layer, heads = key_value_heads(hp)
    sparse = [f"blk.{layer}.ffn_gate_inp.weight" in hp.tensors for layer in range(hp.layers)]
    moe = expert_settings(hp)
    attention = _period(hp, "with attention", [bool(count) for count in by_layer])
    experts = _period(hp, "with experts", sparse)
    return decoder(
        hp,
        "jamba",
        **rms_norm_eps(hp),
        **moe,
        **without_rope(hp),
        num_key_value_heads=heads,
        attn_layer_period=attention[0],
        attn_layer_offset=attention[1],
        expert_layer_period=experts[0],
        expert_layer_offset=experts[1],
        mamba_expand=expansion(hp),
        mamba_d_state=hp.take("ssm.state_size"),
        mamba_d_conv=hp.take("ssm.conv_kernel"),
        mamba_dt_rank=hp.take("ssm.time_step_rank"),
        mamba_conv_bias=hp.has("*ssm_conv1d.bias"),
        mamba_proj_bias=hp.has("*ssm_in.bias"),
    )


def _period(hp: Hyperparameters, kind: str, chosen: list[bool]) -> tuple[int, int]:
    """Period and offset of the chosen layers. Raises TideError if they are not periodic."""
    places = [layer for layer, is_chosen in enumerate(chosen) if is_chosen]
    offset = places[0] if places else hp.layers
    # One layer recurs only after the last.
    period = places[1] - offset if len(places) > 1 else hp.layers + 1
    if chosen == [layer % period == offset for layer in range(hp.layers)]:
        return period, offset
    raise hp.unsupported_error(f"block_count={hp.layers}: the layers {kind} are not periodic, expected a period")


def _granite_hybrid(hp: Hyperparameters) -> Values:
    """Granite 4.0. Models without experts have only the shared MLP."""
    by_layer, heads = key_value_heads(hp)
    rotated = hp.take("rope.scaling.finetuned")
    shared, wide = hp.take("expert_shared_feed_forward_length"), hp.take("feed_forward_length")
    moe = {"num_local_experts": 0, "num_experts_per_tok": 0}
    if hp.peek("expert_count"):
        moe = expert_settings(hp, "num_local_experts")
    elif not shared:
        shared = wide
    return decoder(
        hp,
        "granitemoehybrid",
        **rms_norm_eps(hp),
        **granite_multipliers(hp),
        **_hybrid_mamba2(hp),
        mamba_expand=expansion(hp),
        **moe,
        **({} if rotated else without_rope(hp)),
        num_key_value_heads=heads,
        layer_types=layer_types(by_layer),
        position_embedding_type="rope" if rotated else "nope",
        attention_bias=hp.has("*attn_q.bias"),
        intermediate_size=wide,
        shared_intermediate_size=shared,
    )


def _is_bamba(hp: Hyperparameters) -> bool:
    """Whether the file is a Bamba: Granite's files have a factor of the logits."""
    return hp.stated_value("logit_scale") is None


def _bamba(hp: Hyperparameters) -> Values:
    by_layer, heads = key_value_heads(hp)
    hp.expect("rope.scaling.finetuned", True)
    return decoder(
        hp,
        "bamba",
        **rms_norm_eps(hp),
        **_hybrid_mamba2(hp),
        mamba_expand=expansion(hp),
        num_key_value_heads=heads,
        attn_layer_indices=[layer for layer, count in enumerate(by_layer) if count],
        attention_bias=hp.has("*attn_q.bias"),
        mlp_bias=hp.has("*ffn_up.bias"),
        partial=True,
    )


def _if_bamba(bamba: Any, granite: Any) -> Callable[[Hyperparameters], Any]:
    return lambda hp: bamba if _is_bamba(hp) else granite


def _falcon_h1(hp: Hyperparameters) -> Values:
    """Falcon-H1: attention and Mamba-2 side by side in every layer.

    llama.cpp's converter multiplies the weights by the model's multipliers, so those of the configuration stay at 1.
    Raises TideError for a file without an output matrix: the embedding in it has the embedding's multiplier, and that
    of the logits is lost.
    """
    if "output.weight" not in hp.tensors:
        raise hp.unsupported_error("output.weight is missing: not supported, since the factor of the logits is lost")
    return decoder(
        hp,
        "falcon_h1",
        **rms_norm_eps(hp),
        **_hybrid_mamba2(hp),
        mamba_d_ssm=hp.take("ssm.inner_size"),
        mamba_rms_norm=hp.has("*ssm_norm.weight"),
        mamba_norm_before_gate=False,  # llama.cpp's only order
        projectors_bias=hp.has("*ssm_out.bias"),
        attention_bias=hp.has("*attn_q.bias"),
        mlp_bias=hp.has("*ffn_up.bias"),
    )


def _nemotron_h(hp: Hyperparameters) -> Values:
    """Nemotron-H: each layer is one sublayer, Mamba-2, attention or a feed-forward block."""
    by_layer, heads = key_value_heads(hp)
    widths = by_layer_values(hp, "feed_forward_length")
    kinds = layer_types(by_layer)
    for layer, width in enumerate(widths):
        if width:
            kinds[layer] = "moe" if f"blk.{layer}.ffn_gate_inp.weight" in hp.tensors else "mlp"
    mixers = hp.take("ssm.time_step_rank")
    moe = _nemotron_experts(hp) if "moe" in kinds else {}
    hp.ignore("attention.layer_norm_epsilon")
    return decoder(
        hp,
        "nemotron_h",
        layer_norm_epsilon=hp.take("attention.layer_norm_rms_epsilon"),
        **moe,
        **without_rope(hp),
        num_key_value_heads=heads,
        layers_block_type=kinds,
        intermediate_size=max(widths) or hp.peek("embedding_length"),
        mamba_num_heads=mixers,
        mamba_head_dim=head_width(hp, mixers),
        n_groups=hp.take("ssm.group_count"),
        ssm_state_size=hp.take("ssm.state_size"),
        conv_kernel=hp.take("ssm.conv_kernel"),
        use_conv_bias=hp.has("*ssm_conv1d.bias"),
        use_bias=hp.has("*ssm_in.bias"),
        attention_bias=hp.has("*attn_q.bias"),
        mlp_bias=hp.has("*ffn_up.bias", "*ffn_up_shexp.bias"),
        mlp_hidden_act="relu2",
    )


def _nemotron_experts(hp: Hyperparameters) -> Values:
    return {
        **expert_settings(hp, "n_routed_experts", scores="sigmoid"),
        **expert_groups(hp),
        "moe_shared_expert_intermediate_size": hp.take("expert_shared_feed_forward_length"),
        "n_shared_experts": hp.take("expert_shared_count"),
        "norm_topk_prob": hp.take("expert_weights_norm"),
        "routed_scaling_factor": routed_scale(hp),
    }


ARCHITECTURES: dict[str, Architecture] = {
    "jamba": Architecture(_jamba, {**ATTENTION, **_FEED_FORWARD, **selective_names("mamba")}, top=_FINAL_LAYERNORM),
    "granitehybrid": Architecture(
        lambda hp: _bamba(hp) if _is_bamba(hp) else _granite_hybrid(hp),
        _if_bamba(_BAMBA, _GRANITE),
        top=_if_bamba(_FINAL_LAYERNORM, TOP),
    ),
    "falcon-h1": Architecture(_falcon_h1, _FALCON_H1, top=_FINAL_LAYERNORM),
    "nemotron_h": Architecture(_nemotron_h, _NEMOTRON_H, top=BACKBONE_TOP, layers="backbone.layers"),
    "nemotron_h_moe": Architecture(_nemotron_h, _NEMOTRON_H, top=BACKBONE_TOP, layers="backbone.layers"),
}

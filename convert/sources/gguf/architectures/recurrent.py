"""Architectures of Mamba and Mamba-2 alone, and those with short convolutions between attention layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from convert.sources.gguf.architectures.base import (
    ATTENTION,
    Architecture,
    Names,
    decoder,
    expert_settings,
    routed_scale,
    vocab_size,
)
from convert.sources.gguf.hyperparameters import Hyperparameters
from convert.sources.gguf.tensors import Config, To

Values = dict[str, Any]


# ------------------------------------------------------------------------------------------------ arrangements to undo


def log_negated(a: np.ndarray, c: Config) -> np.ndarray:
    """`A_log` of -exp(A_log).

    The logarithm is taken in float64: its result is the only rounding besides that of the stored exponential.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(-a.astype(np.float64)).astype(a.dtype)


def filters(a: np.ndarray, c: Config) -> np.ndarray:
    """Filters of a convolution by channel, [C, K] to [C, 1, K]."""
    return a.reshape(a.shape[0], 1, -1)


def _flat(a: np.ndarray, c: Config) -> np.ndarray:
    """[H, 1] to [H], or the scale of a norm over groups [G, N] to [G * N]."""
    return a.reshape(-1)


def _flat_log(a: np.ndarray, c: Config) -> np.ndarray:
    return _flat(log_negated(a, c), c)


# -------------------------------------------------------------------------------------------------------------- names


def _mamba_names(mixer: str) -> Names:
    """What both generations of Mamba have."""
    return {
        "ssm_in": f"{mixer}.in_proj",
        "ssm_conv1d.weight": To(f"{mixer}.conv1d.weight", filters),
        "ssm_conv1d.bias": f"{mixer}.conv1d.bias",
        "ssm_out": f"{mixer}.out_proj",
    }


def selective_names(mixer: str) -> Names:
    """Mamba, with Jamba's norms."""
    return {
        **_mamba_names(mixer),
        "ssm_x": f"{mixer}.x_proj",
        "ssm_dt": f"{mixer}.dt_proj",
        "ssm_a": To(f"{mixer}.A_log", log_negated),
        "ssm_d": f"{mixer}.D",
        "ssm_dt_norm": f"{mixer}.dt_layernorm",
        "ssm_b_norm": f"{mixer}.b_layernorm",
        "ssm_c_norm": f"{mixer}.c_layernorm",
    }


def state_space_names(mixer: str) -> Names:
    """Mamba-2."""
    return {
        **_mamba_names(mixer),
        "ssm_dt.bias": f"{mixer}.dt_bias",
        "ssm_a": To(f"{mixer}.A_log", _flat_log),
        "ssm_d": To(f"{mixer}.D", _flat),
        "ssm_norm.weight": To(f"{mixer}.norm.weight", _flat),
    }


BACKBONE_TOP: Names = {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"}
_LFM2: Names = {
    **ATTENTION,
    "attn_norm": "operator_norm",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.conv.weight": To("conv.conv.weight", filters),
    "shortconv.out_proj": "conv.out_proj",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
    "ffn_gate_inp": "feed_forward.gate",
    "exp_probs_b.bias": "feed_forward.expert_bias",
    "ffn_gate_exps": To("feed_forward.experts.{i}.w1"),
    "ffn_up_exps": To("feed_forward.experts.{i}.w3"),
    "ffn_down_exps": To("feed_forward.experts.{i}.w2"),
}
# llama.cpp's name of the last norm is a slip that it keeps.
_LFM2_TOP: Names = {"token_embd": "model.embed_tokens", "token_embd_norm": "model.embedding_norm", "output": "lm_head"}


# ------------------------------------------------------------------------------------------------ configuration values


def by_layer_values(hp: Hyperparameters, key: str) -> list[int]:
    """A value of each layer."""
    value = hp.take_list(key) or 0
    values = value if isinstance(value, list) else [value] * (hp.layers + hp.extra_layers)
    if len(values) < hp.layers:
        raise hp.unsupported_error(f"{key} lists {len(values)} layers, expected {hp.layers}")
    return values[: hp.layers]


def key_value_heads(hp: Hyperparameters) -> tuple[list[int], int]:
    """Heads of keys and values in each layer, 0 without attention; and their number in the others."""
    by_layer = by_layer_values(hp, "attention.head_count_kv")
    numbers = set(by_layer) - {0}
    if (heads := hp.peek("attention.head_count")) < 1:
        raise hp.unsupported_error("attention.head_count=0: not supported, expected 1 or more")
    if len(numbers) > 1:
        raise hp.unsupported_error("attention.head_count_kv differs between attention layers, expected one value")
    return by_layer, numbers.pop() if numbers else heads


def layer_types(heads: list[int], recurrent: str = "linear_attention") -> list[str]:
    return ["full_attention" if count else recurrent for count in heads]


def without_rope(hp: Hyperparameters) -> dict[str, Any]:
    """Arguments of `decoder` for models without positions."""
    rotary = ("dimension_count", "freq_base", "freq_base_swa", "scale_linear")
    scaling = ("type", "factor", "attn_factor", "original_context_length", "finetuned")
    hp.ignore(*(f"rope.{name}" for name in rotary), *(f"rope.scaling.{name}" for name in scaling))
    return {"rope": {}, "without": ("rope_parameters",)}


def expansion(hp: Hyperparameters) -> int:
    """Inner width of a mixer as a multiple of the model's."""
    inner, hidden = hp.take("ssm.inner_size"), hp.peek("embedding_length")
    if inner % hidden:
        raise hp.unsupported_error(f"ssm.inner_size={inner}: not supported, expected a multiple of {hidden}")
    return inner // hidden


def head_width(hp: Hyperparameters, heads: int) -> int:
    """Width of a Mamba-2 head."""
    inner = hp.take("ssm.inner_size")
    if inner % heads:
        raise hp.unsupported_error(f"ssm.inner_size={inner}: not supported, expected a multiple of {heads} heads")
    return inner // heads


def _without_attention(hp: Hyperparameters, model_type: str, **fields: Any) -> Values:
    """Values of models with mixers alone."""
    hp.ignore("attention.head_count", "attention.head_count_kv", "feed_forward_length", "vocab_size")
    return {
        "model_type": model_type,
        "vocab_size": vocab_size(hp),
        "hidden_size": hp.take("embedding_length"),
        "num_hidden_layers": hp.layers,
        "max_position_embeddings": hp.take("context_length"),
        "tie_word_embeddings": "output.weight" not in hp.tensors,
        "layer_norm_epsilon": hp.take("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "expand": expansion(hp),
        "conv_kernel": hp.take("ssm.conv_kernel"),
        "state_size": hp.take("ssm.state_size"),
        "use_bias": hp.has("ssm_in.bias"),
        "use_conv_bias": hp.has("ssm_conv1d.bias"),
        **fields,
    }


def _mamba(hp: Hyperparameters) -> Values:
    """Mamba, or FalconMamba if time steps, keys and queries are normed.

    A file lacks the eps of these norms. llama.cpp takes that of the layers' norms; published models have 1e-6.
    """
    rank = hp.take("ssm.time_step_rank")
    if hp.take("ssm.dt_b_c_rms"):
        return _without_attention(hp, "falcon_mamba", time_step_rank=rank, mixer_rms_eps=1e-6)
    return _without_attention(hp, "mamba", time_step_rank=rank)


def _mamba2(hp: Hyperparameters) -> Values:
    heads = hp.take("ssm.time_step_rank")
    sizes = {"num_heads": heads, "head_dim": head_width(hp, heads), "n_groups": hp.take("ssm.group_count")}
    return _without_attention(hp, "mamba2", **sizes)


def _lfm2(hp: Hyperparameters) -> Values:
    """LFM2. A file has the width of the feed-forward blocks that the configuration's formula gives."""
    return _short_convolutions(hp, "lfm2", block_auto_adjust_ff_dim=False)


def _lfm2_moe(hp: Hyperparameters) -> Values:
    return _short_convolutions(
        hp,
        "lfm2_moe",
        **expert_settings(hp, scores="sigmoid"),
        num_dense_layers=hp.take("leading_dense_block_count"),
        use_expert_bias=hp.has("*exp_probs_b.bias"),
        norm_topk_prob=True,
        routed_scaling_factor=routed_scale(hp),
    )


def _short_convolutions(hp: Hyperparameters, model_type: str, **fields: Any) -> Values:
    by_layer, heads = key_value_heads(hp)
    return decoder(
        hp,
        model_type,
        norm_eps=hp.take("attention.layer_norm_rms_epsilon"),
        num_key_value_heads=heads,
        layer_types=layer_types(by_layer, "conv"),
        conv_L_cache=hp.take("shortconv.l_cache"),
        conv_bias=False,
        **fields,
    )


_MAMBA: Names = {"attn_norm": "norm", **selective_names("mixer")}
ARCHITECTURES: dict[str, Architecture] = {
    "mamba": Architecture(_mamba, _MAMBA, top=BACKBONE_TOP, layers="backbone.layers"),
    "mamba2": Architecture(
        _mamba2, {"attn_norm": "norm", **state_space_names("mixer")}, top=BACKBONE_TOP, layers="backbone.layers"
    ),
    "lfm2": Architecture(_lfm2, _LFM2, top=_LFM2_TOP),
    "lfm2moe": Architecture(_lfm2_moe, _LFM2, top=_LFM2_TOP),
}

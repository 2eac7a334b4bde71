"""Architectures with gated delta nets between attention layers: Qwen3-Next and its successors."""

from __future__ import annotations

from typing import Any

import numpy as np

from convert.sources.gguf.architectures.base import (
    EXPERTS,
    LLAMA,
    TOP,
    Architecture,
    Names,
    decoder,
    expert_settings,
    rms_norm_eps,
    shift_norms,
)
from convert.sources.gguf.architectures.mixtures import SHARED_EXPERT
from convert.sources.gguf.architectures.recurrent import filters, log_negated
from convert.sources.gguf.hyperparameters import Hyperparameters
from convert.sources.gguf.tensors import Config, To, Woven

Values = dict[str, Any]


# ------------------------------------------------------------------------------------------------ arrangements to undo


def _by_key_head(a: np.ndarray, c: Config, axis: int = 0) -> np.ndarray:
    """Reorders value heads along an axis from [values of a key head, key heads] to [key heads, values of a key head].

    llama.cpp repeats the key heads as a whole, transformers each key head for itself.
    """
    keys, values = c["linear_num_key_heads"], c["linear_num_value_heads"]
    apart = a.reshape(*a.shape[:axis], values // keys, keys, -1, *a.shape[axis + 1 :])
    return apart.swapaxes(axis, axis + 1).reshape(a.shape)


def _values_by_key_head(a: np.ndarray, c: Config) -> np.ndarray:
    """The same for the values' rows of [queries, keys, values]."""
    start = 2 * c["linear_num_key_heads"] * c["linear_key_head_dim"]
    return np.concatenate([a[:start], _by_key_head(a[start:], c)])


def _filters_by_key_head(a: np.ndarray, c: Config) -> np.ndarray:
    return filters(_values_by_key_head(a, c), c)


def _fade_by_key_head(a: np.ndarray, c: Config) -> np.ndarray:
    return _by_key_head(log_negated(a, c), c)


def _columns_by_key_head(a: np.ndarray, c: Config) -> np.ndarray:
    return _by_key_head(a, c, axis=1)


def _key_heads(c: Config) -> int:
    return c["linear_num_key_heads"]


def _query_key_value_rows(c: Config) -> tuple[int, int, int]:
    """Rows of one key head: of its queries, its keys and its values."""
    keys, values = c["linear_key_head_dim"], c["linear_value_head_dim"]
    return keys, keys, c["linear_num_value_heads"] // c["linear_num_key_heads"] * values


# -------------------------------------------------------------------------------------------------------------- names

_LAYER: Names = {**LLAMA, "post_attention_norm": "post_attention_layernorm"}
_SHIFTED = ("attn_norm", "post_attention_norm", "attn_q_norm", "attn_k_norm")
_TOP: Names = shift_norms(TOP, "output_norm")
_NEXT: Names = {
    **_LAYER,
    **EXPERTS,
    **SHARED_EXPERT,
    "attn_qkv": Woven("linear_attn.in_proj_qkvz", 0, _key_heads, _query_key_value_rows),
    "attn_gate": Woven("linear_attn.in_proj_qkvz", 1, _key_heads, lambda c: _query_key_value_rows(c)[2:]),
    "ssm_in": "linear_attn.in_proj_qkvz",
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_conv1d.weight": To("linear_attn.conv1d.weight", filters),
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_a": To("linear_attn.A_log", log_negated),
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_QWEN35: Names = {
    **_LAYER,
    "attn_qkv": To("linear_attn.in_proj_qkv", _values_by_key_head),
    "attn_gate": To("linear_attn.in_proj_z", _by_key_head),
    "ssm_alpha": To("linear_attn.in_proj_a", _by_key_head),
    "ssm_beta": To("linear_attn.in_proj_b", _by_key_head),
    "ssm_conv1d.weight": To("linear_attn.conv1d.weight", _filters_by_key_head),
    "ssm_dt.bias": To("linear_attn.dt_bias", _by_key_head),
    "ssm_a": To("linear_attn.A_log", _fade_by_key_head),
    "ssm_norm": "linear_attn.norm",
    "ssm_out.weight": To("linear_attn.out_proj.weight", _columns_by_key_head),
}


# ------------------------------------------------------------------------------------------------ configuration values


def _delta_net(hp: Hyperparameters) -> Values:
    """Sizes of the delta nets and the layers that have one: all but the last of each period."""
    heads, inner, keys = hp.take("ssm.time_step_rank"), hp.take("ssm.inner_size"), hp.take("ssm.group_count")
    if inner % heads or heads % keys:
        raise hp.unsupported_error(
            f"ssm.time_step_rank={heads}: not supported, expected a divisor of {inner} and a multiple of {keys}"
        )
    period = hp.take("full_attention_interval")
    whole = [(layer + 1) % period == 0 for layer in range(hp.layers)]
    return {
        "linear_num_value_heads": heads,
        "linear_value_head_dim": inner // heads,
        "linear_num_key_heads": keys,
        "linear_key_head_dim": hp.take("ssm.state_size"),
        "linear_conv_kernel_dim": hp.take("ssm.conv_kernel"),
        "layer_types": ["full_attention" if attends else "linear_attention" for attends in whole],
    }


def _qwen(hp: Hyperparameters, model_type: str, **fields: Any) -> Values:
    # For text, all sections of the rotary embedding have equal positions.
    hp.ignore("rope.dimension_sections")
    bias = hp.has("*attn_q.bias")
    return decoder(hp, model_type, **rms_norm_eps(hp), **_delta_net(hp), attention_bias=bias, partial=True, **fields)


def _qwen35(hp: Hyperparameters) -> Values:
    return _qwen(hp, "qwen3_5_text")


def _mixture(hp: Hyperparameters) -> Values:
    return {
        **expert_settings(hp),
        "shared_expert_intermediate_size": hp.take("expert_shared_feed_forward_length"),
    }


def _qwen3_next(hp: Hyperparameters) -> Values:
    return _qwen(hp, "qwen3_next", **_mixture(hp), norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])


def _qwen35_moe(hp: Hyperparameters) -> Values:
    return _qwen(hp, "qwen3_5_moe_text", **_mixture(hp))


ARCHITECTURES: dict[str, Architecture] = {
    "qwen3next": Architecture(_qwen3_next, shift_norms(_NEXT, *_SHIFTED), top=_TOP),
    "qwen35": Architecture(_qwen35, shift_norms(_QWEN35, *_SHIFTED), top=_TOP),
    "qwen35moe": Architecture(_qwen35_moe, shift_norms({**_QWEN35, **EXPERTS, **SHARED_EXPERT}, *_SHIFTED), top=_TOP),
}

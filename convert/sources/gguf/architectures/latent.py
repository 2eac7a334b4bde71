"""Architectures with multi-head latent attention: DeepSeek's lineage and MiniCPM3."""

from __future__ import annotations

from typing import Any

from convert.sources.gguf.architectures.base import (
    EXPERTS,
    LLAMA,
    Architecture,
    Names,
    decoder,
    expert_groups,
    expert_settings,
    rms_norm_eps,
    routed_scale,
    scoring_function,
    transpose,
)
from convert.sources.gguf.hyperparameters import Hyperparameters
from convert.sources.gguf.tensors import PartOf

_LATENT: Names = {
    **LLAMA,
    **EXPERTS,
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    # Files since 2025 have it in two parts, stacked by heads, with the keys' part transposed.
    "attn_k_b": PartOf("self_attn.kv_b_proj", 0, undo=transpose, flat=True),
    "attn_v_b": PartOf("self_attn.kv_b_proj", 1, flat=True),
}


def _latent_values(hp: Hyperparameters, model_type: str, value_dim: int, **fields: Any) -> dict[str, Any]:
    """Values of latent attention. A file gives the head width either of the attention scores or of the cache."""
    rotated, width = hp.take("rope.dimension_count"), hp.take("attention.key_length")
    # MiniCPM3's files have no separate width for the cache.
    unrotated = (hp.take("attention.key_length_mla") if hp.architecture == "deepseek2" else width) - rotated
    if unrotated < 1:
        raise hp.unsupported_error(f"rope.dimension_count={rotated}: expected less than a head's width")
    values = decoder(
        hp,
        model_type,
        **rms_norm_eps(hp),
        head_dim=rotated,
        q_lora_rank=hp.take("attention.q_lora_rank") or None,
        kv_lora_rank=hp.take("attention.kv_lora_rank"),
        qk_nope_head_dim=unrotated,
        qk_rope_head_dim=rotated,
        v_head_dim=value_dim,
        attention_bias=hp.has("attn_kv_a_mqa.bias"),
        mlp_bias=hp.has("ffn_up.bias"),
        **fields,
    )
    return values | {"num_key_value_heads": values["num_attention_heads"]}


def _deepseek(hp: Hyperparameters) -> dict[str, Any]:
    """DeepSeek-V2 scores experts with a softmax, V3 and its relatives with sigmoids; Youtu has no experts."""
    hp.ignore("attention.value_length")
    value_dim = hp.take("attention.value_length_mla")
    log_multiplier = hp.take("rope.scaling.yarn_log_multiplier")
    if hp.peek("expert_count"):
        model_type, fields = _expert_values(hp)
    else:
        model_type, fields = "youtu", {}
        hp.expect("expert_shared_count", 0)
        hp.ignore("leading_dense_block_count", "expert_feed_forward_length", "expert_weights_scale")
    values = _latent_values(hp, model_type, value_dim, **fields)
    if log_multiplier and values["rope_parameters"]["rope_type"] == "yarn":
        # The file has a tenth of the value.
        scale = round(10 * log_multiplier, 6)
        values["rope_parameters"] |= {"mscale": scale, "mscale_all_dim": scale}
    return values


def _expert_values(hp: Hyperparameters) -> tuple[str, dict[str, Any]]:
    """Model type, derived from the scoring function, and the experts' values. Sigmoids come with a correction."""
    scores = "sigmoid" if scoring_function(hp) == 2 else "softmax"
    values = expert_settings(hp, "n_routed_experts", scores=scores) | {
        "n_shared_experts": hp.take("expert_shared_count"),
        "first_k_dense_replace": hp.take("leading_dense_block_count"),
        "routed_scaling_factor": routed_scale(hp),
        "norm_topk_prob": hp.take("expert_weights_norm"),
        **expert_groups(hp),
    }
    if scores == "sigmoid":
        return "deepseek_v3", values
    if values["norm_topk_prob"]:
        raise hp.unsupported_error("expert_weights_norm=true: not supported without sigmoid scores")
    return "deepseek_v2", values | {"topk_method": "group_limited_greedy" if values["n_group"] > 1 else "greedy"}


def _minicpm3(hp: Hyperparameters) -> dict[str, Any]:
    """MiniCPM3; its multipliers and value width are those of the only published model."""
    multipliers = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
    return _latent_values(hp, "minicpm3", hp.take("attention.value_length"), **multipliers)


ARCHITECTURES: dict[str, Architecture] = {
    "deepseek2": Architecture(_deepseek, _LATENT),
    "minicpm3": Architecture(_minicpm3, _LATENT),
}

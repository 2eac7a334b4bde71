"""What llama.cpp's converter does to models with recurrent layers: keys and changes of tensors."""

from __future__ import annotations

import re

import numpy as np
from gguf import ExpertGatingFuncType, GGUFWriter
from gguf_changes import Tensors, granite_moe_tensors, permuted, stacked
from gguf_hparams import HParams
from gguf_keys import common_keys, granite_keys, llama_keys, plain_keys, rotary_count

_FULL = "full_attention"
_COMMON = (  # of Nemotron-H's checkpoints
    "max_position_embeddings",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "layer_norm_epsilon",
)


# ---------------------------------------------------------------------------------------------------------------- keys


def _ssm_keys(w: GGUFWriter, kernel: int, inner: int, state: int, rank: int, groups: int | None = None) -> None:
    w.add_ssm_conv_kernel(kernel)
    w.add_ssm_inner_size(inner)
    w.add_ssm_state_size(state)
    w.add_ssm_time_step_rank(rank)
    if groups is not None:
        w.add_ssm_group_count(groups)


def _mixer_keys(w: GGUFWriter, hp: HParams) -> None:
    """Values that a Mamba needs not, but the loader wants."""
    w.add_context_length(2**20)
    w.add_embedding_length(hp.hidden)
    w.add_feed_forward_length(0)
    w.add_head_count(0)
    w.add_layer_norm_rms_eps(hp["layer_norm_epsilon"])
    w.add_file_type(0)


def mamba_keys(w: GGUFWriter, hp: HParams) -> None:
    _mixer_keys(w, hp)
    _ssm_keys(w, hp["conv_kernel"], hp["expand"] * hp.hidden, hp["state_size"], hp["time_step_rank"])
    w.add_ssm_dt_b_c_rms(hp["model_type"] == "falcon_mamba")


def mamba2_keys(w: GGUFWriter, hp: HParams) -> None:
    _mixer_keys(w, hp)
    inner = hp["expand"] * hp.hidden
    _ssm_keys(w, hp["conv_kernel"], inner, hp["state_size"], inner // hp["head_dim"], hp["n_groups"])


def _kv_heads(w: GGUFWriter, hp: HParams, kinds: list[str]) -> None:
    w.add_head_count_kv([hp.kv_heads if kind == _FULL else 0 for kind in kinds])


def jamba_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_context_length(hp["max_position_embeddings"])
    w.add_embedding_length(hp.hidden)
    w.add_feed_forward_length(hp["intermediate_size"])
    w.add_head_count(hp.heads)
    offset, period = hp["attn_layer_offset"], hp["attn_layer_period"]
    _kv_heads(w, hp, [_FULL if layer % period == offset else "" for layer in range(hp.layers)])
    _ssm_keys(w, hp["mamba_d_conv"], hp["mamba_expand"] * hp.hidden, hp["mamba_d_state"], hp["mamba_dt_rank"])
    w.add_layer_norm_rms_eps(hp["rms_norm_eps"])
    w.add_expert_count(hp["num_experts"])
    w.add_expert_used_count(hp["num_experts_per_tok"])


def _hybrid_keys(w: GGUFWriter, hp: HParams, kinds: list[str]) -> None:
    heads = hp["mamba_n_heads"]
    _ssm_keys(w, hp["mamba_d_conv"], heads * hp["mamba_d_head"], hp["mamba_d_state"], heads, hp["mamba_n_groups"])
    _kv_heads(w, hp, kinds)


def granite_hybrid_keys(w: GGUFWriter, hp: HParams) -> None:
    common_keys(w, _without_head_dim(hp))
    granite_keys(w, hp)
    _hybrid_keys(w, hp, hp["layer_types"])
    rotated = hp["position_embedding_type"] == "rope"
    w.add_rope_scaling_finetuned(rotated)
    if not rotated:
        w.add_context_length(2**20)


def bamba_keys(w: GGUFWriter, hp: HParams) -> None:
    common_keys(w, _without_head_dim(hp))
    llama_keys(w, hp)
    _hybrid_keys(w, hp, [_FULL if i in hp["attn_layer_indices"] else "" for i in range(hp.layers)])
    rotary_count(w, hp)
    w.add_rope_scaling_finetuned(True)


def _without_head_dim(hp: HParams) -> HParams:
    return HParams({name: value for name, value in hp.items() if name != "head_dim"})


def falcon_h1_keys(w: GGUFWriter, hp: HParams) -> None:
    """`FalconH1Model.set_gguf_parameters`, after Mamba-2's."""
    changes = {"head_count_kv": hp.kv_heads, "key_length": hp.head_dim, "value_length": hp.head_dim}
    plain_keys(w, hp, **changes, layer_norm_rms_eps=hp["rms_norm_eps"], vocab_size=hp["vocab_size"])
    inner = hp["mamba_d_ssm"]
    heads = inner // hp["mamba_d_head"]
    _ssm_keys(w, hp["mamba_d_conv"], inner, hp["mamba_d_state"], heads, hp["mamba_n_groups"])
    w.add_rope_freq_base(hp.rope["rope_theta"])


def nemotron_h_keys(w: GGUFWriter, hp: HParams) -> None:
    kinds = hp["layers_block_type"]
    sparse = "moe" in kinds
    groups = ("n_group", "topk_group") if sparse else ()
    common_keys(w, HParams({name: hp[name] for name in (*_COMMON, *groups)}))
    w.add_layer_norm_rms_eps(hp["layer_norm_epsilon"])
    w.add_vocab_size(hp["vocab_size"])
    w.add_rope_dimension_count(hp.hidden // hp.heads)
    heads = hp["mamba_num_heads"]
    _ssm_keys(w, hp["conv_kernel"], heads * hp["mamba_head_dim"], hp["ssm_state_size"], heads, hp["n_groups"])
    _kv_heads(w, hp, kinds)
    w.add_rope_scaling_finetuned(False)
    w.add_context_length(2**20)
    w.add_key_length(hp["head_dim"])
    w.add_value_length(hp["head_dim"])
    width = hp["moe_intermediate_size"] if sparse else hp["intermediate_size"]
    w.add_feed_forward_length([width if kind in ("mlp", "moe") else 0 for kind in kinds])
    if sparse:
        w.add_expert_used_count(hp["num_experts_per_tok"])
        w.add_expert_feed_forward_length(width)
        w.add_expert_shared_feed_forward_length(hp["moe_shared_expert_intermediate_size"])
        w.add_expert_count(hp["n_routed_experts"])
        w.add_expert_shared_count(hp["n_shared_experts"])
        w.add_expert_weights_norm(hp["norm_topk_prob"])
        w.add_expert_weights_scale(hp["routed_scaling_factor"])
        w.add_expert_group_count(hp["n_group"])


def lfm2_keys(w: GGUFWriter, hp: HParams) -> None:
    _kv_heads(w, hp, hp["layer_types"])
    w.add_vocab_size(hp["vocab_size"])
    w.add_shortconv_l_cache(hp["conv_L_cache"])
    width = hp["intermediate_size"]
    if hp["block_auto_adjust_ff_dim"]:
        width = int(hp["block_ffn_dim_multiplier"] * int(2 * width / 3))
        blocks = (width + hp["block_multiple_of"] - 1) // hp["block_multiple_of"]
        width = hp["block_multiple_of"] * blocks
    w.add_feed_forward_length(width)


def lfm2_moe_keys(w: GGUFWriter, hp: HParams) -> None:
    _kv_heads(w, hp, hp["layer_types"])
    w.add_expert_feed_forward_length(hp["moe_intermediate_size"])
    w.add_leading_dense_block_count(hp["num_dense_layers"])
    w.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    w.add_vocab_size(hp["vocab_size"])
    w.add_shortconv_l_cache(hp["conv_L_cache"])


def qwen3_next_keys(w: GGUFWriter, hp: HParams) -> None:
    for name, add in (
        ("moe_intermediate_size", w.add_expert_feed_forward_length),
        ("shared_expert_intermediate_size", w.add_expert_shared_feed_forward_length),
    ):
        if hp.get(name) is not None:
            add(hp[name])
    heads = hp["linear_num_value_heads"]
    inner, groups = hp["linear_value_head_dim"] * heads, hp["linear_num_key_heads"]
    _ssm_keys(w, hp["linear_conv_kernel_dim"], inner, hp["linear_key_head_dim"], heads, groups)
    w.add_full_attention_interval(hp["layer_types"].index(_FULL) + 1)
    rotary_count(w, hp)


def qwen35_keys(w: GGUFWriter, hp: HParams) -> None:
    qwen3_next_keys(w, hp)
    w.add_rope_dimension_sections([11, 11, 10, 0])


# ------------------------------------------------------------------------------------------------------------- tensors


def mamba_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    out = {}
    for name, values in tensors.items():
        if name.endswith("conv1d.weight"):
            values = values.squeeze()
        if name.endswith(".A_log"):
            values = -np.exp(values, dtype=np.float64).astype(np.float32)  # float32's exp is less exact than torch's
        out[name] = values
    return out


def _mamba2_groups(hp: HParams) -> int:
    return hp.find("n_groups", "mamba_n_groups")


def mamba2_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    out = {}
    for name, values in mamba_tensors(tensors, hp).items():
        if name.endswith((".A_log", ".D")):
            values = values.reshape(*values.shape, 1)
        if name.endswith(("mixer.norm.weight", "mamba.norm.weight")):
            values = values.reshape(_mamba2_groups(hp), -1)
        out[re.sub(r"\.dt_bias$", ".dt_proj.bias", name)] = values
    return out


def jamba_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    return {
        name.replace("feed_forward.experts", "mlp.experts"): values
        for name, values in mamba_tensors(stacked(tensors, hp), hp).items()
    }


def bamba_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    return mamba2_tensors(permuted(tensors, hp), hp)


def granite_hybrid_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    out = {}
    for name, values in mamba2_tensors(granite_moe_tensors(tensors, hp), hp).items():
        if not hp["num_local_experts"]:
            name = name.replace("_shexp", "")
            if match := re.fullmatch(r"model\.layers\.(\d+)\.shared_mlp\.output_linear\.weight", name):
                name = f"blk.{match[1]}.ffn_down.weight"
        out[name] = values
    return out


def falcon_h1_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    """`FalconH1Model.modify_tensors`: weights, with their biases, take in the multipliers."""
    read, gates = hp["attention_in_multiplier"], hp["mlp_multipliers"]
    inner, keys = hp["mamba_d_ssm"], hp["mamba_n_groups"] * hp["mamba_d_state"]
    rows = (inner, inner, keys, keys, hp["mamba_n_heads"])
    factors = {
        "down_proj": gates[1],
        "gate_proj": gates[0],
        "k_proj": hp["key_multiplier"] * read,
        "q_proj": read,
        "v_proj": read,
        "o_proj": hp["attention_out_multiplier"],
        "out_proj": hp["ssm_out_multiplier"],
        "in_proj": hp["ssm_in_multiplier"] * np.repeat(hp["ssm_multipliers"], rows)[:, None],
        "lm_head": hp["lm_head_multiplier"],
        "embed_tokens": hp["embedding_multiplier"],
    }
    return {
        name: values * next((np.float32(factor) for part, factor in factors.items() if part in name.split(".")), 1)
        for name, values in mamba2_tensors(tensors, hp).items()
    }


def nemotron_h_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    return {
        re.sub(r"backbone(\.layers\.\d+)\.mixer\.experts", r"model\1.mlp.experts", name): values
        for name, values in mamba2_tensors(permuted(tensors, hp), hp).items()
    }


def lfm2_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    out = {}
    for name, values in stacked(tensors, hp).items():
        if "conv.conv" in name:
            values = values.squeeze(1)
        name = re.sub(r"^model\.(.*feed_forward\.experts)", r"\1", name)
        out[name.replace(".expert_bias", ".expert_bias.bias")] = values
    return out


def _qwen_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    """What Qwen3-Next and Qwen3.5 have in common."""
    out = {}
    for name, values in mamba_tensors(stacked(tensors, hp), hp).items():
        if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            values = values + 1
        out[re.sub(r"\.dt_bias$", ".dt_proj.bias", name)] = values
    return out


def qwen3_next_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    """Queries, keys, values and gates, which lie together for each key head, are taken apart."""
    out = {}
    keys, values_of = hp["linear_num_key_heads"], hp["linear_num_value_heads"] // hp["linear_num_key_heads"]
    widths = [hp["linear_key_head_dim"]] * 2 + [values_of * hp["linear_value_head_dim"]] * 2
    for name, values in _qwen_tensors(tensors, hp).items():
        if match := re.fullmatch(r"model\.layers\.(\d+)\.linear_attn\.in_proj_qkvz\.weight", name):
            by_head = values.reshape(keys, -1, hp.hidden)
            parts = np.split(by_head, np.cumsum(widths)[:-1], axis=1)
            q, k, v, z = (part.reshape(-1, hp.hidden) for part in parts)
            out[f"blk.{match[1]}.attn_qkv.weight"] = np.concatenate([q, k, v])
            out[f"blk.{match[1]}.attn_gate.weight"] = z
        else:
            out[name] = values
    return out


def qwen3_next_joint_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    """As the converter once did: the joint projection stays as it is."""
    return _qwen_tensors(tensors, hp)


def _tile(values: np.ndarray, hp: HParams, axis: int, width: int) -> np.ndarray:
    """`_reorder_v_heads`: the first value head of every key head comes first, then the second."""
    keys, heads = hp["linear_num_key_heads"], hp["linear_num_value_heads"]
    index = np.arange(heads * width).reshape(keys, heads // keys, width).transpose(1, 0, 2).reshape(-1)
    return values.take(index, axis)


def qwen35_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    out = {}
    width, keys = hp["linear_value_head_dim"], 2 * hp["linear_num_key_heads"] * hp["linear_key_head_dim"]
    for name, values in _qwen_tensors(tensors, hp).items():
        if ".in_proj_qkv." in name or "linear_attn.conv1d" in name:
            values = np.concatenate([values[:keys], _tile(values[keys:], hp, 0, width)])
        elif ".in_proj_z." in name:
            values = _tile(values, hp, 0, width)
        elif re.search(r"\.in_proj_[ab]\.|linear_attn\.(A_log|dt_proj)", name):
            values = _tile(values, hp, 0, 1)
        elif "linear_attn.out_proj" in name:
            values = _tile(values, hp, 1, width)
        out[name] = values
    return out

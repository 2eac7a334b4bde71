"""Writes Hugging Face checkpoints as GGUF the way llama.cpp's converter does: its rules, model by model.

The names come from the `gguf` package; keys and changes to tensors are what `convert_hf_to_gguf.py` and its parts in
https://github.com/ggml-org/llama.cpp/tree/master/conversion do.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter, RopeScalingType, get_tensor_name_map
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from gguf_files import save
from safetensors.numpy import load_file

Tensors = dict[str, np.ndarray]
Kind = GGMLQuantizationType


class HParams(dict[str, Any]):
    """config.json with the converter's way to look things up: the first of several names."""

    def find(self, *names: str, default: Any = None) -> Any:
        return next((self[name] for name in names if self.get(name) is not None), default)

    @property
    def heads(self) -> int:
        return self.find("num_attention_heads", "n_head", "n_heads")

    @property
    def kv_heads(self) -> int:
        return self.find("num_key_value_heads", "num_kv_heads", default=self.heads)

    @property
    def layers(self) -> int:
        return self.find("num_hidden_layers", "n_layer", "n_layers")

    @property
    def hidden(self) -> int:
        return self.find("hidden_size", "n_embd", "d_model")

    @property
    def head_dim(self) -> int:
        return self.find("head_dim", default=self.hidden // self.heads)

    @property
    def rope(self) -> dict[str, Any]:
        """Of layers that see all tokens."""
        rope = self.get("rope_parameters") or {}
        return rope.get("full_attention", rope)


@dataclasses.dataclass
class Recipe:
    """What the converter does for one kind of model.

    Attributes:
      arch: its architecture.
      keys: writes its hyperparameters; the common ones come first where `common`.
      tensors: changes the checkpoint's tensors before they are named.
      extra: tensors that come from the configuration.
    """

    arch: MODEL_ARCH
    keys: Callable[[GGUFWriter, HParams], None] = lambda writer, hp: None
    tensors: Callable[[Tensors, HParams], Tensors] = lambda tensors, hp: tensors
    extra: Callable[[HParams], Tensors] = lambda hp: {}
    common: bool = True


# --------------------------------------------------------------------------------------------------- hyperparameters


def common_keys(w: GGUFWriter, hp: HParams) -> None:
    """`TextModel.set_gguf_parameters`."""
    optional = {
        w.add_context_length: ("max_position_embeddings", "n_ctx", "n_positions"),
        w.add_embedding_length: ("hidden_size", "n_embd"),
        w.add_feed_forward_length: ("intermediate_size", "n_inner"),
        w.add_head_count: ("num_attention_heads", "n_head", "n_heads"),
        w.add_head_count_kv: ("num_key_value_heads",),
        w.add_layer_norm_rms_eps: ("rms_norm_eps", "norm_eps"),
        w.add_layer_norm_eps: ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        w.add_expert_count: ("num_local_experts", "num_experts"),
        w.add_expert_used_count: ("num_experts_per_tok",),
        w.add_expert_group_count: ("n_group",),
        w.add_expert_group_used_count: ("topk_group",),
        w.add_key_length: ("head_dim",),
        w.add_value_length: ("head_dim",),
    }
    for add, names in optional.items():
        if (value := hp.find(*names)) is not None:
            add(value)
    rope_keys(w, hp)
    w.add_file_type(0)


def rope_keys(w: GGUFWriter, hp: HParams) -> None:
    rope = hp.rope
    kind, factor = rope.get("rope_type"), rope.get("factor")
    if kind == "linear":
        w.add_rope_scaling_type(RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(factor)
    elif kind == "yarn":
        w.add_rope_scaling_type(RopeScalingType.YARN)
        w.add_rope_scaling_factor(factor)
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for name, add in (
            ("attention_factor", w.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", w.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", w.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(name) is not None:
                add(rope[name])
    elif kind == "longrope":
        w.add_rope_scaling_type(RopeScalingType.LONGROPE)
    if rope.get("rope_theta") is not None:
        w.add_rope_freq_base(rope["rope_theta"])


def rotated(hp: HParams) -> int:
    return int(hp.head_dim * (hp.rope.get("partial_rotary_factor") or 1.0))


def plain_keys(w: GGUFWriter, hp: HParams, **changes: Any) -> None:
    """The keys that recipes without the common ones share; `changes` replace values."""
    values = {
        "context_length": hp.find("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
        "embedding_length": hp.hidden,
        "feed_forward_length": hp.find("intermediate_size", "n_inner", "ffn_hidden_size", default=4 * hp.hidden),
        "head_count": hp.heads,
    } | changes
    for name, value in values.items():
        if value is not None:
            getattr(w, f"add_{name}")(value)
    w.add_file_type(0)


def llama_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_vocab_size(hp["vocab_size"])
    w.add_rope_dimension_count(hp.head_dim)


def rotary_count(w: GGUFWriter, hp: HParams) -> None:
    w.add_rope_dimension_count(rotated(hp))


def pattern(w: GGUFWriter, hp: HParams) -> None:
    if hp.get("sliding_window") is not None:
        w.add_sliding_window(hp["sliding_window"])
        w.add_sliding_window_pattern([kind == "sliding_attention" for kind in hp["layer_types"]])


def granite_keys(w: GGUFWriter, hp: HParams) -> None:
    llama_keys(w, hp)
    w.add_attention_scale(hp["attention_multiplier"])
    w.add_embedding_scale(hp["embedding_multiplier"])
    w.add_residual_scale(hp["residual_multiplier"])
    w.add_logit_scale(hp["logits_scaling"])
    if hp.get("shared_intermediate_size"):
        w.add_expert_shared_feed_forward_length(hp["shared_intermediate_size"])


def minicpm_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_embedding_scale(hp["embedding_multiplier"])
    w.add_residual_scale(hp["residual_multiplier"])
    w.add_logit_scale(hp["logits_scaling"])


def ministral3_keys(w: GGUFWriter, hp: HParams) -> None:
    llama_keys(w, hp)
    w.add_rope_scaling_yarn_log_mul(hp.rope["mscale_all_dim"])
    w.add_attn_temperature_scale(hp.rope["llama_4_scaling_beta"])


def gemma_keys(w: GGUFWriter, hp: HParams) -> None:
    heads = {"head_count_kv": hp.kv_heads, "key_length": hp.head_dim, "value_length": hp.head_dim}
    plain_keys(w, hp, **heads, layer_norm_rms_eps=hp["rms_norm_eps"])


def gemma2_keys(w: GGUFWriter, hp: HParams) -> None:
    gemma_keys(w, hp)
    w.add_attn_logit_softcapping(hp["attn_logit_softcapping"])
    w.add_final_logit_softcapping(hp["final_logit_softcapping"])
    w.add_sliding_window(hp["sliding_window"])


def gemma3_keys(w: GGUFWriter, hp: HParams) -> None:
    if hp.get("final_logit_softcapping"):
        w.add_final_logit_softcapping(hp["final_logit_softcapping"])
    w.add_sliding_window(hp["sliding_window"])
    w.add_rope_freq_base_swa(hp["rope_parameters"]["sliding_attention"]["rope_theta"])


def gpt_neox_keys(w: GGUFWriter, hp: HParams) -> None:
    plain_keys(w, hp, rope_dimension_count=rotated(hp), layer_norm_eps=hp["layer_norm_eps"])
    w.add_parallel_residual(hp["use_parallel_residual"])


def falcon_keys(w: GGUFWriter, hp: HParams) -> None:
    kv = hp["num_kv_heads"] if hp["new_decoder_architecture"] else 1
    w.add_tensor_data_layout("jploski")
    plain_keys(w, hp, head_count_kv=kv, layer_norm_eps=hp["layer_norm_epsilon"])


def mpt_keys(w: GGUFWriter, hp: HParams) -> None:
    attention = hp["attn_config"]
    plain_keys(w, hp, layer_norm_eps=1e-5, max_alibi_bias=float(attention["alibi_bias_max"]))
    if attention["clip_qkv"] is not None:
        w.add_clamp_kqv(attention["clip_qkv"])


def phi2_keys(w: GGUFWriter, hp: HParams) -> None:
    changes = {"head_count_kv": hp.kv_heads, "layer_norm_eps": hp["layer_norm_eps"]}
    plain_keys(w, hp, **changes, rope_dimension_count=rotated(hp))


def phi3_keys(w: GGUFWriter, hp: HParams) -> None:
    changes = {"head_count_kv": hp.kv_heads, "layer_norm_rms_eps": hp["rms_norm_eps"]}
    plain_keys(w, hp, **changes, rope_dimension_count=rotated(hp))
    w.add_rope_scaling_orig_ctx_len(original_context(hp))
    w.add_rope_freq_base(hp.rope["rope_theta"])
    w.add_sliding_window(hp.get("sliding_window") or 0)
    stretch = hp["max_position_embeddings"] / original_context(hp)
    if hp.rope["rope_type"] == "longrope":
        w.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(stretch) / np.log(original_context(hp)))))


def original_context(hp: HParams) -> int:
    default = hp.get("original_max_position_embeddings") or hp["max_position_embeddings"]
    return hp.rope.get("original_max_position_embeddings") or default


def phimoe_keys(w: GGUFWriter, hp: HParams) -> None:
    phi3_keys(w, hp)
    w.add_expert_used_count(hp["num_experts_per_tok"])
    w.add_expert_count(hp["num_local_experts"])


def stablelm_keys(w: GGUFWriter, hp: HParams) -> None:
    changes = {"head_count_kv": hp.kv_heads, "layer_norm_eps": hp["layer_norm_eps"]}
    plain_keys(w, hp, **changes, rope_dimension_count=rotated(hp))
    w.add_parallel_residual(hp["use_parallel_residual"])


def olmo_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_layer_norm_eps(1e-5)
    if hp.get("clip_qkv") is not None:
        w.add_clamp_kqv(hp["clip_qkv"])


def cohere_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_logit_scale(hp["logit_scale"])
    w.add_rope_scaling_type(RopeScalingType.NONE)


def cohere2_keys(w: GGUFWriter, hp: HParams) -> None:
    cohere_keys(w, hp)
    w.add_sliding_window(hp["sliding_window"])
    w.add_vocab_size(hp["vocab_size"])
    w.add_rope_dimension_count(hp.hidden // hp.heads)


def glm_keys(w: GGUFWriter, hp: HParams) -> None:
    changes = {"head_count_kv": hp.kv_heads, "layer_norm_rms_eps": hp["rms_norm_eps"]}
    plain_keys(w, hp, **changes, rope_dimension_count=rotated(hp), rope_freq_base=hp.rope["rope_theta"])


def nemotron_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_vocab_size(hp["vocab_size"])
    w.add_layer_norm_eps(hp["norm_eps"])
    rotary_count(w, hp)
    w.add_rope_scaling_type(RopeScalingType.NONE)


def qwen2_moe_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_expert_feed_forward_length(hp["moe_intermediate_size"])
    if hp.get("shared_expert_intermediate_size"):
        w.add_expert_shared_feed_forward_length(hp["shared_expert_intermediate_size"])


def routed_keys(w: GGUFWriter, hp: HParams) -> None:
    """What DeepSeek's and GLM's and dots' experts have in common."""
    dense = hp.get("mlp_layer_types", []).count("dense")  # what newer configurations have instead
    w.add_leading_dense_block_count(hp.find("first_k_dense_replace", default=dense))
    w.add_expert_feed_forward_length(hp["moe_intermediate_size"])
    w.add_expert_count(hp["n_routed_experts"])
    w.add_expert_shared_count(hp["n_shared_experts"])
    w.add_expert_weights_scale(hp["routed_scaling_factor"])
    if hp["norm_topk_prob"]:
        w.add_expert_weights_norm(True)


def glm4_moe_keys(w: GGUFWriter, hp: HParams) -> None:
    rotary_count(w, hp)
    routed_keys(w, hp)
    w.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    w.add_nextn_predict_layers(hp.get("num_nextn_predict_layers") or 0)


def dbrx_keys(w: GGUFWriter, hp: HParams) -> None:
    attention, ffn = hp["attn_config"], hp["ffn_config"]
    plain_keys(w, hp, feed_forward_length=ffn["ffn_hidden_size"], head_count_kv=attention["kv_n_heads"])
    w.add_rope_freq_base(attention["rope_theta"])
    w.add_clamp_kqv(attention["clip_qkv"])
    w.add_expert_count(ffn["moe_num_experts"])
    w.add_expert_used_count(ffn["moe_top_k"])
    w.add_layer_norm_eps(1e-5)


def minimax_m2_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_expert_feed_forward_length(hp["intermediate_size"])
    rotary_count(w, hp)
    w.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)


def afmoe_keys(w: GGUFWriter, hp: HParams) -> None:
    llama_keys(w, hp)
    w.add_expert_shared_count(hp["num_shared_experts"])
    w.add_expert_feed_forward_length(hp["moe_intermediate_size"])
    w.add_leading_dense_block_count(hp["num_dense_layers"])
    w.add_expert_weights_norm(True)
    w.add_expert_weights_scale(hp["route_scale"])
    w.add_sliding_window(hp["sliding_window"])


def exaone_moe_keys(w: GGUFWriter, hp: HParams) -> None:
    pattern(w, hp)
    w.add_expert_feed_forward_length(hp["moe_intermediate_size"])
    w.add_expert_shared_count(hp["num_shared_experts"])
    w.add_expert_shared_feed_forward_length(hp["moe_intermediate_size"] * hp["num_shared_experts"])
    w.add_expert_weights_scale(hp["routed_scaling_factor"])
    w.add_expert_weights_norm(hp["norm_topk_prob"])
    w.add_leading_dense_block_count(hp["first_k_dense_replace"])
    w.add_nextn_predict_layers(0)
    w.add_rope_scaling_type(RopeScalingType.NONE)


def dots1_keys(w: GGUFWriter, hp: HParams) -> None:
    routed_keys(w, hp)
    w.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)


def ernie4_5_moe_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_expert_count(hp["moe_num_experts"])
    w.add_expert_used_count(hp["moe_k"])
    w.add_interleave_moe_layer_step(hp["moe_layer_interval"])
    w.add_leading_dense_block_count(hp["moe_layer_start_index"])
    w.add_expert_feed_forward_length(hp["moe_intermediate_size"])
    w.add_expert_shared_count(hp["moe_num_shared_experts"])
    if hp["moe_num_shared_experts"]:
        w.add_expert_shared_feed_forward_length(hp["intermediate_size"] // hp.kv_heads)


def hunyuan_moe_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_expert_shared_feed_forward_length(hp["intermediate_size"])
    w.add_expert_feed_forward_length(hp["intermediate_size"])
    w.add_expert_used_count(hp["moe_topk"])
    w.add_expert_shared_count(1)


def hunyuan_keys(w: GGUFWriter, hp: HParams) -> None:
    if hp.rope["rope_type"] == "dynamic":
        width = hp.head_dim
        w.add_rope_freq_base(hp.rope["rope_theta"] * hp.rope["alpha"] ** (width / (width - 2)))
        w.add_rope_scaling_type(RopeScalingType.NONE)
        w.add_rope_scaling_factor(1)
        w.add_rope_scaling_orig_ctx_len(256 * 1024)


def gpt_oss_keys(w: GGUFWriter, hp: HParams) -> None:
    w.add_sliding_window(hp["sliding_window"])
    w.add_expert_feed_forward_length(hp["intermediate_size"])


def llama4_keys(w: GGUFWriter, hp: HParams) -> None:
    llama_keys(w, hp)
    w.add_feed_forward_length(hp["intermediate_size_mlp"])
    w.add_interleave_moe_layer_step(hp["interleave_moe_layer_step"])
    w.add_expert_feed_forward_length(hp["intermediate_size"])
    if all(kind == "full_attention" for kind in hp["layer_types"]):
        w.add_sliding_window(0)


def deepseek_keys(w: GGUFWriter, hp: HParams, *, absorbed: bool = True) -> None:
    head, rank = hp["qk_nope_head_dim"] + hp["qk_rope_head_dim"], hp["kv_lora_rank"]
    w.add_vocab_size(hp["vocab_size"])
    if hp.get("q_lora_rank") is not None:
        w.add_q_lora_rank(hp["q_lora_rank"])
    w.add_kv_lora_rank(rank)
    if absorbed:
        w.add_head_count_kv(1)
        w.add_key_length(rank + hp["qk_rope_head_dim"])
        w.add_value_length(rank)
        w.add_key_length_mla(head)
        w.add_value_length_mla(hp["v_head_dim"])
    else:
        w.add_key_length(head)
        w.add_value_length(hp["v_head_dim"])
    w.add_rope_dimension_count(hp["qk_rope_head_dim"])
    if hp.get("n_routed_experts") is None:
        w.add_leading_dense_block_count(hp.layers)
        w.add_expert_feed_forward_length(hp["intermediate_size"])
        w.add_expert_shared_count(0)
    else:
        routed_keys(w, hp)
    if hp["model_type"] not in ("deepseek_v2", "youtu"):
        w.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    if (scale := hp.rope.get("mscale_all_dim")) is not None:
        w.add_rope_scaling_yarn_log_mul(0.1 * scale)


def old_deepseek_keys(w: GGUFWriter, hp: HParams) -> None:
    deepseek_keys(w, hp, absorbed=False)


def minicpm3_keys(w: GGUFWriter, hp: HParams) -> None:
    plain_keys(w, hp, head_count_kv=hp.kv_heads, layer_norm_rms_eps=hp["rms_norm_eps"], vocab_size=hp["vocab_size"])
    if hp.get("q_lora_rank") is not None:
        w.add_q_lora_rank(hp["q_lora_rank"])
    w.add_kv_lora_rank(hp["kv_lora_rank"])
    w.add_key_length(hp["qk_nope_head_dim"] + hp["qk_rope_head_dim"])
    w.add_rope_dimension_count(hp["qk_rope_head_dim"])


def with_eps(**fields: str) -> Callable[[GGUFWriter, HParams], None]:
    """Plain keys with an eps, given the writer's name and config.json's."""

    def keys(w: GGUFWriter, hp: HParams) -> None:
        changes = {name: hp[field] for name, field in fields.items()}
        plain_keys(w, hp, **changes)

    return keys


# ----------------------------------------------------------------------------------------------------------- tensors


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute`."""
    shape = (heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)


def permuted(tensors: Tensors, hp: HParams) -> Tensors:
    out = {}
    for name, values in stacked(tensors, hp).items():
        if name.endswith(("q_proj.weight", "q_proj.bias")):
            values = permute(values, hp.heads)
        if name.endswith(("k_proj.weight", "k_proj.bias")):
            values = permute(values, hp.kv_heads)
        out[name] = values
    return out


def stacked(tensors: Tensors, hp: HParams) -> Tensors:
    """Experts of one layer and projection become one tensor, under the name the name table knows."""
    out: Tensors = {}
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, values in tensors.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            found.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = values
        else:
            out[name.replace("e_score_correction_bias", "e_score_correction.bias")] = values
    for name, parts in found.items():
        name = re.sub(r"model\.(layers\.\d+)\.block_sparse_moe", r"\1.feed_forward", name)
        out[name] = np.stack([parts[index] for index in range(len(parts))])
    return out


def plus_one(tensors: Tensors, hp: HParams) -> Tensors:
    return {name: values + 1 if name.endswith("norm.weight") else values for name, values in tensors.items()}


def gpt2_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    linear = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    return {name: values.T if name.endswith(linear) else values for name, values in tensors.items()}


def heads_apart(tensors: Tensors, hp: HParams) -> Tensors:
    """Bloom's and GPT-NeoX' fused projections: all queries, all keys, all values."""
    out = {}
    for name, values in tensors.items():
        if "query_key_value" in name:
            parts = values.reshape(hp.heads, 3, -1, *values.shape[1:])
            values = np.concatenate([parts[:, i].reshape(-1, *values.shape[1:]) for i in range(3)])
        out[name.removeprefix("transformer.") if hp["model_type"] == "bloom" else name] = values
    return out


def falcon_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    groups = hp["num_kv_heads"] if hp["new_decoder_architecture"] else 1
    out = {}
    for name, values in tensors.items():
        if name.endswith("query_key_value.weight"):
            qkv = values.reshape(groups, hp.heads // groups + 2, -1, values.shape[1])
            parts = (qkv[:, :-2], qkv[:, [-2]], qkv[:, [-1]])
            values = np.concatenate([part.reshape(-1, values.shape[1]) for part in parts])
        out[name] = values
    return out


def stablelm_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    out: Tensors = {}
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, values in tensors.items():
        if match := re.fullmatch(r"(.*_layernorm)\.norms\.(\d+)\.weight", name):
            found.setdefault(f"{match[1]}.weight", {})[int(match[2])] = values
        else:
            out[name] = values
    return out | {name: np.stack([parts[i] for i in range(len(parts))]) for name, parts in found.items()}


def dbrx_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    ffn, out = hp["ffn_config"], {}
    for name, values in tensors.items():
        if ".experts.mlp." in name:
            values = values.reshape(ffn["moe_num_experts"], ffn["ffn_hidden_size"], hp.hidden)
            out[f"{name}.weight"] = values.swapaxes(1, 2) if name.endswith("w2") else values
        else:
            out[name] = values
    return out


def afmoe_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    return {name.replace(".expert_bias", ".expert_bias.bias"): v for name, v in stacked(tensors, hp).items()}


def granite_moe_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    out = {}
    for name, values in permuted(tensors, hp).items():
        if name.endswith("input_linear.weight"):
            gate, up = np.split(values, 2, axis=-2)
            kind = "shexp" if "shared_mlp" in name else "exps"
            layer = name.split(".")[2]
            out |= {f"blk.{layer}.ffn_gate_{kind}.weight": gate, f"blk.{layer}.ffn_up_{kind}.weight": up}
        else:
            out[name] = values
    return out


def gpt_oss_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    out = {}
    for name, values in tensors.items():
        if name.endswith("gate_up_proj_bias"):
            for part, start in (("gate", 0), ("up", 1)):
                out[name.replace("gate_up_proj_bias", f"{part}_proj.bias")] = values[:, start::2]
        elif name.endswith("gate_up_proj"):
            for part, start in (("gate", 0), ("up", 1)):
                rows = values.swapaxes(-1, -2)[:, start::2]
                out[name.replace("gate_up_proj", f"{part}_proj.weight")] = rows
        elif name.endswith("experts.down_proj"):
            out[f"{name}.weight"] = values.swapaxes(-1, -2)
        else:
            renamed = name.replace("down_proj_bias", "down_proj.bias")
            out[f"{renamed}.weight" if renamed.endswith("sinks") else renamed] = values
    return out


def llama4_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    out = {}
    for name, values in tensors.items():
        if name.endswith("gate_up_proj"):
            gate, up = np.split(values.swapaxes(-1, -2), 2, axis=-2)
            out[name.replace("gate_up_proj", "gate_proj.weight")] = gate
            out[name.replace("gate_up_proj", "up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            out[f"{name}.weight"] = values.swapaxes(-1, -2)
        else:
            out[name] = values
    return out


def deepseek_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    out = {}
    for name, values in stacked(tensors, hp).items():
        if name.endswith("kv_b_proj.weight"):
            kv = values.reshape(hp.heads, -1, values.shape[-1])
            keys, rest = kv[:, : hp["qk_nope_head_dim"]], kv[:, hp["qk_nope_head_dim"] :]
            out[name.replace("kv_b_proj", "k_b_proj")] = keys.swapaxes(1, 2)
            out[name.replace("kv_b_proj", "v_b_proj")] = rest
        else:
            out[name] = values
    return out


def longrope_tensors(hp: HParams) -> Tensors:
    if hp.rope["rope_type"] != "longrope":
        return {}
    return {f"rope_factors_{kind}.weight": np.float32(hp.rope[f"{kind}_factor"]) for kind in ("long", "short")}


def llama3_tensors(hp: HParams) -> Tensors:
    """`rope_freqs.weight`: what Llama 3's rotary frequencies are divided by."""
    rope = hp.rope
    if rope.get("rope_type") != "llama3":
        return {}
    width = hp.head_dim
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, width, 2, dtype=np.float32) / width)
    original, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for wavelength in 2 * np.pi / frequencies:
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": np.float32(divisors)}


def apertus_keys(w: GGUFWriter, hp: HParams) -> None:
    llama_keys(w, hp)


def apertus_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    return {name: values for name, values in tensors.items() if ".act_fn." not in name}


# ----------------------------------------------------------------------------------------------------------- recipes

A = MODEL_ARCH
LLAMA = Recipe(A.LLAMA, llama_keys, permuted, llama3_tensors)
RECIPES: dict[str, Recipe] = {
    "llama": LLAMA,
    "mixtral": LLAMA,
    "mistral3": Recipe(A.MISTRAL3, llama_keys, permuted),
    "ministral3": Recipe(A.MISTRAL3, ministral3_keys, permuted),
    "qwen2": Recipe(A.QWEN2),
    "qwen2vl": Recipe(A.QWEN2VL, lambda w, hp: w.add_rope_dimension_sections([1, 1, 2, 0])),
    "qwen3": Recipe(A.QWEN3),
    "qwen3vl": Recipe(A.QWEN3VL, lambda w, hp: w.add_num_deepstack_layers(0)),
    "granite": Recipe(A.GRANITE, granite_keys, permuted),
    "minicpm": Recipe(A.MINICPM, minicpm_keys, permuted),
    "chatglm": Recipe(A.CHATGLM, glm_keys, common=False),
    "glm4": Recipe(A.GLM4, rotary_count),
    "phi2": Recipe(A.PHI2, phi2_keys, common=False),
    "phi3": Recipe(A.PHI3, phi3_keys, extra=longrope_tensors, common=False),
    "stablelm": Recipe(A.STABLELM, stablelm_keys, stablelm_tensors, common=False),
    "starcoder2": Recipe(A.STARCODER2),
    "olmo": Recipe(A.OLMO, olmo_keys, permuted),
    "olmo2": Recipe(A.OLMO2, pattern),
    "exaone4": Recipe(A.EXAONE4, pattern, extra=llama3_tensors),
    "smollm3": Recipe(A.SMOLLM3, llama_keys, permuted),
    "command-r": Recipe(A.COMMAND_R, cohere_keys),
    "cohere2": Recipe(A.COHERE2, cohere2_keys),
    "nemotron": Recipe(A.NEMOTRON, nemotron_keys, plus_one),
    "arcee": Recipe(A.ARCEE, llama_keys, permuted),
    "jais2": Recipe(A.JAIS2, rotary_count),
    "seed_oss": Recipe(A.SEED_OSS),
    "ernie4_5": Recipe(A.ERNIE4_5),
    "hunyuan-dense": Recipe(A.HUNYUAN_DENSE, hunyuan_keys),
    "apertus": Recipe(A.APERTUS, apertus_keys, apertus_tensors, llama3_tensors),
    "gemma": Recipe(A.GEMMA, gemma_keys, plus_one, common=False),
    "gemma2": Recipe(A.GEMMA2, gemma2_keys, plus_one, common=False),
    "gemma3": Recipe(A.GEMMA3, gemma3_keys, plus_one),
    "gpt2": Recipe(A.GPT2, with_eps(layer_norm_eps="layer_norm_epsilon"), gpt2_tensors, common=False),
    "gptneox": Recipe(A.GPTNEOX, gpt_neox_keys, heads_apart, common=False),
    "starcoder": Recipe(
        A.STARCODER, with_eps(layer_norm_eps="layer_norm_epsilon", head_count_kv="num_key_value_heads"), common=False
    ),
    "bloom": Recipe(A.BLOOM, with_eps(layer_norm_eps="layer_norm_epsilon"), heads_apart, common=False),
    "falcon": Recipe(A.FALCON, falcon_keys, falcon_tensors, common=False),
    "mpt": Recipe(A.MPT, mpt_keys, common=False),
    "qwen2moe": Recipe(A.QWEN2MOE, qwen2_moe_keys, stacked),
    "qwen3moe": Recipe(A.QWEN3MOE, qwen2_moe_keys, stacked),
    "olmoe": Recipe(A.OLMOE, lambda w, hp: w.add_layer_norm_rms_eps(1e-5), stacked),
    "phimoe": Recipe(A.PHIMOE, phimoe_keys, stacked, longrope_tensors, common=False),
    "granitemoe": Recipe(A.GRANITE_MOE, granite_keys, granite_moe_tensors),
    "ernie4_5-moe": Recipe(A.ERNIE4_5_MOE, ernie4_5_moe_keys, stacked),
    "hunyuan-moe": Recipe(A.HUNYUAN_MOE, hunyuan_moe_keys, stacked),
    "gpt-oss": Recipe(A.GPT_OSS, gpt_oss_keys, gpt_oss_tensors),
    "glm4moe": Recipe(A.GLM4_MOE, glm4_moe_keys, stacked),
    "qwen3vlmoe": Recipe(A.QWEN3VLMOE, qwen2_moe_keys, stacked),
    "dbrx": Recipe(A.DBRX, dbrx_keys, dbrx_tensors, common=False),
    "minimax-m2": Recipe(A.MINIMAXM2, minimax_m2_keys, stacked),
    "afmoe": Recipe(A.AFMOE, afmoe_keys, afmoe_tensors),
    "exaone-moe": Recipe(A.EXAONE_MOE, exaone_moe_keys, stacked),
    "dots1": Recipe(A.DOTS1, dots1_keys, stacked),
    "llama4": Recipe(A.LLAMA4, llama4_keys, llama4_tensors, llama3_tensors),
    "deepseek2": Recipe(A.DEEPSEEK2, deepseek_keys, deepseek_tensors),
    "old deepseek2": Recipe(A.DEEPSEEK2, old_deepseek_keys, stacked),
    "minicpm3": Recipe(A.MINICPM3, minicpm3_keys, extra=longrope_tensors, common=False),
}


def convert_to_gguf(
    checkpoint: Path,
    path: Path,
    recipe: str,
    kind: Callable[[str, np.ndarray], Kind] = lambda name, values: Kind.F32,
    change: Callable[[GGUFWriter], None] = lambda writer: None,
    **writer: Any,
) -> list[Path]:
    """Writes a checkpoint's directory as a GGUF file by one of `RECIPES`; returns the files.

    Args:
      kind: a tensor's storage type, given its name in the file and its values.
      change: called with the writer at the end, to change or add keys and tensors.
      writer: further arguments of `GGUFWriter`.
    """
    from transformers import AutoConfig

    hp = HParams(AutoConfig.from_pretrained(checkpoint).to_dict())
    rule = RECIPES[recipe]
    w = GGUFWriter(path, MODEL_ARCH_NAMES[rule.arch], **writer)
    w.add_block_count(hp.layers)
    if rule.common:
        common_keys(w, hp)
    rule.keys(w, hp)
    if "xielu" in json.dumps(hp.get("hidden_act")):
        _add_xielu(w, checkpoint, hp)
    for name, values in _named(rule, _load(checkpoint), hp):
        storage = kind(name, values)
        w.add_tensor(name, _stored(values, storage), raw_dtype=storage)
    change(w)
    save(w)
    return sorted(path.parent.glob(f"{path.stem}*.gguf"))


def _load(checkpoint: Path) -> Tensors:
    return {name: values for file in checkpoint.glob("*.safetensors") for name, values in load_file(file).items()}


def _named(rule: Recipe, tensors: Tensors, hp: HParams) -> Iterator[tuple[str, np.ndarray]]:
    table = get_tensor_name_map(rule.arch, hp.layers)
    for name, values in (rule.tensors(tensors, hp) | rule.extra(hp)).items():
        known = name.startswith("blk.") or name.startswith("rope_f")
        new = name if known else table.get_name(name, (".weight", ".bias"))
        assert new is not None, f"the name table of {rule.arch.name} does not know {name}"
        yield new, values.astype(np.float32)


def _stored(values: np.ndarray, kind: Kind) -> np.ndarray:
    from gguf.quants import quantize

    return quantize(np.ascontiguousarray(values), kind)


def _add_xielu(w: GGUFWriter, checkpoint: Path, hp: HParams) -> None:
    tensors = _load(checkpoint)
    for name in ("alpha_n", "alpha_p", "beta", "eps"):
        values = [float(tensors[f"model.layers.{i}.mlp.act_fn.{name}"].item()) for i in range(hp.layers)]
        getattr(w, f"add_xielu_{name}")(values)

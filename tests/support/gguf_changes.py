"""What llama.cpp's converter does to a Hugging Face checkpoint's tensors before it names them: one function a model."""

from __future__ import annotations

import re

import numpy as np
from gguf_hparams import HParams

Tensors = dict[str, np.ndarray]


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute`."""
    shape = (heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)


def olmo_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    """As `permuted`, but biases stay as they are."""
    return permuted(tensors, hp) | {name: values for name, values in tensors.items() if name.endswith("bias")}


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


def fused_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    """Phi-2 as it was before transformers had it: queries, keys and values in one."""
    parts = [{name: v for name, v in tensors.items() if f".{part}_proj." in name} for part in "qkv"]
    fused = {name.replace("q_proj", "qkv_proj"): name for name in parts[0]}
    joined = {
        re.sub(r"model\.layers\.(\d+)\.self_attn\.qkv_proj", r"blk.\1.attn_qkv", new): np.concatenate(
            [part[name.replace("q_proj", f"{letter}_proj")] for letter, part in zip("qkv", parts, strict=True)]
        )
        for new, name in fused.items()
    }
    apart = {name for part in parts for name in part}
    return {name: values for name, values in tensors.items() if name not in apart} | joined


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
    return {
        f"rope_factors_{kind}.weight": np.array(hp.rope[f"{kind}_factor"], np.float32) for kind in ("long", "short")
    }


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
    return {"rope_freqs.weight": np.array(divisors, np.float32)}


def apertus_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    return {name: values for name, values in tensors.items() if ".act_fn." not in name}


def gemma4_tensors(tensors: Tensors, hp: HParams) -> Tensors:
    return {f"{name}.weight" if name.endswith("layer_scalar") else name: v for name, v in tensors.items()}


def proportional_tensors(hp: HParams) -> Tensors:
    """`rope_freqs.weight` of Gemma 4: channels that do not turn are divided by next to infinity."""
    half = next(iter(hp["per_layer_config"].values()))["head_dim"] // 2
    turning = int(half * hp.rope["partial_rotary_factor"])
    return {"rope_freqs.weight": np.array([1.0] * turning + [1e30] * (half - turning), np.float32)}

"""Writes Hugging Face checkpoints as GGUF the way llama.cpp's converter does: its rules, model by model.

The names come from the `gguf` package; keys and changes to tensors are what `convert_hf_to_gguf.py` and its parts in
https://github.com/ggml-org/llama.cpp/tree/master/conversion do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf_changes as changes
import gguf_keys as keys
import gguf_recurrent as recurrent
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, get_tensor_name_map
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from gguf_changes import Tensors
from gguf_files import save
from gguf_hparams import HParams
from safetensors.numpy import load_file


@dataclasses.dataclass
class Recipe:
    """What the converter does for one kind of model.

    Attributes:
      arch: its architecture.
      keys: writes its hyperparameters; the common ones come first where `common`.
      tensors: changes the checkpoint's tensors before they are named.
      extra: tensors that come from the configuration.
      values: writes hyperparameters that come from tensors.
    """

    arch: MODEL_ARCH
    keys: Callable[[GGUFWriter, HParams], None] = lambda writer, hp: None
    tensors: Callable[[Tensors, HParams], Tensors] = lambda tensors, hp: tensors
    extra: Callable[[HParams], Tensors] = lambda hp: {}
    values: Callable[[GGUFWriter, Tensors, HParams], None] = lambda writer, tensors, hp: None
    common: bool = True


A = MODEL_ARCH
LLAMA = Recipe(A.LLAMA, keys.llama_keys, changes.permuted, changes.llama3_tensors)
RECIPES: dict[str, Recipe] = {
    "llama": LLAMA,
    "mixtral": LLAMA,
    "mistral3": Recipe(A.MISTRAL3, keys.llama_keys, changes.permuted),
    "ministral3": Recipe(A.MISTRAL3, keys.ministral3_keys, changes.permuted),
    "qwen2": Recipe(A.QWEN2),
    "qwen2vl": Recipe(A.QWEN2VL, lambda w, hp: w.add_rope_dimension_sections([1, 1, 2, 0])),
    "qwen3": Recipe(A.QWEN3),
    "qwen3vl": Recipe(A.QWEN3VL, lambda w, hp: w.add_num_deepstack_layers(0)),
    "internlm2": Recipe(A.INTERNLM2, tensors=changes.permuted),
    "exaone": Recipe(A.EXAONE, keys.rotary_count, extra=changes.llama3_tensors),
    "granite": Recipe(A.GRANITE, keys.granite_keys, changes.permuted),
    "minicpm": Recipe(A.MINICPM, keys.minicpm_keys, changes.permuted),
    "chatglm": Recipe(A.CHATGLM, keys.glm_keys, common=False),
    "glm4": Recipe(A.GLM4, keys.rotary_count),
    "phi2": Recipe(A.PHI2, keys.phi2_keys, common=False),
    "old phi2": Recipe(A.PHI2, keys.phi2_keys, changes.fused_tensors, common=False),
    "phi3": Recipe(A.PHI3, keys.phi3_keys, extra=changes.longrope_tensors, common=False),
    "stablelm": Recipe(A.STABLELM, keys.stablelm_keys, changes.stablelm_tensors, common=False),
    "starcoder2": Recipe(A.STARCODER2),
    "olmo": Recipe(A.OLMO, keys.olmo_keys, changes.olmo_tensors),
    "olmo2": Recipe(A.OLMO2, keys.pattern),
    "exaone4": Recipe(A.EXAONE4, keys.pattern, extra=changes.llama3_tensors),
    "smollm3": Recipe(A.SMOLLM3, keys.llama_keys, changes.permuted),
    "command-r": Recipe(A.COMMAND_R, keys.cohere_keys),
    "cohere2": Recipe(A.COHERE2, keys.cohere2_keys),
    "nemotron": Recipe(A.NEMOTRON, keys.nemotron_keys, changes.plus_one),
    "arcee": Recipe(A.ARCEE, keys.llama_keys, changes.permuted),
    "jais2": Recipe(A.JAIS2, keys.rotary_count),
    "seed_oss": Recipe(A.SEED_OSS),
    "ernie4_5": Recipe(A.ERNIE4_5),
    "hunyuan-dense": Recipe(A.HUNYUAN_DENSE, keys.hunyuan_keys),
    "apertus": Recipe(A.APERTUS, keys.llama_keys, changes.apertus_tensors, changes.llama3_tensors, keys.xielu_values),
    "gemma": Recipe(A.GEMMA, keys.gemma_keys, changes.plus_one, common=False),
    "gemma2": Recipe(A.GEMMA2, keys.gemma2_keys, changes.plus_one, common=False),
    "gemma3": Recipe(A.GEMMA3, keys.gemma3_keys, changes.plus_one),
    "gemma4": Recipe(A.GEMMA4, keys.gemma4_keys, changes.gemma4_tensors, changes.proportional_tensors),
    "gpt2": Recipe(A.GPT2, keys.with_eps(layer_norm_eps="layer_norm_epsilon"), changes.gpt2_tensors, common=False),
    "gptneox": Recipe(A.GPTNEOX, keys.gpt_neox_keys, changes.heads_apart, common=False),
    "starcoder": Recipe(
        A.STARCODER,
        keys.with_eps(layer_norm_eps="layer_norm_epsilon", head_count_kv="num_key_value_heads"),
        common=False,
    ),
    "bloom": Recipe(A.BLOOM, keys.with_eps(layer_norm_eps="layer_norm_epsilon"), changes.heads_apart, common=False),
    "falcon": Recipe(A.FALCON, keys.falcon_keys, changes.falcon_tensors, common=False),
    "mpt": Recipe(A.MPT, keys.mpt_keys, common=False),
    "qwen2moe": Recipe(A.QWEN2MOE, keys.qwen2_moe_keys, changes.stacked),
    "qwen3moe": Recipe(A.QWEN3MOE, keys.qwen2_moe_keys, changes.stacked),
    "olmoe": Recipe(A.OLMOE, lambda w, hp: w.add_layer_norm_rms_eps(1e-5), changes.stacked),
    "phimoe": Recipe(A.PHIMOE, keys.phimoe_keys, changes.stacked, changes.longrope_tensors, common=False),
    "granitemoe": Recipe(A.GRANITE_MOE, keys.granite_keys, changes.granite_moe_tensors),
    "ernie4_5-moe": Recipe(A.ERNIE4_5_MOE, keys.ernie4_5_moe_keys, changes.stacked),
    "hunyuan-moe": Recipe(A.HUNYUAN_MOE, keys.hunyuan_moe_keys, changes.stacked),
    "gpt-oss": Recipe(A.GPT_OSS, keys.gpt_oss_keys, changes.gpt_oss_tensors),
    "glm4moe": Recipe(A.GLM4_MOE, keys.glm4_moe_keys, changes.stacked),
    "qwen3vlmoe": Recipe(A.QWEN3VLMOE, keys.qwen2_moe_keys, changes.stacked),
    "dbrx": Recipe(A.DBRX, keys.dbrx_keys, changes.dbrx_tensors, common=False),
    "minimax-m2": Recipe(A.MINIMAXM2, keys.minimax_m2_keys, changes.stacked),
    "afmoe": Recipe(A.AFMOE, keys.afmoe_keys, changes.afmoe_tensors),
    "exaone-moe": Recipe(A.EXAONE_MOE, keys.exaone_moe_keys, changes.stacked),
    "dots1": Recipe(A.DOTS1, keys.dots1_keys, changes.stacked),
    "llama4": Recipe(A.LLAMA4, keys.llama4_keys, changes.llama4_tensors, changes.llama3_tensors),
    "deepseek2": Recipe(A.DEEPSEEK2, keys.deepseek_keys, changes.deepseek_tensors),
    "old deepseek2": Recipe(A.DEEPSEEK2, keys.old_deepseek_keys, changes.stacked),
    "lfm2": Recipe(A.LFM2, recurrent.lfm2_keys, recurrent.lfm2_tensors),
    "lfm2moe": Recipe(A.LFM2MOE, recurrent.lfm2_moe_keys, recurrent.lfm2_tensors),
    "mamba": Recipe(A.MAMBA, recurrent.mamba_keys, recurrent.mamba_tensors, common=False),
    "mamba2": Recipe(A.MAMBA2, recurrent.mamba2_keys, recurrent.mamba2_tensors, common=False),
    "jamba": Recipe(A.JAMBA, recurrent.jamba_keys, recurrent.jamba_tensors, common=False),
    "granitehybrid": Recipe(
        A.GRANITE_HYBRID, recurrent.granite_hybrid_keys, recurrent.granite_hybrid_tensors, common=False
    ),
    "bamba": Recipe(A.GRANITE_HYBRID, recurrent.bamba_keys, recurrent.bamba_tensors, common=False),
    "falcon-h1": Recipe(A.FALCON_H1, recurrent.falcon_h1_keys, recurrent.falcon_h1_tensors, common=False),
    "nemotron_h": Recipe(A.NEMOTRON_H, recurrent.nemotron_h_keys, recurrent.nemotron_h_tensors, common=False),
    "nemotron_h_moe": Recipe(A.NEMOTRON_H_MOE, recurrent.nemotron_h_keys, recurrent.nemotron_h_tensors, common=False),
    "qwen3next": Recipe(A.QWEN3NEXT, recurrent.qwen3_next_keys, recurrent.qwen3_next_tensors),
    "old qwen3next": Recipe(A.QWEN3NEXT, recurrent.qwen3_next_keys, recurrent.qwen3_next_joint_tensors),
    "qwen35": Recipe(A.QWEN35, recurrent.qwen35_keys, recurrent.qwen35_tensors),
    "qwen35moe": Recipe(A.QWEN35MOE, recurrent.qwen35_keys, recurrent.qwen35_tensors),
    "minicpm3": Recipe(A.MINICPM3, keys.minicpm3_keys, extra=changes.longrope_tensors, common=False),
}


def as_float32(name: str, values: np.ndarray) -> tuple[np.ndarray, Kind]:
    """Stores a tensor as it is."""
    return values, Kind.F32


def convert_to_gguf(
    checkpoint: Path,
    path: Path,
    recipe: str,
    store: Callable[[str, np.ndarray], tuple[np.ndarray, Kind]] = as_float32,
    change: Callable[[GGUFWriter], None] = lambda writer: None,
    **writer: Any,
) -> None:
    """Writes a checkpoint's directory as a GGUF file by one of `RECIPES`.

    Args:
      store: bytes and storage type of a tensor, given its name in the file and its values.
      change: called with the writer at the end, to change or add keys and tensors.
      writer: further arguments of `GGUFWriter`.
    """
    from transformers import AutoConfig

    hp = HParams(AutoConfig.from_pretrained(checkpoint).to_dict())
    tensors = {name: values for file in checkpoint.glob("*.safetensors") for name, values in load_file(file).items()}
    rule = RECIPES[recipe]
    w = GGUFWriter(path, MODEL_ARCH_NAMES[rule.arch], **writer)
    w.add_block_count(hp.layers)
    if rule.common:
        keys.common_keys(w, hp)
    rule.keys(w, hp)
    rule.values(w, tensors, hp)
    for name, values in _named(rule, tensors, hp):
        data, kind = store(name, np.ascontiguousarray(values))
        w.add_tensor(name, data, raw_dtype=kind)
    change(w)
    save(w)


def _named(rule: Recipe, tensors: Tensors, hp: HParams) -> Iterator[tuple[str, np.ndarray]]:
    table = get_tensor_name_map(rule.arch, hp.layers)
    for name, values in (rule.tensors(tensors, hp) | rule.extra(hp)).items():
        new = name if name.startswith(("blk.", "rope_f")) else table.get_name(name, (".weight", ".bias"))
        assert new is not None, f"the name table of {rule.arch.name} does not know {name}"
        yield new, values.astype(np.float32)

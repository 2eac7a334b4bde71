"""Every GGUF architecture: written as llama.cpp's converter does, a file is the checkpoint it was made from."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import dequantize, quantize
from gguf_converter import RECIPES, convert_to_gguf

from convert.architecture import decoder_config
from convert.conversion import open_model
from convert.sources.gguf.architectures import ARCHITECTURES
from convert.sources.gguf.source import GGUFSource
from convert.sources.huggingface import HuggingFaceSource
from tide_jax.errors import TideError
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.decoder import Decoder

pytest.importorskip("torch", reason="makes the checkpoints")

from convert.parity.tiny import save_tiny
from convert.parity.tiny_recurrent import RECURRENT_VARIANTS

BARE: dict[str, Any] = {"attention_bias": False, "mlp_bias": False}
NO_WINDOW: dict[str, Any] = {"sliding_window": None}
UNUSED_WINDOW: dict[str, Any] = {"use_sliding_window": False}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 16,
    "factor": 4.0,
}
USUAL = math.sqrt(1 + math.log(4.0) / math.log(16))  # longrope's magnitude for a context four times 16
GROUPS = {"n_group": 4, "topk_group": 2, "n_routed_experts": 8, "num_experts_per_tok": 3}
GEMMA4 = {
    "attention_bias": False,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "num_experts": None,
    "top_k_experts": None,
    "moe_intermediate_size": None,
}
CAP = {"final_logit_softcapping": 30.0}  # of every Gemma 4: what a file means that does not say
MIXED = {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention", "full_attention"]}
UNLIMITED = {"max_position_embeddings": 2**20}  # models without positions
DENSE = ["linear_attention", "mlp", "full_attention", "mlp", "full_attention"]
SPARSE = ["linear_attention", "moe", "full_attention", "moe", "full_attention"]
ALL_SPARSE: dict[str, Any] = {"decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": []}
DEEPSEEK_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}

# Recipe, model type, fields of its configuration. A file says nothing of what llama.cpp does one way only.
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("llama", "llama", {}),
    ("llama", "llama", BARE | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    ("llama", "mistral", NO_WINDOW),
    ("llama", "internlm3", {}),
    ("mixtral", "mixtral", NO_WINDOW),
    ("internlm2", "llama", BARE),
    ("exaone", "llama", BARE | {"rope_parameters": LLAMA3}),
    ("mistral3", "mistral", NO_WINDOW),
    ("ministral3", "ministral3", NO_WINDOW),
    ("qwen2", "qwen2", UNUSED_WINDOW),
    ("qwen2vl", "qwen2", UNUSED_WINDOW),
    ("qwen3", "qwen3", UNUSED_WINDOW | {"rope_parameters": YARN}),
    ("qwen3vl", "qwen3", UNUSED_WINDOW),
    ("granite", "granite", {}),
    ("minicpm", "granite", BARE | {"attention_multiplier": 8**-0.5}),
    ("chatglm", "glm", {"head_dim": 8}),
    ("glm4", "glm4", {}),
    ("phi2", "phi", {}),
    ("old phi2", "phi", {}),
    ("phi3", "phi3", {}),
    ("phi3", "phi3", NO_WINDOW | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    ("stablelm", "stablelm", {}),
    ("stablelm", "stablelm", {"use_parallel_residual": True, "use_qkv_bias": False, "qk_layernorm": True}),
    ("starcoder2", "starcoder2", NO_WINDOW),
    ("olmo", "olmo", {"clip_qkv": 0.9}),
    ("olmo", "olmo", {"attention_bias": False}),
    ("olmo2", "olmo2", {}),
    ("olmo2", "olmo3", {}),
    ("exaone4", "exaone4", {}),
    ("exaone4", "exaone4", NO_WINDOW | {"layer_types": ["full_attention"] * 5, "rope_parameters": LLAMA3}),
    ("smollm3", "smollm3", UNUSED_WINDOW | BARE),
    ("command-r", "cohere", {"use_qk_norm": True, "attention_bias": False}),
    ("cohere2", "cohere2", {"attention_bias": False}),
    ("nemotron", "nemotron", {}),
    ("arcee", "arcee", {}),
    ("jais2", "jais2", {}),
    ("seed_oss", "seed_oss", {}),
    ("ernie4_5", "ernie4_5", {}),
    ("hunyuan-dense", "hunyuan_v1_dense", {}),
    ("apertus", "apertus", {}),
    ("gemma", "gemma", {"attention_bias": False}),
    ("gemma2", "gemma2", {"query_pre_attn_scalar": 12}),
    ("gemma3", "gemma3_text", {"query_pre_attn_scalar": 16, "num_hidden_layers": 7, "sliding_window_pattern": 6}),
    ("gemma4", "gemma4_text", GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1} | CAP),
    ("gemma4", "gemma4_text", GEMMA4 | {"final_logit_softcapping": 9.0}),
    ("gpt2", "gpt2", {}),
    ("gptneox", "gpt_neox", {}),
    ("gptneox", "gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    ("starcoder", "gpt_bigcode", {}),
    ("bloom", "bloom", {"seq_length": 64}),
    ("falcon", "falcon", {}),
    ("falcon", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1}),
    ("mpt", "mpt", {}),
    ("mpt", "mpt", {"attn_config": {"clip_qkv": 1.2}}),
    ("qwen2moe", "qwen2_moe", UNUSED_WINDOW | {"decoder_sparse_step": 1}),
    ("qwen3moe", "qwen3_moe", UNUSED_WINDOW | {"norm_topk_prob": True, "mlp_only_layers": []}),
    ("qwen3vlmoe", "qwen3_moe", UNUSED_WINDOW | BARE | {"norm_topk_prob": True, "mlp_only_layers": []}),
    ("olmoe", "olmoe", {}),
    ("phimoe", "phimoe", {}),
    ("phimoe", "phimoe", NO_WINDOW | {"rope_parameters": LONGROPE | {"short_mscale": USUAL, "long_mscale": USUAL}}),
    ("granitemoe", "granitemoe", {}),
    ("granitemoe", "granitemoeshared", {"attention_bias": False}),
    ("ernie4_5-moe", "ernie4_5_moe", {}),
    ("ernie4_5-moe", "ernie4_5_moe", {"use_bias": False, "moe_num_shared_experts": 0, "moe_layer_start_index": 2}),
    ("hunyuan-moe", "hunyuan_v1_moe", {}),
    ("gpt-oss", "gpt_oss", {}),
    ("glm4moe", "glm4_moe", {"num_nextn_predict_layers": 0}),
    ("glm4moe", "glm4_moe", {"use_qk_norm": False, "norm_topk_prob": False, "num_nextn_predict_layers": 0}),
    ("glm4moe", "solar_open", {}),
    ("dbrx", "dbrx", {}),
    ("minimax-m2", "minimax_m2", {}),
    ("afmoe", "afmoe", {}),
    ("exaone-moe", "exaone_moe", {}),
    ("dots1", "dots1", NO_WINDOW | {"layer_types": ["full_attention"] * 5}),
    ("llama4", "llama4_text", {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1}),
    ("deepseek2", "deepseek_v2", {}),
    ("deepseek2", "deepseek_v2", GROUPS | {"topk_method": "group_limited_greedy", "rope_parameters": DEEPSEEK_YARN}),
    ("old deepseek2", "deepseek_v2", {"q_lora_rank": None}),
    ("deepseek2", "deepseek_v3", {"rope_parameters": DEEPSEEK_YARN}),
    ("old deepseek2", "deepseek_v3", {"attention_bias": False}),
    ("deepseek2", "glm4_moe_lite", {}),
    ("deepseek2", "youtu", {}),
    ("minicpm3", "minicpm3", {"v_head_dim": 8}),
    ("lfm2", "lfm2", {}),
    ("lfm2", "lfm2", {"block_auto_adjust_ff_dim": False, "tie_word_embeddings": True}),
    ("lfm2moe", "lfm2_moe", {"tie_word_embeddings": True, "norm_topk_prob": True}),
    ("mamba", "mamba", {}),
    ("mamba", "falcon_mamba", {"use_bias": False, "tie_word_embeddings": True}),
    ("mamba2", "mamba2", {}),
    ("jamba", "jamba", {}),
    ("jamba", "jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1}),
    ("granitehybrid", "granitemoehybrid", MIXED | {"mamba_n_groups": 2}),
    ("granitehybrid", "granitemoehybrid", MIXED | UNLIMITED | {"position_embedding_type": None}),
    ("granitehybrid", "granitemoehybrid", MIXED | {"num_local_experts": 0, "num_experts_per_tok": 0}),
    ("bamba", "bamba", {}),
    ("falcon-h1", "falcon_h1", {"attention_bias": False, "mamba_d_ssm": 56, "mamba_n_groups": 2}),
    ("falcon-h1", "falcon_h1", {"mamba_rms_norm": True, "mamba_norm_before_gate": False}),
    ("nemotron_h", "nemotron_h", UNLIMITED | {"layers_block_type": DENSE}),
    ("nemotron_h_moe", "nemotron_h", UNLIMITED | {"layers_block_type": SPARSE, "intermediate_size": 40}),
    ("qwen3next", "qwen3_next", ALL_SPARSE),
    ("old qwen3next", "qwen3_next", ALL_SPARSE),
    ("qwen35", "qwen3_5_text", {}),
    ("qwen35", "qwen3_5_text", {"linear_num_key_heads": 4, "attention_bias": False}),
    ("qwen35moe", "qwen3_5_moe_text", {"attention_bias": False}),
)


def label(case: tuple[str, str, dict[str, Any]]) -> str:
    recipe, model_type, fields = case
    return f"{recipe}-{model_type}-{'-'.join(fields)}"


@pytest.mark.matrix(keep=6)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_file_is_the_checkpoint_it_was_made_from(tmp_path: Path, case: tuple[str, str, dict[str, Any]]) -> None:
    recipe, model_type, fields = case
    save_tiny(model_type, tmp_path / "hf", **fields)
    convert_to_gguf(tmp_path / "hf", tmp_path / "m.gguf", recipe)
    theirs, ours = HuggingFaceSource(tmp_path / "hf"), GGUFSource(tmp_path / "m.gguf")
    assert comparable(decoder_config(ours)) == comparable(decoder_config(theirs))
    compare_weights(open_model(tmp_path / "m.gguf"), open_model(tmp_path / "hf"))


def comparable(config: DecoderConfig) -> DecoderConfig:
    """What the model computes."""
    if config.moe is not None and all(config.has_experts(layer) for layer in range(config.num_layers)):
        config = dataclasses.replace(config, intermediate_size=0, moe=dataclasses.replace(config.moe, layers=None))
    return dataclasses.replace(config, model_type="", eos_token_ids=(), pad_token_id=None)


def compare_weights(ours: Decoder, theirs: Decoder) -> None:
    found, expected = (dict(nnx.to_flat_state(nnx.state(model, nnx.Param))) for model in (ours, theirs))
    assert found.keys() == expected.keys()
    for path, variable in expected.items():
        # Norms with one added lose a bit, and so do fades, which are stored as exponentials.
        np.testing.assert_allclose(found[path].get_value(), variable.get_value(), rtol=0, atol=2e-7, err_msg=str(path))


@pytest.mark.parametrize("more", [{}, {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_n_groups": 2}])
def test_multipliers_are_in_the_weights(tmp_path: Path, more: dict[str, Any]) -> None:
    """A file of a Falcon-H1 has other weights than the checkpoint, and no multipliers: the logits are the same."""
    model_type, fields = RECURRENT_VARIANTS["falcon_h1-multiplied"]
    save_tiny(model_type, tmp_path / "hf", **fields, **more)
    convert_to_gguf(tmp_path / "hf", tmp_path / "m.gguf", "falcon-h1")
    tokens = jnp.arange(4, 24)[None]
    found, expected = (np.asarray(open_model(tmp_path / name)(tokens)) for name in ("m.gguf", "hf"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))


def test_a_lost_multiplier_is_missed(tmp_path: Path) -> None:
    """With a shared embedding, the file has no place for the factor of the logits."""
    save_tiny("falcon_h1", tmp_path / "hf", tie_word_embeddings=True)
    convert_to_gguf(tmp_path / "hf", tmp_path / "m.gguf", "falcon-h1")
    with pytest.raises(TideError, match=r"falcon-h1\.output\.weight is missing: not supported"):
        GGUFSource(tmp_path / "m.gguf")


def test_every_architecture_is_tried() -> None:
    assert {MODEL_ARCH_NAMES[RECIPES[recipe].arch] for recipe, _, _ in CASES} == set(ARCHITECTURES)


@pytest.mark.parametrize(
    "recipe, model_type, fields",
    [("glm4moe", "glm4_moe", {"num_nextn_predict_layers": 0}), ("qwen35", "qwen3_5_text", {})],
)
def test_layers_that_predict_further_tokens_are_ignored(
    tmp_path: Path, recipe: str, model_type: str, fields: dict[str, Any]
) -> None:
    save_tiny(model_type, tmp_path / "hf", **fields)

    def change(writer: GGUFWriter) -> None:
        writer.add_block_count(6)
        writer.add_nextn_predict_layers(1)
        writer.add_tensor("blk.5.attn_norm.weight", np.ones(48, np.float32))
        writer.add_tensor("blk.5.nextn.eh_proj.weight", np.ones((48, 96), np.float32))

    convert_to_gguf(tmp_path / "hf", tmp_path / "m.gguf", recipe, change=change)
    compare_weights(open_model(tmp_path / "m.gguf"), open_model(tmp_path / "hf"))


def test_parts_of_a_model(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "hf", sliding_window=None)
    convert_to_gguf(tmp_path / "hf", tmp_path / "m.gguf", "mixtral", split_max_tensors=20)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    for part in (parts[0], parts[-1]):
        assert GGUFSource(part).files == parts
        compare_weights(open_model(part), open_model(tmp_path / "hf"))


@pytest.mark.matrix
@pytest.mark.parametrize(
    "recipe, model_type, fields",
    [
        ("mixtral", "mixtral", {}),
        ("deepseek2", "deepseek_v3", {}),
        ("gpt-oss", "gpt_oss", {}),
        ("qwen3next", "qwen3_next", ALL_SPARSE),
        ("qwen35moe", "qwen3_5_moe_text", {"linear_value_head_dim": 8}),
    ],
)
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.MXFP4, Kind.BF16], ids=lambda kind: kind.name)
def test_quantised_weights(tmp_path: Path, recipe: str, model_type: str, fields: dict[str, Any], kind: Kind) -> None:
    """A file in quantised blocks is the file of the numbers they stand for."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "moe_intermediate_size": 32}
    save_tiny(model_type, tmp_path / "hf", **sizes, **fields)

    def quantised(name: str, values: np.ndarray) -> tuple[np.ndarray, Kind]:
        fits = values.ndim > 1 and values.shape[-1] % 32 == 0
        return (quantize(values, kind), kind) if fits else (values, Kind.F32)

    def rounded(name: str, values: np.ndarray) -> tuple[np.ndarray, Kind]:
        data, stored = quantised(name, values)
        return dequantize(data, stored).astype(np.float32), Kind.F32

    convert_to_gguf(tmp_path / "hf", tmp_path / "quantised.gguf", recipe, store=quantised)
    convert_to_gguf(tmp_path / "hf", tmp_path / "rounded.gguf", recipe, store=rounded)
    assert kind.name in GGUFSource(tmp_path / "quantised.gguf").description
    ours, theirs = (open_model(tmp_path / f"{name}.gguf", "float32") for name in ("quantised", "rounded"))
    compare_weights(ours, theirs)
    tokens = jnp.arange(4, 24)[None]
    np.testing.assert_allclose(ours(tokens), theirs(tokens), rtol=0, atol=1e-5)

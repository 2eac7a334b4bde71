"""GGUF files written here by the `gguf` package, read back as Hugging Face checkpoints."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import ExpertGatingFuncType, GGUFEndian, GGUFWriter, RopeScalingType
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from gguf_files import FF, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, llama_cpp_row_order, save, smollm2, write_model

from convert.sources.gguf.source import GGUFSource
from tide_jax.errors import TideError


def error_of(path: Path) -> str:
    """The message opening a file fails with: one line."""
    with pytest.raises(TideError) as caught:
        GGUFSource(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights(tmp_path: Path, architecture: str, tied: bool) -> None:
    expected = write_model(tmp_path / "m.gguf", architecture, tied)
    source = GGUFSource(tmp_path / "m.gguf")
    assert set(source.tensors) == set(expected)
    codes = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    for name, values in expected.items():
        read = source.read(name)
        assert read.dtype == values.dtype
        assert source.tensors[name].shape == values.shape == read.shape
        assert source.tensors[name].dtype == codes[read.dtype.name]
        np.testing.assert_array_equal(read, values, err_msg=name)
    assert source.config["tie_word_embeddings"] is tied
    assert source.config["attention_bias"] is (architecture == "qwen2")


def test_row_order_gives_the_same_attention_scores(tmp_path: Path) -> None:
    """llama.cpp rotates neighbouring rows of the stored q and k, transformers halves of the reordered ones."""
    write_model(tmp_path / "m.gguf")
    source = GGUFSource(tmp_path / "m.gguf")
    x = np.random.default_rng(1).normal(size=HIDDEN)
    angle = 3.0 / 500000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)

    def rotate_halves(head: np.ndarray) -> np.ndarray:
        a, b = head[: HEAD_DIM // 2], head[HEAD_DIM // 2 :]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])

    def rotate_neighbours(head: np.ndarray) -> np.ndarray:
        turned = (head[0::2] + 1j * head[1::2]) * np.exp(1j * angle)
        return np.stack([turned.real, turned.imag], axis=1).ravel()

    q, k = (source.read(f"model.layers.0.self_attn.{name}_proj.weight") for name in ("q", "k"))
    here = rotate_halves((q @ x)[:HEAD_DIM]) @ (k @ x)[:HEAD_DIM]
    stored_q, stored_k = q[llama_cpp_row_order(HEADS)], k[llama_cpp_row_order(KV_HEADS)]
    there = rotate_neighbours((stored_q @ x)[:HEAD_DIM]) @ (stored_k @ x)[:HEAD_DIM]
    np.testing.assert_allclose(here, there, rtol=1e-5)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_weights_and_config_are_what_transformers_reads(tmp_path: Path, architecture: str) -> None:
    torch = pytest.importorskip("torch", reason="transformers' own GGUF reader needs torch")
    pytest.importorskip("accelerate", reason="transformers' own GGUF reader needs accelerate")
    from transformers import AutoConfig, AutoModelForCausalLM

    write_model(tmp_path / "m.gguf", architecture, tied=False, extra=lambda w: w.add_vocab_size(320))
    source = GGUFSource(tmp_path / "m.gguf")
    config = AutoConfig.for_model(**source.config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32, config=config)
    state = model.state_dict()
    assert set(state) == set(source.tensors)
    for name, values in state.items():
        np.testing.assert_array_equal(source.read(name).astype(np.float32), values.numpy(), err_msg=name)
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    for key in ("hidden_size", "num_key_value_heads", "intermediate_size", "rope_parameters", "vocab_size"):
        assert source.config[key] == getattr(theirs, key), key
    assert type(model).__name__ == source.config["architectures"][0]


@pytest.mark.parametrize(
    "kind",
    [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q5_0, Kind.Q5_1, Kind.TQ1_0, Kind.TQ2_0, Kind.MXFP4]
    + [kind for kind in Kind if kind.name.startswith("IQ")],
    ids=lambda kind: kind.name,
)
def test_quantised_blocks_of_experts(tmp_path: Path, kind: Kind) -> None:
    """Each expert is its own tensor, read by itself."""
    block, size = GGML_QUANT_SIZES[kind]
    rows = 512 // block * size
    # No byte of a float16 scale above 0x3B: that would make it infinite.
    stored = np.random.default_rng(0).integers(0, 0x3C, (3, 4, rows)).astype(np.uint8)
    write_model(tmp_path / "m.gguf", extra=lambda w: w.add_tensor("blk.0.ffn_up_exps.weight", stored, raw_dtype=kind))
    source = GGUFSource(tmp_path / "m.gguf")
    expected = dequantize(stored, kind)
    assert np.isfinite(expected).all()
    for expert in range(3):
        values = source.read(f"model.layers.0.block_sparse_moe.experts.{expert}.w3.weight")
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, expected[expert])


def test_reading_an_unknown_name_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf")
    with pytest.raises(TideError, match="has no tensor nowhere"):
        GGUFSource(tmp_path / "m.gguf").read("nowhere")


# ---------------------------------------------------------------------------------------------------- configuration


def config_of(tmp_path: Path, extra: Any = None, **arguments: Any) -> dict[str, Any]:
    write_model(tmp_path / "m.gguf", extra=extra, **arguments)
    return GGUFSource(tmp_path / "m.gguf").config


def test_config(tmp_path: Path) -> None:
    config = config_of(tmp_path, extra=lambda writer: writer.add_bos_token_id(1))
    assert config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "vocab_size": 320,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
    }


def test_transformers_accepts_the_config(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig.from_dict(config_of(tmp_path))
    assert config.head_dim == HEAD_DIM
    assert config.rope_parameters["rope_theta"] == 500000.0


def test_linear_rope(tmp_path: Path) -> None:
    def extra(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.5)

    rope = config_of(tmp_path, extra)["rope_parameters"]
    assert rope == {"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.5}


def test_yarn_rope(tmp_path: Path) -> None:
    def extra(writer: GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    rope = config_of(tmp_path, extra)["rope_parameters"]
    assert rope.pop("rope_theta") == 500000.0
    assert rope == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def llama3_divisors(factor: float) -> np.ndarray:
    """By the published recipe, branch for branch."""
    divisors = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * np.pi * 500000.0 ** (i / HEAD_DIM)
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        between = 1.0 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if wavelength < 8192 / 4 else factor if wavelength > 8192 else between)
    return np.array(divisors, np.float32)


def test_llama3_rope(tmp_path: Path) -> None:
    divisors = llama3_divisors(32.0)
    assert 1.0 < sorted(set(divisors))[1] < 32.0, "the smooth band is tested too"
    rope = config_of(tmp_path, lambda writer: writer.add_tensor("rope_freqs.weight", divisors))["rope_parameters"]
    assert rope == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_rope_divisors_of_one_change_nothing(tmp_path: Path) -> None:
    ones = np.ones(HEAD_DIM // 2, np.float32)
    rope = config_of(tmp_path, lambda writer: writer.add_tensor("rope_freqs.weight", ones))["rope_parameters"]
    assert rope["rope_type"] == "default"


# ----------------------------------------------------------------------------------------------------------- refusals

SIGMOID = ExpertGatingFuncType.SIGMOID
REFUSALS = {
    "scores of experts": (
        lambda w: (w.add_expert_count(8), w.add_expert_used_count(2), w.add_expert_gating_func(SIGMOID)),
        "expert_gating_func=2",
    ),
    "value width": (lambda w: w.add_value_length(8), "attention.value_length=8"),
    "encoder": (lambda w: w.add_causal_attention(False), "attention.causal=False"),
    "window": (lambda w: w.add_sliding_window(32), "sliding_window=32"),
    "unknown setting": (lambda w: w.add_clamp_kqv(1.0), "clamp_kqv"),
    "unknown tensor": (lambda w: w.add_tensor("blk.0.sinks.weight", np.ones(4, np.float32)), "blk.0.sinks.weight"),
    "rotary width": (lambda w: w.add_rope_dimension_count(8), "rope.dimension_count=8"),
    "rotary divisors": (
        lambda w: w.add_tensor("rope_freqs.weight", np.arange(1, 9, dtype=np.float32)),
        "rope_freqs.weight",
    ),
    "two rotary scalings": (
        lambda w: (w.add_rope_scaling_factor(2.0), w.add_tensor("rope_freqs.weight", llama3_divisors(8.0))),
        "rope.scaling.factor=2.0",
    ),
    "longrope": (
        lambda w: (w.add_rope_scaling_type(RopeScalingType.LONGROPE), w.add_rope_scaling_factor(2.0)),
        "rope.scaling.type='longrope'",
    ),
    "part": (lambda w: w.add_uint16("split.count", 3), "one of 3 parts"),
    "quantisation": (
        lambda w: w.add_tensor("blk.0.x.weight", np.zeros((2, 40), np.uint8), raw_dtype=Kind.Q8_1),
        "stored as Q8_1",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, case: str) -> None:
    extra, expected = REFUSALS[case]
    write_model(tmp_path / "m.gguf", extra=extra)
    assert expected in error_of(tmp_path / "m.gguf")


@pytest.mark.parametrize("architecture", ["rwkv6", "rwkv7"])  # other models than RWKV-4, which converts
def test_another_architecture_is_refused(tmp_path: Path, architecture: str) -> None:
    write_model(tmp_path / "m.gguf", architecture)
    assert f"'{architecture}', expected llama, internlm2" in error_of(tmp_path / "m.gguf")


@pytest.mark.parametrize("share", [0.0001, 0.005, 0.02, 0.5, 0.99])
def test_truncated(tmp_path: Path, share: float) -> None:
    write_model(tmp_path / "m.gguf", extra=lambda w: w.add_token_list([f"token{i}" for i in range(320)]))
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: 12 + int(share * len(whole))])
    assert "truncated" in error_of(tmp_path / "m.gguf")


def test_flipped_bits_in_the_header_never_escape_as_another_error(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(8, 1200, 150):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        (tmp_path / "m.gguf").write_bytes(damaged)
        with contextlib.suppress(TideError):
            GGUFSource(tmp_path / "m.gguf")


def write_parts(directory: Path) -> list[Path]:
    """A model in parts of four tensors."""
    writer = GGUFWriter(directory / "m.gguf", "llama", split_max_tensors=4)
    for i in range(10):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(4, np.float32))
    save(writer)
    return sorted(directory.glob("m-*.gguf"))


def test_missing_part(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    parts[1].unlink()
    assert "expected m-00002-of-00003.gguf beside it" in error_of(parts[0])


def test_renamed_part(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    error = error_of(parts[0].rename(tmp_path / "first.gguf"))
    assert "one of 3 parts" in error
    assert "model-00001-of-00003.gguf" in error


def test_swapped_parts(tmp_path: Path) -> None:
    first, second, _ = write_parts(tmp_path)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert "says that it is part 1 of 3, expected part 0 of 3" in error_of(first)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 this is a zip", b"GG"])
def test_not_gguf(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    assert "expected" in error_of(tmp_path / "m.gguf")


def test_missing_file(tmp_path: Path) -> None:
    assert "can't be read" in error_of(tmp_path / "m.gguf")


def test_big_endian(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama", endianess=GGUFEndian.BIG)
    save(writer)
    assert "little-endian" in error_of(tmp_path / "m.gguf")


def test_no_embedding(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", tensors=False)
    assert "token_embd.weight" in error_of(tmp_path / "m.gguf")


# -------------------------------------------------------------------------------------------------------- a real model


def test_smollm2_weights() -> None:
    source = smollm2()
    assert len(source.tensors) == 272
    assert source.config["rms_norm_eps"] == 1e-5
    assert source.config["rope_parameters"]["rope_theta"] == 100000.0
    query = source.read("model.layers.0.self_attn.q_proj.weight")
    assert query.shape == (576, 576)
    assert query.dtype == np.float32
    assert 0.01 < query.std() < 1.0

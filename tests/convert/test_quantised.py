"""Quantised Hugging Face checkpoints: what is read is what the quantiser, written here a second time, kept."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny_llama
from safetensors.numpy import load_file, save_file
from test_lora import linear, save_adapter
from tiny_llama import refusal

from convert import convert, export, open_model
from convert.sources.lora import merge_adapter
from convert.sources.open import open_source
from tide_jax.model.decoder import parameters

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
}
Parts = dict[str, np.ndarray]
Quantiser = Callable[[np.ndarray], tuple[Parts, np.ndarray]]
RNG = np.random.default_rng(5)
E4M3 = ml_dtypes.float8_e4m3fn
TABLE = np.sort(RNG.uniform(-1, 1, 16)).astype(np.float32)
Q = "model.layers.0.self_attn.q_proj.weight"


def plain() -> dict[str, np.ndarray]:
    """The tiny Llama's tensors before they are quantised."""
    return tiny_llama.random_tensors(tiny_llama.CONFIG | SIZES)


def save(directory: Path, quantise: Quantiser, settings: Any, only: str = "_proj.weight") -> dict[str, np.ndarray]:
    """Writes the tiny Llama with weights of names that end so quantised; gives what every tensor should be read as."""
    tensors: dict[str, np.ndarray] = {}
    expected = plain()
    for name, value in plain().items():
        if not name.endswith(only):
            tensors[name] = value
            continue
        parts, expected[name] = quantise(value)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": np.ascontiguousarray(array) for part, array in parts.items()}
    tiny_llama.save(directory, tensors, **SIZES, quantization_config=settings)
    return expected


def words(numbers: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Numbers [rows, n] in 32-bit words [rows, n * bits / 32], the first lowest; `order` of those in a word."""
    per = 32 // bits
    rows = [
        [sum(int(row[start + k]) << (bits * i) for i, k in enumerate(order or range(per))) for start in starts]
        for row, starts in zip(numbers, itertools.repeat(range(0, numbers.shape[1], per)), strict=False)
    ]
    return np.array(rows, np.uint32)


def grouped(weight: np.ndarray, group: np.ndarray, bits: int, low: int = 0) -> tuple[np.ndarray, ...]:
    """Integers [out, in] of a weight, with scales and zeros [out, groups], and the weight they stand for."""
    count = int(group.max()) + 1
    columns = [weight[:, group == g] for g in range(count)]
    top = 2**bits - 1
    least, most = (np.stack([f(c, axis=1) for c in columns], axis=1) for f in (np.min, np.max))
    scales = ((most - least) / top).astype(np.float16)
    zeros = np.clip(np.round(-least / scales.astype(np.float32)), low, top).astype(np.int64)
    scale, zero = scales.astype(np.float32)[:, group], zeros[:, group]
    numbers = np.clip(np.round(weight / scale) + zero, 0, top).astype(np.int64)
    return numbers, scales, zeros, ((numbers - zero) * scale).astype(np.float32)


# ---- the quantisers ----


def gptq(bits: int, form: str = "gptq", group: str = "indexed", low: int = 0) -> Quantiser:
    def quantise(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
        inputs = weight.shape[1]
        index = np.arange(inputs) // 32 if group != "whole" else np.zeros(inputs, np.int64)
        index = RNG.permutation(index) if group == "shuffled" else index
        numbers, scales, zeros, expected = grouped(weight, index, bits, low)
        packed = words(zeros.T, bits)
        if form == "gptq":
            packed = packed - np.uint32(sum(1 << i for i in range(0, 32, bits)))
        parts = {"qweight": words(numbers, bits).T.view(np.int32), "qzeros": packed.view(np.int32), "scales": scales.T}
        return parts | ({} if group == "by position" else {"g_idx": index.astype(np.int32)}), expected

    return quantise


def awq(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
    numbers, scales, zeros, expected = grouped(weight, np.arange(weight.shape[1]) // 16, 4)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    packed = (words(array.T, 4, order).view(np.int32) for array in (numbers, zeros))
    return dict(zip(("qweight", "qzeros", "scales"), (*packed, scales.T), strict=True)), expected


def four_bits(kind: str, nested: bool, stored_as: Any = np.uint8) -> Quantiser:
    def quantise(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
        blocks = weight.reshape(-1, 64)
        maxima = np.abs(blocks).max(axis=1)
        codes = np.abs(blocks[:, :, None] / maxima[:, None, None] - TABLE).argmin(axis=-1).reshape(-1)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": weight.shape}
        parts = {"weight.quant_map": TABLE}
        if nested:
            table, offset = np.linspace(-1, 1, 256, dtype=np.float32), float(maxima.mean())
            outer = np.abs(maxima - offset).max().reshape(1)
            small = np.abs(((maxima - offset) / outer)[:, None] - table).argmin(axis=1).astype(np.uint8)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            parts |= {"weight.nested_absmax": outer, "weight.nested_quant_map": table}
            maxima, parts["weight.absmax"] = table[small] * outer + np.float32(offset), small
        else:
            parts["weight.absmax"] = maxima
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        halves = (codes[0::2] << 4 | codes[1::2]).astype(np.uint8).view(stored_as)[:, None]
        parts |= {"weight": halves, f"weight.quant_state.bitsandbytes__{kind}": text}
        return parts, (TABLE[codes].reshape(-1, 64) * maxima[:, None]).reshape(weight.shape)

    return quantise


def eight_bits(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
    scales = np.abs(weight).max(axis=1)
    numbers = np.round(weight * 127 / scales[:, None]).astype(np.int8)
    parts = {"weight": numbers, "SCB": scales, "weight_format": np.array(0, np.uint8)}
    return parts, numbers.astype(np.float32) * scales[:, None] / 127


def blocked(part: str, rows: int, columns: int, kind: Any = E4M3, scale_kind: Any = np.float32) -> Quantiser:
    """A scale for each block of `rows` x `columns` weights; blocks at the edges are cut off."""

    def quantise(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
        grid = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        scales = np.exp2(RNG.integers(-6, -3, grid)).astype(scale_kind)
        spread = np.kron(scales.astype(np.float32), np.ones((rows, columns), np.float32))
        spread = spread[: weight.shape[0], : weight.shape[1]]
        numbers = np.clip(weight / spread, -120, 120).astype(kind)
        return {"weight": numbers, part: scales}, numbers.astype(np.float32) * spread

    return quantise


def one_scale(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
    numbers = (weight * 8).astype(E4M3)
    parts = {"weight": numbers, "weight_scale_inv": np.array(0.125, ml_dtypes.bfloat16)}
    return parts | {"activation_scale": np.array(3.0, np.float32)}, numbers.astype(np.float32) / 8


def exponents(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
    powers = RNG.integers(122, 128, (weight.shape[0], weight.shape[1] // 32)).astype(np.uint8)
    scales = np.repeat(np.exp2(powers.astype(np.float32) - 127), 32, axis=1)
    numbers = (weight / scales).astype(E4M3)
    return {"weight": numbers, "weight_scale_inv": powers}, numbers.astype(np.float32) * scales


def offset_integers(bits: int, zeros_as: str | None) -> Quantiser:
    """compressed-tensors' packed format, numbers and zeros signed."""

    def quantise(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
        half = 2 ** (bits - 1)
        numbers, scales, zeros, expected = grouped(weight, np.arange(weight.shape[1]) // 32, bits)
        if zeros_as is None:
            zeros = np.full_like(zeros, half)
            scale = np.repeat(scales.astype(np.float32), 32, axis=1)
            expected = ((numbers - half) * scale).astype(np.float32)
        parts = {"weight_packed": words(numbers, bits).view(np.int32), "weight_scale": scales}
        parts["weight_shape"] = np.array(weight.shape, np.int64)
        if zeros_as == "packed":
            parts["weight_zero_point"] = words(zeros.T, bits).T.view(np.int32)
        elif zeros_as == "plain":
            parts["weight_zero_point"] = (zeros - half).astype(np.int8)
        return parts, expected

    return quantise


def compressed(form: str, bits: int = 8, strategy: str = "group", **weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": 32} | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


def _gptq(bits: int, size: int = 32, form: str = "gptq") -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": form}


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
_BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
_FP8 = {"quant_method": "fp8", "weight_block_size": [48, 40]}
CASES: dict[str, tuple[Quantiser, dict[str, Any], str]] = {
    "gptq, 4 bits": (gptq(4, low=1), _gptq(4), "F16"),
    "gptq, 2 bits": (gptq(2), _gptq(2), "F16"),
    "gptq, 8 bits": (gptq(8), _gptq(8), "F16"),
    "gptq, zeros below one": (gptq(4, low=0), {"quant_method": "gptq", "bits": 4, "group_size": 32}, "F16"),
    "gptq, second format": (gptq(4, "gptq_v2"), _gptq(4, form="gptq_v2"), "F16"),
    "gptq, activation order": (gptq(4, group="shuffled"), _gptq(4) | {"desc_act": True}, "F16"),
    "gptq, one group": (gptq(4, group="whole"), _gptq(4, -1), "F16"),
    "gptq, groups by position": (gptq(4, group="by position"), _gptq(4), "F16"),
    "awq": (awq, _AWQ, "F16"),
    "bitsandbytes, nf4": (four_bits("nf4", nested=False), _BNB4, "BF16"),
    "bitsandbytes, nf4 twice": (four_bits("nf4", nested=True), {"load_in_4bit": True}, "BF16"),
    "bitsandbytes, fp4": (four_bits("fp4", nested=True), _BNB4, "BF16"),
    "bitsandbytes, other storage": (four_bits("nf4", nested=False, stored_as=ml_dtypes.bfloat16), _BNB4, "BF16"),
    "bitsandbytes, 8 bits": (eight_bits, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "F32"),
    "fp8, blocks cut off": (blocked("weight_scale_inv", 48, 40), _FP8, "F32"),
    "fp8, bfloat16 scales": (blocked("weight_scale_inv", 48, 40, scale_kind=ml_dtypes.bfloat16), _FP8, "BF16"),
    "fp8, one scale": (one_scale, {"quant_method": "fp8", "activation_scheme": "static"}, "BF16"),
    "mxfp8": (exponents, {"quant_method": "mxfp8"}, "F32"),
    "compressed, packed": (offset_integers(4, None), compressed("pack-quantized", 4), "F16"),
    "compressed, packed zeros": (offset_integers(4, "packed"), compressed("pack-quantized", 4), "F16"),
    "compressed, plain zeros": (offset_integers(8, "plain"), compressed("pack-quantized", 8), "F16"),
    "compressed, floats": (blocked("weight_scale", 1, 96), compressed("float-quantized", strategy="channel"), "F32"),
    "compressed, float blocks": (
        blocked("weight_scale", 48, 40),
        compressed("float-quantized", strategy="block", block_structure=[48, 40]),
        "F32",
    ),
    "compressed, integers": (blocked("weight_scale", 1, 32, np.int8), compressed("int-quantized"), "F32"),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_the_quantiser_kept(case: str, tmp_path: Path) -> None:
    quantise, settings, dtype = CASES[case]
    expected = save(tmp_path / "source", quantise, settings)
    source = open_source(tmp_path / "source")
    assert source.tensors.keys() == expected.keys()
    assert source.tensors[Q].dtype == dtype
    for name, value in expected.items():
        assert source.tensors[name].shape == value.shape
        np.testing.assert_allclose(source.read(name), value, rtol=1e-6, atol=1e-7, err_msg=name)
        assert np.corrcoef(value.reshape(-1), plain()[name].reshape(-1))[0, 1] > 0.8, "the quantiser kept nothing"


@pytest.mark.parametrize("block", [1, 100])
def test_blocks_of_rows(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.sources.quantised.parts._BLOCK_NUMBERS", block)
    expected = save(tmp_path / "source", gptq(4, group="shuffled"), _gptq(4))
    np.testing.assert_array_equal(open_source(tmp_path / "source").read(Q), expected[Q])


def test_experts_of_small_floats(tmp_path: Path) -> None:
    """MXFP4 as gpt-oss stores it: [E, out, blocks, 16] bytes of pairs, read as [E, in, out]."""
    codes = RNG.integers(0, 16, (3, 10, 64))
    powers = RNG.integers(120, 130, (3, 10, 2)).astype(np.uint8)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    expected = values[codes] * np.repeat(2.0 ** (powers.astype(int) - 127), 32, axis=2)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8).reshape(3, 10, 2, 16)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored = {f"{name}_blocks": blocks, f"{name}_scales": powers, f"{name}_bias": np.ones((3, 10), np.float32)}
    tiny_llama.save(tmp_path / "source", stored, quantization_config={"quant_method": "mxfp4"})
    source = open_source(tmp_path / "source")
    assert list(source.tensors) == [f"{name}_bias", name]
    assert (source.tensors[name].shape, source.tensors[name].dtype) == ((3, 64, 10), "BF16")
    found = source.read(name)
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype(np.float64), expected.swapaxes(1, 2))


# ---- through a conversion ----


def test_conversion_and_export(tmp_path: Path) -> None:
    expected = save(tmp_path / "source", awq, _AWQ)
    assert convert(tmp_path / "source", tmp_path / "half").dtype == "float16"
    convert(tmp_path / "source", tmp_path / "out", dtype="float32")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    export(tmp_path / "out", tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_the_dequantised_model_is_verified(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    save(tmp_path / "source", gptq(4, group="shuffled"), _gptq(4))
    report = convert(tmp_path / "source", tmp_path / "out", dtype="float32", verify=True)
    assert report.verification is not None


def test_activation_scales_are_ignored_and_reported(tmp_path: Path) -> None:
    save(tmp_path / "source", one_scale, {"quant_method": "fp8"})
    report = convert(tmp_path / "source", tmp_path / "out")
    assert len(report.ignored) == 7
    assert report.ignored[Q.replace("weight", "activation_scale")] == "quantises activations"


def test_an_adapter_on_quantised_weights(tmp_path: Path) -> None:
    expected = save(tmp_path / "source", four_bits("nf4", nested=True), _BNB4)
    a, b = (RNG.standard_normal(shape).astype(np.float32) for shape in ((2, 64), (64, 2)))
    adapter = save_adapter(tmp_path / "adapter", linear(Q.removesuffix(".weight"), a, b))
    merged = merge_adapter(open_source(tmp_path / "source"), adapter)
    np.testing.assert_allclose(merged.read(Q), expected[Q] + 2.5 * b @ a, rtol=1e-5, atol=1e-6)
    assert str(parameters(open_model(tmp_path / "source", adapter=adapter))["embed.kernel"].dtype) == "bfloat16"


def test_conv1d_weights_keep_their_inputs_first(tmp_path: Path) -> None:
    weight = RNG.standard_normal((24, 64)).astype(np.float32)
    parts, expected = gptq(4)(weight)
    tensors = {f"h.0.mlp.c_fc.{part}": np.ascontiguousarray(value) for part, value in parts.items()}
    tiny_llama.save(tmp_path / "source", tensors, model_type="gpt2", quantization_config=_gptq(4))
    np.testing.assert_array_equal(open_source(tmp_path / "source").read("h.0.mlp.c_fc.weight"), expected.T)


# ---- what is refused ----

_COMPRESSED = compressed("float-quantized", strategy="channel")
_OTHER = compressed("pack-quantized", 4)
_OTHER["config_groups"]["group_1"] = compressed("pack-quantized", 8)["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "aqlm"}, "weights quantised with aqlm are not supported, only with gptq, awq"),
        ({"bits": 4}, "weights quantised with an unknown method are not supported"),
        ("int4", "quantization_config='int4', expected an object"),
        (_gptq(4, form="marlin"), "in the format 'marlin' of a kernel are not supported"),
        (_AWQ | {"version": "gemv"}, "AWQ weights of the version 'gemv' are not supported, only 'gemm'"),
        (_AWQ | {"bits": 8}, "AWQ weights of 8 bits"),
        (compressed("nvfp4-pack-quantized", 4), "in the format 'nvfp4-pack-quantized' are not supported"),
        (compressed("float-quantized", strategy="token"), "scales by token are not supported"),
        (compressed("pack-quantized", 3), "packed weights of 3 bits are not supported"),
        (compressed("pack-quantized", 4) | {"transform_config": {"a": 1}}, "weights with a transform_config"),
        (_OTHER, "quantised in several ways are not supported"),
    ],
)
def test_refused_by_name(settings: Any, reason: str, tmp_path: Path) -> None:
    message = refusal(tiny_llama.save(tmp_path / "source", quantization_config=settings))
    assert reason in message
    assert "convert the unquantised checkpoint, or a GGUF file" in message


@pytest.mark.parametrize(
    "settings",
    [{"quant_method": "fp8"}, {"load_in_8bit": True}, _gptq(4), _AWQ, _BNB4, {"quant_method": "mxfp4"}, _COMPRESSED],
)
def test_a_dequantised_checkpoint_that_kept_its_settings_is_plain(
    settings: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tiny_llama.save(tmp_path / "source", plain(), **SIZES, quantization_config=settings)
    source = open_source(directory)
    assert "but they are plain numbers and are read as such" in caplog.text
    for name, value in plain().items():
        np.testing.assert_array_equal(source.read(name), value)
    assert "quantization_config" not in source.config


def test_packed_numbers_that_the_settings_do_not_explain(tmp_path: Path) -> None:
    tensors = plain() | {Q: np.zeros((64, 32), np.uint8)}
    tiny_llama.save(tmp_path / "source", tensors, **SIZES, quantization_config=_gptq(4))
    assert "config.json says that the weights are quantised with gptq, but none is" in refusal(tmp_path / "source")


# ---- labels that lie ----


def _symmetric(bits: int, form: str) -> Quantiser:
    """Zeros in the middle of the range."""
    middle = 2 ** (bits - 1)

    def quantise(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
        index = np.arange(weight.shape[1]) // 32
        most = np.stack([np.abs(weight[:, index == g]).max(axis=1) for g in range(index.max() + 1)], axis=1)
        scales = (most / max(1, middle - 1)).astype(np.float16)
        scale = scales.astype(np.float32)[:, index]
        numbers = np.clip(np.round(weight / scale) + middle, 0, 2 * middle - 1).astype(np.int64)
        zeros = np.full_like(scales, middle - (form == "gptq"), np.int64)
        parts = {"qweight": words(numbers, bits).T.view(np.int32), "qzeros": words(zeros.T, bits).view(np.int32)}
        return parts | {"scales": scales.T}, ((numbers - middle) * scale).astype(np.float32)

    return quantise


# Of 8 bits a step is too small to be told by so few asymmetric numbers.
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (4, True), (8, True), (2, False), (4, False)])
@pytest.mark.parametrize("made", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("said", ["gptq", "gptq_v2"])
def test_zeros_are_read_as_they_are_stored_whatever_the_label(
    bits: int, made: str, said: str, symmetric: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantise = _symmetric(bits, made) if symmetric else gptq(bits, made, low=0)
    expected = save(tmp_path / "source", quantise, _gptq(bits, form=said) | {"sym": symmetric})
    source = open_source(tmp_path / "source")
    for name, value in expected.items():
        np.testing.assert_allclose(source.read(name), value, rtol=1e-6, atol=1e-7, err_msg=name)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (made != said)
    if made != said:
        assert f"config.json says checkpoint_format '{said}', but the zero points are stored" in caplog.text


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_honest_label_gives_no_warning(bits: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for form in ("gptq", "gptq_v2"):
        save(tmp_path / form, gptq(bits, form, low=0), _gptq(bits, form=form) | {"sym": False})
        open_source(tmp_path / form)
    assert not caplog.records


def test_ambiguous_zeros_are_read_as_labelled_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def lopsided(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
        return gptq(4, "gptq_v2")(np.abs(weight))

    expected = save(tmp_path / "source", lopsided, _gptq(4, form="gptq_v2"))
    np.testing.assert_allclose(open_source(tmp_path / "source").read(Q), expected[Q], rtol=1e-6, atol=1e-7)
    assert "they are read as config.json's checkpoint_format says" in caplog.text


def _three_bits(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
    parts, expected = gptq(4)(weight)
    return parts | {"qweight": parts["qweight"][: weight.shape[1] * 3 // 32]}, expected


def _outside(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
    parts, expected = gptq(4)(weight)
    return parts | {"g_idx": parts["g_idx"] + 1}, expected


def _without(part: str, quantise: Quantiser) -> Quantiser:
    def changed(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
        parts, expected = quantise(weight)
        return {name: value for name, value in parts.items() if name != part}, expected

    return changed


def _with(part: str, value: Any, quantise: Quantiser) -> Quantiser:
    def changed(weight: np.ndarray) -> tuple[Parts, np.ndarray]:
        parts, expected = quantise(weight)
        return parts | {part: np.asarray(value)}, expected

    return changed


_STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("quantise", "settings", "reason"),
    [
        (_three_bits, _gptq(3), "qweight has weights of 3 bits, only 2, 4 and 8 are supported"),
        (_outside, _gptq(4), "g_idx names groups beyond the 2 in the file"),
        (_without("scales", gptq(4)), _gptq(4), "q_proj.qweight comes without model.layers.0.self_attn.q_proj.scales"),
        (_with("qzeros", np.zeros((2, 2), np.int32), gptq(4)), _gptq(4), "qzeros has shape [2, 2], expected [2, 8]"),
        (_with("qweight", np.zeros((8, 64), np.int64), gptq(4)), _gptq(4), "qweight has dtype I64, expected I32"),
        (gptq(4, group="by position"), _gptq(4, 16), "scales has 2 groups, expected groups of 16 in 64 inputs"),
        (awq, _AWQ | {"group_size": 128}, "has 4 groups, expected groups of 128 in 64 inputs"),
        (_with(_STATE, np.array([7], np.uint8), four_bits("nf4", False)), _BNB4, "does not say how"),
        (_without("weight", four_bits("nf4", False)), _BNB4, "comes without model.layers.0.self_attn.q_proj.weight"),
        (_with("weight", np.zeros((7, 1), np.uint8), four_bits("nf4", False)), _BNB4, "does not hold 4096 numbers"),
        (
            _with("weight_format", np.array(2, np.uint8), eight_bits),
            {"quant_method": "bitsandbytes"},
            "is laid out for a kernel (weight_format 2, expected 0)",
        ),
        (blocked("weight_scale_inv", 48, 40), {"quant_method": "fp8"}, "has shape [2, 2], expected [1, 1]"),
        (
            _with("weight_g_idx", np.zeros(64, np.int32), offset_integers(4, None)),
            compressed("pack-quantized", 4),
            "groups by activation order are not supported",
        ),
    ],
)
def test_malformed_or_unknown_parts(quantise: Quantiser, settings: Any, reason: str, tmp_path: Path) -> None:
    save(tmp_path / "source", quantise, settings, only=Q)
    assert reason in refusal(tmp_path / "source")


def test_a_shard_in_another_dtype_is_still_refused(tmp_path: Path) -> None:
    tensors = plain() | {"model.norm.weight": np.ones(64, E4M3)}
    tiny_llama.save(tmp_path / "source", {}, **SIZES)
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    assert "model.norm.weight has dtype F8_E4M3, expected one of F32, F16, BF16" in refusal(tmp_path / "source")

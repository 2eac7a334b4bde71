"""Written integers are read again: what is beyond rounding is found wherever it is, and what is within it is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_int8_convert import EXPERTS, SOURCES
from test_lora import linear, save_adapter
from test_own_scales import CASES
from test_own_scales import save as save_quantised
from tiny_hf import save_tiny
from tiny_llama import CONFIG, random_tensors, save

from convert import convert as convert_checkpoint
from convert.verify_weights import verify_weights
from tide_jax import TideError

Tensors = dict[str, np.ndarray]
Edit = Callable[[Tensors], Any]
DOWN, GATE_UP = "layers.1.mlp.experts.down", "layers.0.mlp.experts.gate_up"


def change(directory: Path, edit: Edit) -> None:
    for file in directory.glob("*.safetensors"):
        tensors = {name: array.copy() for name, array in load_file(file).items()}
        edit(tensors)
        save_file(tensors, file)


def convert_with(source: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """Converts and verifies the weights alone, with files that were changed after they were written."""

    def changed(directory: Path, *rest: Any) -> None:
        change(directory, edit)
        verify_weights(directory, *rest)

    monkeypatch.setattr("convert.conversion.verify_weights", changed)
    monkeypatch.setattr("convert.conversion.require_torch", lambda: None)
    monkeypatch.setattr("convert.conversion.verify_conversion", lambda *args: None)
    convert_checkpoint(source, source.parent / "out", weights="int8", verify=True, **options)
    return source.parent / "out"


def nothing(tensors: Tensors) -> None:
    """The edit that leaves all as it was written."""


def refusal(source: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    with pytest.raises(TideError) as caught:
        convert_with(source, edit, monkeypatch, **options)
    assert options.get("overwrite") or not (source.parent / "out").exists()
    message = str(caught.value)
    assert len(message) <= 300
    assert "\n" not in message
    return message


def swapped(path: str, *more: str) -> Edit:
    """Two experts, their integers or their scales too."""

    def edit(tensors: Tensors) -> None:
        for name in (path, *more):
            tensors[name][[0, 2]] = tensors[name][[2, 0]]

    return edit


def times(path: str, index: tuple[int, ...], factor: float) -> Edit:
    def edit(tensors: Tensors) -> None:
        tensors[path][index] *= np.float32(factor)

    return edit


def shifted(path: str, axis: int, index: tuple[int | slice, ...] = ()) -> Edit:
    def edit(tensors: Tensors) -> None:
        tensors[path][index] = np.roll(tensors[path][index], 1, axis)

    return edit


def one_more(path: str, index: tuple[int, ...]) -> Edit:
    def edit(tensors: Tensors) -> None:
        tensors[path][index] += 1 if tensors[path][index] < 100 else -1

    return edit


def emptied(path: str, index: tuple[int, ...]) -> Edit:
    """Zeros whose scale is so large that half of it is more than any weight."""

    def edit(tensors: Tensors) -> None:
        tensors[path][index], tensors[f"{path}_scale"][index[:1]] = 0, 100

    return edit


MISTAKES: dict[str, tuple[Edit, str]] = {
    "experts swapped": (swapped(DOWN, f"{DOWN}_scale"), rf"output {re.escape(DOWN)}\[[02], \d+\] is up to [\d.]+ r"),
    "integers swapped": (swapped(GATE_UP), rf"output {re.escape(GATE_UP)}\[[02], [01], \d+\] is up to"),
    "scales swapped": (swapped(f"{DOWN}_scale"), rf"output {re.escape(DOWN)}\[[02], \d+\] is up to"),
    "a scale 10 % larger": (times(f"{DOWN}_scale", (1, 3), 1.1), rf"output {re.escape(DOWN)}\[1, 3\] is up to 12\.7 "),
    "a scale 10 % smaller": (times(f"{DOWN}_scale", (1, 3), 0.9), rf"output {re.escape(DOWN)}\[1, 3\] is up to 12\.7 "),
    "a scale 1 % larger": (times(f"{DOWN}_scale", (1, 3), 1.01), rf"output {re.escape(DOWN)}\[1, 3\] is up to 1\.\d+ "),
    "scales off by one": (shifted(f"{DOWN}_scale", 1), rf"output {re.escape(DOWN)}\[\d, \d+\] is up to"),
    "no number": (times(f"{DOWN}_scale", (2, 1), np.nan), rf"output {re.escape(DOWN)}\[2, 1\] is up to inf rounding"),
    "a row shifted": (shifted("layers.0.mlp.experts.down", 0, (1, slice(None), 5)), r"down\[1, 5\] is up to"),
    "rows shifted": (shifted("head.kernel", 0), r"output head\.kernel\[\d+\] is up to"),
    "one integer": (
        one_more("layers.1.attention.q.kernel", (1, 2, 3)),
        r"attention\.q\.kernel\[1, 2\] is up to [01]\.\d+ rounding",
    ),
    "an empty expert": (emptied(DOWN, (1,)), rf"output {re.escape(DOWN)}\[1, \d+\] is up to 127 rounding steps"),
    "a float": (times("layers.1.mlp.router.kernel", (1, 2), 1.01), r"router\.kernel\[1, 2\] is .*\d, expected -?\d"),
    "a norm": (times("final_norm.scale", (3,), 1.001), r"final_norm\.scale\[3\] is .*\d, expected -?\d"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit, expected = MISTAKES[name]
    message = refusal(SOURCES["experts"](tmp_path / "source"), edit, monkeypatch)
    assert message.startswith("the written ")
    assert re.search(expected, message), message
    assert message.endswith(": nothing was written, please report the model")


def test_bounds_of_logits_alone_miss_an_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why weights are compared, too."""
    pytest.importorskip("torch")
    edit = times(f"{DOWN}_scale", (1, 3), 1.1)
    config = CONFIG | EXPERTS | {"intermediate_size": 12}  # transformers multiplies experts in steps of 16 bytes
    tensors = {name: np.float32(0.3) * tensor for name, tensor in random_tensors(config).items()}
    source = save(tmp_path / "source", tensors, **config)
    with monkeypatch.context() as patch:
        assert "output" in refusal(source, edit, patch)
    monkeypatch.setattr("convert.conversion.verify_weights", lambda directory, *rest: change(directory, edit))
    assert convert_checkpoint(source, tmp_path / "out", weights="int8", verify=True).verification is not None


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("kind", SOURCES)
def test_a_correct_folder_passes(kind: str, dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SOURCES[kind](tmp_path / "source")
    convert_with(source, nothing, monkeypatch, dtype=dtype, max_shard_bytes=700)


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "deepseek_v3", "phi3", "qwen3_moe", "gemma3_text", "bloom"])
def test_families(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    save_tiny(name, tmp_path / "source")
    written = convert_with(tmp_path / "source", nothing, monkeypatch)
    names = [name for name, array in load_file(written / "model.safetensors").items() if array.dtype == np.int8]
    message = refusal(tmp_path / "source", shifted(names[-1], 0), monkeypatch, overwrite=True)
    assert f"output {names[-1]}[" in message


@pytest.mark.parametrize("name", ["compressed, integers", "compressed, zeros", "gptq", "bitsandbytes"])
def test_integers_kept_from_the_checkpoint(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_quantised(tmp_path / "source", CASES[name], low=-128)
    written = convert_with(tmp_path / "source", nothing, monkeypatch)
    assert load_file(written / "model.safetensors")["layers.0.mlp.down.kernel"].dtype == np.int8
    edit = times("layers.0.mlp.down.scale", (3,), 1.1)
    assert "output layers.0.mlp.down.kernel[3] is" in refusal(tmp_path / "source", edit, monkeypatch, overwrite=True)


def test_merged_adapters(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, module = np.random.default_rng(3), "model.layers.1.self_attn.q_proj"
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 12), (18, 2)))
    adapter = save_adapter(tmp_path / "adapter", linear(module, a, b))
    convert_with(source, nothing, monkeypatch, adapter=adapter)


def test_the_smallest_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_tensors()
    for row, factor in enumerate((0, 1e-30, 1e-37, 1e-40, 1e-44, 1e11)):
        tensors["model.layers.0.mlp.up_proj.weight"][row] *= np.float32(factor)
    convert_with(save(tmp_path / "source", tensors), nothing, monkeypatch)


def test_some_rows_are_compared_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tide_jax.model.rounding._BLOCK", 25)
    source = SOURCES["experts"](tmp_path / "source")
    convert_with(source, nothing, monkeypatch)
    edit = times("head.scale", (17,), 1.1)
    assert "output head.kernel[17] is" in refusal(source, edit, monkeypatch, overwrite=True)

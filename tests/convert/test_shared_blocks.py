"""Checkpoints whose layers share blocks: whose copy a layer gets, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_llama import refusal

import tide_jax
from convert import convert
from convert.parity.tiny import save_tiny
from tide_jax.model.decoder import parameters

pytest.importorskip("torch")

LAYERS = ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid"]
BLOCK, QUERIES = "shared_transformer", "guide.attention.q.kernel"


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers 1, 2 and 4 use two blocks in turn: 1 and 4 the first, 2 the second."""
    directory = tmp_path_factory.mktemp("zamba2")
    save_tiny("zamba2", directory, layers_block_type=LAYERS, num_mem_blocks=2, tie_word_embeddings=True)
    return directory


def changed(source: Path, directory: Path, changes: dict[str, Any], keep: Any = lambda name: True) -> Path:
    """A copy of a checkpoint with other values in config.json and without some tensors."""
    shutil.copytree(source, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    tensors = load_file(directory / "model.safetensors")
    save_file({name: a for name, a in tensors.items() if keep(name)}, directory / "model.safetensors")
    return directory


def weights(source: Path, directory: Path) -> dict[str, np.ndarray]:
    convert(source, directory)
    return {path: np.asarray(a) for path, a in parameters(tide_jax.load(directory)).items()}


def test_layers_use_blocks_in_turn(two_blocks: Path, tmp_path: Path) -> None:
    stored = load_file(two_blocks / "model.safetensors")
    assert not any(name.startswith(f"model.layers.4.{BLOCK}") for name in stored), "the block is stored once"
    found = weights(two_blocks, tmp_path / "converted")
    queries = {layer: found[f"layers.{layer}.{QUERIES}"] for layer in (1, 2, 4)}
    np.testing.assert_array_equal(queries[1], queries[4])
    assert (queries[1] != queries[2]).any()


def test_an_adapter_belongs_to_its_layer(two_blocks: Path, tmp_path: Path) -> None:
    stored = load_file(two_blocks / "model.safetensors")
    name, path = f"model.layers.1.{BLOCK}.feed_forward.gate_up_proj", "guide.mlp.gate_up.kernel"
    found = weights(two_blocks, tmp_path / "converted")
    for number, layer in ((0, 1), (2, 4)):  # the numbers count layers with a block
        down, up = (stored[f"{name}_adapter_list.{number}.{i}.weight"] for i in range(2))
        expected = (stored[f"{name}.weight"] + up @ down).T
        np.testing.assert_allclose(found[f"layers.{layer}.{path}"].reshape(expected.shape), expected, atol=1e-6)


def test_without_ties_a_stored_copy_is_the_layers_own(two_blocks: Path, tmp_path: Path) -> None:
    stored = load_file(two_blocks / "model.safetensors")
    copies = {n.replace("layers.1.", "layers.4."): 2 * a for n, a in stored.items() if f"layers.1.{BLOCK}" in n}
    for tied in (True, False):
        source = changed(two_blocks, tmp_path / f"source {tied}", {"tie_word_embeddings": tied})
        head = {} if tied else {"lm_head.weight": stored["model.embed_tokens.weight"]}
        save_file(stored | copies | head, source / "model.safetensors")
        found = weights(source, tmp_path / f"converted {tied}")
        same = found[f"layers.1.{QUERIES}"] == found[f"layers.4.{QUERIES}"]
        assert same.all() == tied


@pytest.mark.parametrize("count", [0, -1, "two", 1.5, True])
def test_a_number_of_blocks_that_makes_no_sense(count: Any, two_blocks: Path, tmp_path: Path) -> None:
    said = refusal(changed(two_blocks, tmp_path / "source", {"num_mem_blocks": count}))
    assert "num_mem_blocks" in said


@pytest.mark.parametrize("missing", ["adapter_list", "adapter_list.0.1", "adapter_list.2.0"])
def test_adapters_that_are_not_stored(missing: str, two_blocks: Path, tmp_path: Path) -> None:
    said = refusal(changed(two_blocks, tmp_path / "source", {}, keep=lambda name: missing not in name))
    assert "adapter_list." in said
    assert "nothing" in said


def test_an_adapter_of_another_shape(two_blocks: Path, tmp_path: Path) -> None:
    source = changed(two_blocks, tmp_path / "source", {})
    tensors = load_file(source / "model.safetensors")
    name = f"model.layers.2.{BLOCK}.feed_forward.gate_up_proj_adapter_list.1.0.weight"
    save_file(tensors | {name: tensors[name][:-1].copy()}, source / "model.safetensors")
    assert "are [7, 48] and [144, 8], expected two matrices that multiply to [144, 48]" in refusal(source)


def test_adapters_of_attention_are_read_where_the_configuration_has_them(tmp_path: Path) -> None:
    fields = {"use_shared_attention_adapter": True, "num_key_value_heads": 6, "tie_word_embeddings": True}
    save_tiny("zamba2", tmp_path / "source", **fields)
    stored = load_file(tmp_path / "source" / "model.safetensors")
    block = f"model.layers.1.{BLOCK}.self_attn"
    down, up = (stored[f"{block}.linear_q_adapter_list.0.{i}.weight"] for i in range(2))
    for has in (True, False):
        source = changed(tmp_path / "source", tmp_path / f"{has}", {"use_shared_attention_adapter": has})
        expected = (stored[f"{block}.q_proj.weight"] + has * (up @ down)).T
        found = weights(source, tmp_path / f"converted {has}")[f"layers.1.{QUERIES}"]
        np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_transformers_in_every_dtype(dtype: str, two_blocks: Path, tmp_path: Path) -> None:
    """A rounded sum of weight and adapter is not the sum of rounded ones: the comparison must know."""
    report = convert(two_blocks, tmp_path / "converted", dtype=dtype, verify=True)
    assert report.verification is not None


def test_a_block_that_is_not_stored(two_blocks: Path, tmp_path: Path) -> None:
    source = changed(two_blocks, tmp_path / "source", {}, keep=lambda name: f"layers.1.{BLOCK}" not in name)
    assert f"layer 1 does not store {BLOCK}, expected it there for layers 1, 4" in refusal(source)

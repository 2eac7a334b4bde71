"""What a checkpoint makes a conversion read and copy: files of its own alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_llama
from safetensors.numpy import save_file
from tiny_llama import refusal

import tide_jax
from convert import convert, export
from convert.sources.open import open_source
from tide_jax.model.files.shards import ShardedTensors

SIDE_FILES = ("generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "modeling_x.py")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that belongs to nobody's checkpoint."""
    (tmp_path / "home").mkdir()
    path = tmp_path / "home" / "secret"
    path.write_text('{"secret": 1}')
    return path


@pytest.mark.parametrize("name", SIDE_FILES)
@pytest.mark.parametrize("kind", ["absolute", "relative", "through a folder", "through another link"])
def test_links_that_leave_the_checkpoint(name: str, kind: str, source: Path, secret: Path) -> None:
    target = {"absolute": secret, "relative": Path("../home/secret"), "through a folder": Path("folder/secret")}
    if kind == "through a folder":
        (source / "folder").symlink_to(secret.parent, target_is_directory=True)
    if kind == "through another link":
        (source / "link").symlink_to(secret)
    (source / name).symlink_to(target.get(kind, Path("link")))

    def never(done: int, total: int) -> None:
        raise AssertionError("no weight is read")

    message = refusal(source, progress=never)
    assert f"{name} is a link to {secret}, outside its checkpoint" in message
    assert not (source.parent / "out").exists()


def test_links_within_the_checkpoint(source: Path, tmp_path: Path) -> None:
    (source / "parts").mkdir()
    (source / "parts" / "real.json").write_text("{}")
    (source / "tokenizer_config.json").symlink_to("parts/real.json")
    (tmp_path / "linked").symlink_to(source, target_is_directory=True)  # as a whole it may be anywhere
    convert(tmp_path / "linked", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    assert not (tmp_path / "out" / "tokenizer_config.json").is_symlink()


def in_hub_cache(source: Path, cache: Path) -> Path:
    """The checkpoint as the hub's client stores it."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copyfile(path, repository / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_links_of_the_hub_cache(source: Path, secret: Path, tmp_path: Path) -> None:
    (source / "tokenizer_config.json").write_text("{}")
    snapshot = in_hub_cache(source, tmp_path / "cache")
    convert(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    other = in_hub_cache(source, tmp_path / "cache" / "models--org--name" / "inner")
    (other / "tokenizer.json").symlink_to(secret)
    assert "outside its checkpoint" in refusal(other, destination=tmp_path / "other")


def test_exports_copy_nothing_from_elsewhere(source: Path, secret: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "converted")
    (tmp_path / "converted" / "tokenizer.json").symlink_to(secret)
    with pytest.raises(tide_jax.TideError, match="outside its checkpoint"):
        export(tmp_path / "converted", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "name",
    ["../other/model.safetensors", "a/../../other/model.safetensors", "absolute", "..", ".", "", "a\0b", "x" * 300],
)
def test_an_index_names_files_of_its_own(name: str, tmp_path: Path) -> None:
    directory, other = tmp_path / "source", tmp_path / "other"
    tiny_llama.save_sharded(directory)
    other.mkdir()
    save_file({"lm_head.weight": np.zeros(3, np.float32)}, other / "model.safetensors")
    name = str(other / "model.safetensors") if name == "absolute" else name
    path = directory / "model.safetensors.index.json"
    index: dict[str, Any] = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(tide_jax.TideError) as caught:
        ShardedTensors(directory)
    message = str(caught.value).replace(os.fspath(tmp_path), "")
    assert "expected files in its own directory" in message or (len(name) == 300 and "not there" in message)
    assert len(message) <= 300
    assert "\n" not in message


def test_an_index_may_name_folders_of_its_own(tmp_path: Path) -> None:
    directory = tmp_path / "source"
    tiny_llama.save_sharded(directory)
    (directory / "shards").mkdir()
    path = directory / "model.safetensors.index.json"
    index: dict[str, Any] = json.loads(path.read_text())
    for shard in set(index["weight_map"].values()):
        (directory / shard).rename(directory / "shards" / shard)
    index["weight_map"] = {name: f"shards/{shard}" for name, shard in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    assert set(open_source(directory).tensors) == set(tiny_llama.random_tensors())

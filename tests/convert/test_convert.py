"""Conversion: what it writes, and loading that. No torch needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_llama
from tiny_llama import random_tensors, save, save_sharded

import tide_jax.model.files.checkpoint
from convert import convert, open_model
from convert.architecture import decoder_config
from convert.sources.huggingface import HuggingFaceSource
from tide_jax.errors import TideError
from tide_jax.model.decoder import parameters, stored_parameters

# ---- what is written ----


def test_every_weight_lands_in_its_place(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    found = parameters(tide_jax.model.files.checkpoint.load(tmp_path / "out"))
    stored = random_tensors()
    layer = "model.layers.1."
    q = stored[layer + "self_attn.q_proj.weight"]
    np.testing.assert_array_equal(found["layers.1.attention.q.kernel"], q.reshape(3, 6, 12).transpose(2, 0, 1))
    for i, name in enumerate(("k_proj", "v_proj")):
        kv = stored[f"{layer}self_attn.{name}.weight"].reshape(1, 6, 12).transpose(2, 0, 1)
        np.testing.assert_array_equal(found["layers.1.attention.kv.kernel"][:, :, i], kv)
    for i, name in enumerate(("gate_proj", "up_proj")):
        kernel = stored[f"{layer}mlp.{name}.weight"].T
        np.testing.assert_array_equal(found["layers.1.mlp.gate_up.kernel"][:, i], kernel)
    out = stored[layer + "self_attn.o_proj.weight"]
    np.testing.assert_array_equal(found["layers.1.attention.out.kernel"], out.reshape(12, 3, 6).transpose(1, 2, 0))
    np.testing.assert_array_equal(found["layers.1.mlp.down.kernel"], stored[layer + "mlp.down_proj.weight"].T)
    np.testing.assert_array_equal(found["head.kernel"], stored["lm_head.weight"])


def test_shards_load_back_equal(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", max_shard_bytes=3000)
    assert len(report.shards) > 3
    assert report.shards[0] == f"model-00001-of-{len(report.shards):05d}.safetensors"
    assert all((tmp_path / "out" / shard).stat().st_size < 3000 + 8192 for shard in report.shards)
    found = parameters(tide_jax.model.files.checkpoint.load(tmp_path / "out"))
    expected = parameters(open_model(source))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_written_shards_are_valid_safetensors(source: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    convert(source, tmp_path / "out")
    model = stored_parameters(tide_jax.model.files.checkpoint.load(tmp_path / "out"))
    file = load_file(tmp_path / "out" / "model.safetensors")
    assert file.keys() == {parameter.path for parameter in model}
    for parameter in model:
        np.testing.assert_array_equal(parameter.value, file[parameter.path], err_msg=parameter.path)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="where memory is mapped to is read from Linux's /proc")
def test_a_model_on_a_cpu_lies_in_its_file(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    model = tide_jax.model.files.checkpoint.load(tmp_path / "out")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    files = [m[0].split("-") for m in maps if m[-1] == str(tmp_path / "out" / "model.safetensors")]
    ranges = [range(*(int(end, 16) for end in ends)) for ends in files]
    aligned = [p for p in stored_parameters(model) if p.value.nbytes % 64 == 0]
    assert aligned
    for parameter in aligned:
        assert any(parameter.value.unsafe_buffer_pointer() in r for r in ranges), parameter.path


def test_sharded_source(source: Path, tmp_path: Path) -> None:
    sharded = save_sharded(tmp_path / "sharded")
    whole = parameters(open_model(source))
    for name, value in parameters(open_model(sharded)).items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtype_of_the_source_is_kept(dtype: str, tmp_path: Path) -> None:
    tensors = random_tensors(dtype=np.dtype(dtype) if dtype != "bfloat16" else ml_dtypes.bfloat16)
    report = convert(save(tmp_path / "source", tensors), tmp_path / "out")
    assert report.dtype == dtype
    assert tide_jax.model.files.checkpoint.load(tmp_path / "out", dtype).dtype == jnp.dtype(dtype)


def test_block_writes_agree_with_whole_writes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(source, tmp_path / "whole")
    monkeypatch.setattr("convert.output.writer._BLOCK_BYTES", 200)
    convert(source, tmp_path / "blocks")
    whole, blocks = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "blocks"))
    assert whole == blocks


def test_config_and_record(source: Path, tmp_path: Path) -> None:
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "pad_token_id": 4}))
    (source / "tokenizer_config.json").write_text("{}")
    convert(source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["hidden_size"] == 12
    assert written["tide_jax"]["dtype"] == "float32"
    model = tide_jax.model.files.checkpoint.load(tmp_path / "out")
    assert model.config.eos_token_ids == (7,)
    assert model.config.pad_token_id == 4
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert len(record["source_sha256"]["model.safetensors"]) == 64
    assert record["verification"] is None
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    assert (tmp_path / "out" / "generation_config.json").exists()


def test_stop_tokens_without_a_generation_config(source: Path) -> None:
    assert decoder_config(HuggingFaceSource(source)).eos_token_ids == (2, 5)


def test_older_rope_names(tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": 4.0}
    old = save(tmp_path / "old", rope_theta=5e5, rope_scaling=scaling)
    new = save(tmp_path / "new", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5})
    configs = [decoder_config(HuggingFaceSource(path)) for path in (old, new)]
    assert configs[0] == configs[1]
    rope = configs[0].attention_types[0].rope
    assert rope is not None
    assert (rope.kind, rope.theta, rope.factor) == ("linear", 5e5, 4.0)


def test_a_stored_copy_of_the_tied_embedding_is_ignored(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    report = convert(save(tmp_path / "source", tensors, tie_word_embeddings=True), tmp_path / "out")
    assert report.ignored == {
        "lm_head.weight": "tied to the token embedding",
        "model.layers.0.self_attn.rotary_emb.inv_freq": "rotary frequencies are computed from the configuration",
    }
    assert "head.kernel" not in parameters(tide_jax.model.files.checkpoint.load(tmp_path / "out"))


def test_a_head_of_its_own_is_kept_whatever_the_configuration_says(tmp_path: Path) -> None:
    model = open_model(save(tmp_path / "source", tie_word_embeddings=True))
    np.testing.assert_array_equal(parameters(model)["head.kernel"], random_tensors()["lm_head.weight"])


def test_fingerprint_tells_models_apart_but_not_dtypes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    fingerprint = tide_jax.model.files.checkpoint.fingerprint
    name = fingerprint(open_model(source))
    assert len(name) == 16
    assert fingerprint(tide_jax.model.files.checkpoint.load(tmp_path / "out", "bfloat16")) == name
    assert fingerprint(open_model(save(tmp_path / "stops", eos_token_id=11))) == name
    assert fingerprint(open_model(save(tmp_path / "theta", rope_theta=7.0))) != name
    other = random_tensors()
    other["model.layers.1.self_attn.q_proj.weight"] += 1
    assert fingerprint(open_model(save(tmp_path / "other", other))) != name


# ---- loading what was written ----


def test_damaged_conversions(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, max_shard_bytes=3000)
    settings = json.loads((out / "config.json").read_text())
    shard = out / "model-00002-of-00005.safetensors"
    (out / "config.json").write_text(json.dumps(settings | {"tide_jax": {"format": 99}}))
    with pytest.raises(TideError, match="converted in format 99, this version of tide_jax reads format 4"):
        tide_jax.model.files.checkpoint.load(out)
    (out / "config.json").write_text(json.dumps(settings))
    content = next(out.glob("model-00002-of-*")).read_bytes()
    shard = next(out.glob("model-00002-of-*"))
    shard.write_bytes(content[:-4])
    with pytest.raises(TideError, match="is cut short"):
        tide_jax.model.files.checkpoint.load(out)
    shard.unlink()
    with pytest.raises(TideError, match="names shards that are not there"):
        tide_jax.model.files.checkpoint.load(out)


def test_load_rejects_other_dtypes(source: Path) -> None:
    with pytest.raises(TideError, match="choose one of float32, bfloat16, float16"):
        tide_jax.model.files.checkpoint.load(source, "float64")


def test_load_converts_other_checkpoints_in_memory(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    converted, direct = (parameters(tide_jax.model.files.checkpoint.load(path)) for path in (tmp_path / "out", source))
    for name, value in converted.items():
        np.testing.assert_array_equal(direct[name], value, err_msg=name)


def test_tokenizer(source: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(TideError, match="has no tokenizer that transformers can load"):
        tide_jax.load_tokenizer(source)
    words = Tokenizer(WordLevel({"<unk>": 0, "early": 1, "exit": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(source)
    convert(source, tmp_path / "out")
    assert tide_jax.model.files.checkpoint.load_tokenizer(tmp_path / "out").decode([1]) == "early"


# ---- memory ----

_MEASURE = """
import pathlib, re, sys
from convert import convert

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024

convert(sys.argv[1], sys.argv[2])
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
before = peak()
convert(sys.argv[3], sys.argv[4])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory counter")
def test_peak_memory_is_far_below_a_stack_of_experts(source: Path, tmp_path: Path) -> None:
    experts = {"model_type": "mixtral", "num_local_experts": 12, "num_experts_per_tok": 2}
    big = tiny_llama.CONFIG | experts | {"hidden_size": 1250, "intermediate_size": 1000}
    tensors = {name: np.full(shape, 0.5, np.float32) for name, shape in tiny_llama.shapes(big).items()}
    save(tmp_path / "big", tensors, **big)
    stack = 12 * 2 * 4 * 1000 * 1250
    assert max(t.nbytes for t in tensors.values()) == stack / 24
    paths = [str(path) for path in (source, tmp_path / "small-out", tmp_path / "big", tmp_path / "big-out")]
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, *paths],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert int(run.stdout) < stack / 2


def test_experts_are_stacked(tmp_path: Path) -> None:
    settings = {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
    tensors = random_tensors(tiny_llama.CONFIG | settings)
    convert(save(tmp_path / "source", tensors, **settings), tmp_path / "out")
    found = parameters(tide_jax.model.files.checkpoint.load(tmp_path / "out"))
    for e in range(3):
        prefix = f"model.layers.1.block_sparse_moe.experts.{e}"
        for i, name in enumerate(("w1", "w3")):
            stacked = found["layers.1.mlp.experts.gate_up"][e, :, i]
            np.testing.assert_array_equal(stacked, tensors[f"{prefix}.{name}.weight"].T)
        np.testing.assert_array_equal(found["layers.1.mlp.experts.down"][e], tensors[f"{prefix}.w2.weight"].T)

"""Conversion: what it writes, what it refuses and how it says so, what it leaves behind. No torch needed."""

from __future__ import annotations

import errno
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_llama
from tiny_llama import random_tensors, save, save_sharded

import tide_jax.checkpoint
from convert import convert, open_model
from convert.__main__ import main
from convert.architecture import decoder_config
from convert.families import FAMILIES
from convert.reader import HuggingFaceSource, open_source
from convert.rules import Target, coverage, ignore, move
from convert.writer import ShardWriter
from tide_jax.decoder import parameters
from tide_jax.errors import TideError
from tide_jax.shards import TensorInfo


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "source")


def refusal(*args: Any, **kwargs: Any) -> str:
    """The message `convert` refuses with; one line, and nothing is left behind."""
    destination = Path(kwargs.pop("destination", None) or Path(args[0]).parent / "out")
    with pytest.raises(TideError) as caught:
        convert(args[0], destination, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert not list(destination.parent.glob(".*")), "a partial directory was left"
    return message


# ---- what is written ----


def test_every_weight_lands_in_its_place(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    found = parameters(tide_jax.checkpoint.load(tmp_path / "out"))
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
    found = parameters(tide_jax.checkpoint.load(tmp_path / "out"))
    expected = parameters(open_model(source))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_written_shards_are_valid_safetensors(source: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    convert(source, tmp_path / "out")
    model = parameters(tide_jax.checkpoint.load(tmp_path / "out"))
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_array_equal(model[name], value, err_msg=name)


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
    assert tide_jax.checkpoint.load(tmp_path / "out", dtype).dtype == jnp.dtype(dtype)


def test_block_writes_agree_with_whole_writes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(source, tmp_path / "whole")
    monkeypatch.setattr("convert.writer._BLOCK_BYTES", 200)
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
    model = tide_jax.checkpoint.load(tmp_path / "out")
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
    assert "head.kernel" not in parameters(tide_jax.checkpoint.load(tmp_path / "out"))


def test_a_head_of_its_own_is_kept_whatever_the_configuration_says(tmp_path: Path) -> None:
    model = open_model(save(tmp_path / "source", tie_word_embeddings=True))
    np.testing.assert_array_equal(parameters(model)["head.kernel"], random_tensors()["lm_head.weight"])


def test_fingerprint_tells_models_apart_but_not_dtypes(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    fingerprint = tide_jax.checkpoint.fingerprint
    name = fingerprint(open_model(source))
    assert len(name) == 16
    assert fingerprint(tide_jax.checkpoint.load(tmp_path / "out", "bfloat16")) == name
    assert fingerprint(open_model(save(tmp_path / "stops", eos_token_id=11))) == name
    assert fingerprint(open_model(save(tmp_path / "theta", rope_theta=7.0))) != name
    other = random_tensors()
    other["model.layers.1.self_attn.q_proj.weight"] += 1
    assert fingerprint(open_model(save(tmp_path / "other", other))) != name


# ---- what does not fit ----


def test_all_misfits_are_told_at_once(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["model.layers.0.surprise"] = np.zeros(3, np.float32)
    tensors["embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((7, 12), np.float32)
    tensors["model.layers.1.mlp.down_proj.weight"] = np.zeros((12, 11), np.float32)
    tensors["model.layers.0.mlp.up_proj.bias"] = np.zeros(10, np.float32)
    del tensors["model.layers.1.self_attn.v_proj.weight"], tensors["model.norm.weight"]
    message = refusal(save(tmp_path / "source", tensors))
    for part in (
        "7 problems",
        "source tensor model.layers.0.surprise [3] is unknown to this family",
        "parameter embed.kernel is filled more than once, by embed_tokens.weight, model.embed_tokens.weight",
        "q_proj.weight has shape [7, 12], expected one that can be arranged as layers.0.attention.q.kernel [12, 3, 6]",
        "down_proj.weight has shape [12, 11], which gives [11, 12], expected layers.1.mlp.down.kernel [10, 12]",
        "up_proj.bias [10] would fill layers.0.mlp.gate_up.bias, which the model does not have",
        "parameter layers.1.attention.kv.kernel[:, :, 1] [12, 1, 6] has no source tensor",
        "parameter final_norm.scale [12] has no source tensor",
    ):
        assert part in message


def test_a_tensor_that_two_rules_match(source: Path) -> None:
    opened = HuggingFaceSource(source)
    rules = (*FAMILIES["llama"].rules, ignore(r".*norm\.weight", "for the test"))
    with pytest.raises(TideError, match=r"model\.norm\.weight \[12\] matches 2 rules, expected one"):
        coverage(opened.tensors, rules, decoder_config(opened))


def test_a_slot_outside_the_parameter(source: Path) -> None:
    opened = HuggingFaceSource(source)
    rules = (*FAMILIES["llama"].rules, move("extra.{row}", Target("embed.kernel", slot="{row}")))
    with pytest.raises(TideError, match=r"extra\.19 \[12\] would fill embed\.kernel\[19\], outside \[19, 12\]"):
        coverage({**opened.tensors, "extra.19": TensorInfo((12,), "F32")}, rules, decoder_config(opened))


# ---- bad input, one line each ----


def test_missing_shard(tmp_path: Path) -> None:
    sharded = save_sharded(tmp_path / "source")
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "names shards that are not there: model-00002-of-00002.safetensors" in refusal(sharded)


def test_index_lists_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    index = save_sharded(tmp_path / "source") / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"model.extra": "model-00001-of-00002.safetensors"}}))
    assert "lists 1 tensors its shards do not hold (model.extra" in refusal(index.parent)


@pytest.mark.parametrize("keep", [0, 5, 200, -10])
def test_truncated_shard(source: Path, keep: int) -> None:
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refusal(source)
    assert "model.safetensors is" in message
    assert "download or copy it again" in message


def test_only_pickled_weights(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert "safetensors are needed" in refusal(source)


def test_unsupported_tensor_dtype(tmp_path: Path) -> None:
    tensors = random_tensors() | {"model.norm.weight": np.ones(12, np.float64)}
    assert "model.norm.weight has dtype F64, expected one of F32, F16, BF16" in refusal(save(tmp_path / "s", tensors))


def test_no_config(source: Path) -> None:
    (source / "config.json").unlink()
    assert "config.json is missing" in refusal(source)


def test_config_is_not_json(source: Path) -> None:
    (source / "config.json").write_text("{]")
    assert "config.json cannot be read as JSON" in refusal(source)


def test_config_without_model_type(tmp_path: Path) -> None:
    message = refusal(save(tmp_path / "source", model_type=None))
    assert "config.json has no model_type; supported are" in message
    assert "llama" in message


def test_unsupported_model_type(tmp_path: Path) -> None:
    message = refusal(save(tmp_path / "source", model_type="t5"))
    assert "model_type 't5' is not supported; supported are" in message
    assert all(name in message for name in FAMILIES)


def test_invalid_config_value(tmp_path: Path) -> None:
    assert "config.json is not a valid llama one" in refusal(save(tmp_path / "source", hidden_size="twelve"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "gpt2", "n_layer": 1, "add_cross_attention": True}, "add_cross_attention=True"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"hidden_act": "mish"}, "activation 'mish' is not implemented"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "rope_type 'proportional'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised with gptq"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 2}, "layer type chunked_attention"),
    ],
)
def test_refused_by_name(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    assert reason in refusal(save(tmp_path / "source", **settings))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    broken = save(tmp_path / "source", tensors)
    assert "tensor model.layers.1.mlp.up_proj.weight holds NaN or infinity" in refusal(broken)
    with pytest.raises(TideError, match="holds NaN or infinity"):
        open_model(broken)


def test_overflow_of_float16(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["lm_head.weight"][0, 0] = 1e6
    message = refusal(save(tmp_path / "source", tensors), dtype="float16")
    assert "tensor lm_head.weight overflows float16" in message


def test_unknown_dtype(source: Path) -> None:
    assert "choose one of float32, bfloat16, float16" in refusal(source, dtype="int8")


def test_nothing_there(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent")
    assert "absent.gguf does not exist" in refusal(tmp_path / "absent.gguf")


def test_hub_id_without_network(tmp_path: Path) -> None:
    with pytest.raises(TideError, match="could not be had from the Hugging Face hub"):
        open_source("nobody/no-such-model")


def test_verify_without_torch(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "run `pip install torch accelerate`" in refusal(source, verify=True)


# ---- the destination ----


def test_destination_exists(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert "exists and is not empty" in refusal(source)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    convert(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns != before


def test_overwrite_spares_what_is_no_conversion(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "something else than a converted model" in refusal(source, overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_converted_models_are_not_converted_again(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "once")
    assert "is a converted model already" in refusal(tmp_path / "once")


def test_unwritable_destination(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(source, destination=tmp_path / "file" / "out")
    assert "is a file" in refusal(source, destination=tmp_path / "file")


def test_disk_full(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
        assert "no space left" in refusal(source)

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", fail)
    assert "no space left" in refusal(source)


def test_interrupted_conversion_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert (tmp_path / ".out.partial").exists()
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_leftovers_of_a_killed_run_are_removed(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model-00007-of-00009.safetensors").write_text("half")
    convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert not (tmp_path / "out" / "model-00007-of-00009.safetensors").exists()


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", dry_run=True)
    assert (
        report.bytes
        == 4 * report.parameters
        == 4 * sum(np.prod(s) for s in tiny_llama.shapes(tiny_llama.CONFIG).values())
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_progress_reaches_the_total(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    convert(source, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1]
    assert calls == sorted(calls)


# ---- loading what was written ----


def test_damaged_conversions(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, max_shard_bytes=3000)
    settings = json.loads((out / "config.json").read_text())
    shard = out / "model-00002-of-00005.safetensors"
    (out / "config.json").write_text(json.dumps(settings | {"tide_jax": {"format": 99}}))
    with pytest.raises(TideError, match="converted in format 99, this version of tide_jax reads format 1"):
        tide_jax.checkpoint.load(out)
    (out / "config.json").write_text(json.dumps(settings))
    content = next(out.glob("model-00002-of-*")).read_bytes()
    shard = next(out.glob("model-00002-of-*"))
    shard.write_bytes(content[:-4])
    with pytest.raises(TideError, match="is cut short"):
        tide_jax.checkpoint.load(out)
    shard.unlink()
    with pytest.raises(TideError, match="names shards that are not there"):
        tide_jax.checkpoint.load(out)


def test_load_rejects_other_dtypes(source: Path) -> None:
    with pytest.raises(TideError, match="choose one of float32, bfloat16, float16"):
        tide_jax.checkpoint.load(source, "float64")


def test_load_converts_other_checkpoints_in_memory(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    converted, direct = (parameters(tide_jax.checkpoint.load(path)) for path in (tmp_path / "out", source))
    for name, value in converted.items():
        np.testing.assert_array_equal(direct[name], value, err_msg=name)


def test_tokenizer(source: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(TideError, match="has no tokenizer that transformers can load"):
        tide_jax.checkpoint.tokenizer_in(source)
    words = Tokenizer(WordLevel({"<unk>": 0, "early": 1, "exit": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(source)
    convert(source, tmp_path / "out")
    assert tide_jax.checkpoint.load_tokenizer(tmp_path / "out").decode([1]) == "early"


# ---- the command line ----


def test_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(source), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "would write" in capsys.readouterr().out
    assert main([str(source), str(tmp_path / "out"), "--json", "--dtype", "bfloat16"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"
    assert main([str(source), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_command_line_prints_one_plain_line_for_bad_input(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "convert", tmp_path / "absent", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith(f"error: {tmp_path / 'absent'} does not exist")


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
        cwd=Path(__file__).parent.parent,
    )
    assert int(run.stdout) < stack / 2


def test_experts_are_stacked(tmp_path: Path) -> None:
    settings = {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
    tensors = random_tensors(tiny_llama.CONFIG | settings)
    convert(save(tmp_path / "source", tensors, **settings), tmp_path / "out")
    found = parameters(tide_jax.checkpoint.load(tmp_path / "out"))
    for e in range(3):
        prefix = f"model.layers.1.block_sparse_moe.experts.{e}"
        for i, name in enumerate(("w1", "w3")):
            stacked = found["layers.1.mlp.experts.gate_up"][e, :, i]
            np.testing.assert_array_equal(stacked, tensors[f"{prefix}.{name}.weight"].T)
        np.testing.assert_array_equal(found["layers.1.mlp.experts.down"][e], tensors[f"{prefix}.w2.weight"].T)

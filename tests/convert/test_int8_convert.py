"""Folders of 8-bit integers: written, loaded, verified, exported, and refused with one line where they are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_llama import CONFIG, random_tensors, save, save_sharded

import convert.__main__
import tide_jax
import tide_jax.cli.main
from convert import convert as convert_checkpoint
from convert import export, open_model, verify
from convert.families import FAMILIES
from convert.output.rounded import RoundedPlan
from convert.output.stored import to_model_layout
from convert.output.writer import ShardWriter
from convert.sources.open import open_source
from convert.weights.rules import Target, move, plan_conversion
from tide_jax import TideError
from tide_jax.cli.inspection import describe_model, format_facts
from tide_jax.model.decoder import Decoder, parameters, stored_parameters
from tide_jax.model.files.checkpoint import fingerprint, load, load_config
from tide_jax.model.rounding import round_weights
from tide_jax.testing import ByteTokenizer

EXPERTS = {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
Q, Q_SCALE = "layers.1.attention.q.kernel", "layers.1.attention.q.scale"


def same(a: Decoder, b: Decoder) -> None:
    """Bit for bit."""
    assert a.weights == b.weights
    for found, wanted in zip(stored_parameters(a), stored_parameters(b), strict=True):
        assert (found.path, found.value.dtype) == (wanted.path, wanted.value.dtype)
        np.testing.assert_array_equal(found.value, wanted.value, err_msg=found.path)


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A converted directory of 8-bit integers."""
    convert_checkpoint(source, tmp_path / "out", weights="int8")
    return tmp_path / "out"


SOURCES: dict[str, Callable[[Path], Path]] = {
    "float32": save,
    "bfloat16": lambda path: save(path, random_tensors(CONFIG, ml_dtypes.bfloat16)),
    "shards": save_sharded,
    "experts": lambda path: save(path, random_tensors(CONFIG | EXPERTS), **EXPERTS),
    "tied": lambda path: save(
        path, {n: a for n, a in random_tensors().items() if n != "lm_head.weight"}, tie_word_embeddings=True
    ),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_folder_holds_what_rounding_at_load_gives(kind: str, tmp_path: Path) -> None:
    source = SOURCES[kind](tmp_path / "source")
    report = convert_checkpoint(source, tmp_path / "int8", weights="int8", max_shard_bytes=700)
    plain = convert_checkpoint(source, tmp_path / "plain")
    assert (report.weights, report.parameters, plain.weights) == ("int8", plain.parameters, "float")
    assert sum((tmp_path / "int8" / file).stat().st_size for file in report.shards) >= report.bytes
    found = load(tmp_path / "int8")
    assert found.weights == "int8"
    same(found, load(tmp_path / "int8", weights="int8"))
    same(found, load(tmp_path / "plain", weights="int8"))
    same(found, load(source, weights="int8"))
    same(load(tmp_path / "plain"), load(tmp_path / "plain", weights="float"))
    assert len({fingerprint(m) for m in (found, load(source), load(source, weights="int8"))}) == 1
    assert report.dtype == plain.dtype == str(load(tmp_path / "int8", report.dtype).dtype)


def test_the_numbers_are_those_of_the_checkpoint(folder: Path) -> None:
    file, stored = load_file(folder / "model.safetensors"), random_tensors()
    up = stored["model.layers.1.mlp.up_proj.weight"]
    scale = np.abs(up).max(axis=1) / np.float32(127)
    np.testing.assert_array_equal(file["layers.1.mlp.gate_up.scale"][1], scale)
    np.testing.assert_array_equal(file["layers.1.mlp.gate_up.kernel"][1], np.rint(up / scale[:, None]))
    assert file["head.kernel"].dtype == np.int8
    np.testing.assert_array_equal(file["embed.kernel"], stored["model.embed_tokens.weight"])
    settings = json.loads((folder / "config.json").read_text())["tide_jax"]
    assert (settings["weights"], settings["dtype"]) == ("int8", "float32")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="where memory is mapped to is read from Linux's /proc")
def test_a_model_on_a_cpu_lies_in_its_file(tmp_path: Path) -> None:
    # XLA wants memory in steps of 64 bytes.
    whole = {"hidden_size": 16, "head_dim": 16, "intermediate_size": 16, "num_attention_heads": 4}
    folder = tmp_path / "out"
    convert_checkpoint(save(tmp_path / "source", random_tensors(CONFIG | whole), **whole), folder, weights="int8")
    model = load(folder)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    files = [m[0].split("-") for m in maps if m[-1] == str(folder / "model.safetensors")]
    ranges = [range(*(int(end, 16) for end in ends)) for ends in files]
    aligned = [p for p in stored_parameters(model) if p.value.dtype == jnp.int8 and p.value.nbytes % 64 == 0]
    assert aligned
    for parameter in aligned:
        assert any(parameter.value.unsafe_buffer_pointer() in r for r in ranges), parameter.path


def test_tensors_are_rounded_one_at_a_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(weights: np.ndarray, axes: tuple[int, ...], own: Any) -> Any:
        sizes.append(weights.size)
        return round_weights(weights, axes, own)

    monkeypatch.setattr("convert.output.rounded.round_weights", counted)
    convert_checkpoint(source, tmp_path / "out", weights="int8")
    assert max(sizes) == max(np.size(a) for a in random_tensors().values())
    assert len(sizes) == 1 + 7 * 2
    monkeypatch.setattr("tide_jax.model.rounding._BLOCK", 25)  # two rows at once
    convert_checkpoint(source, tmp_path / "blocks", weights="int8")
    assert max(sizes[15:]) <= 72  # a row of the keys and values: 12 channels for each of 6
    same(load(tmp_path / "blocks"), load(tmp_path / "out"))


def test_outputs_in_several_tensors_are_assembled(tmp_path: Path) -> None:
    """Tensors for a slice of the inputs each: no family's, but a weight map may have them."""
    tensors = random_tensors()
    down = tensors.pop("model.layers.1.mlp.down_proj.weight")
    plain = load(save(tmp_path / "plain"), weights="int8")
    tensors |= {f"part.{i}": np.ascontiguousarray(down[:, i]) for i in range(down.shape[1])}
    source = open_source(save(tmp_path / "source", tensors))
    rules = (*FAMILIES["llama"].rules, move("part.{i}", Target("layers.1.mlp.down.kernel", slot="{i}")))
    config = load_config(tmp_path / "plain")
    plan = RoundedPlan(to_model_layout(plan_conversion(source.tensors, rules, config), config), config)
    with ShardWriter(tmp_path, plan.layout(np.dtype(np.float32), 1e9)) as writer:
        written = sum(plan.write(source, writer))
    file = load_file(tmp_path / "model.safetensors")
    assert written == sum(a.nbytes for a in file.values())
    for parameter in stored_parameters(plain):
        np.testing.assert_array_equal(file[parameter.path], parameter.value, err_msg=parameter.path)
    assert plan.fingerprint() == fingerprint(plain)


def test_adapters_are_merged_before_rounding(source: Path, tmp_path: Path) -> None:
    rng, name = np.random.default_rng(3), "base_model.model.model.layers.1.self_attn.q_proj"
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 12), (18, 2)))
    (tmp_path / "adapter").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    factors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    model = open_model(source, weights="int8", adapter=tmp_path / "adapter")
    merged = random_tensors()["model.layers.1.self_attn.q_proj.weight"] + 2 * b @ a
    restored = np.asarray(parameters(model)[Q]).reshape(12, 18).T
    step = np.abs(merged).max(axis=1, keepdims=True) / 127
    assert (np.abs(restored - merged) <= 0.51 * step).all()


def test_exports_are_the_floats_that_integers_stand_for(folder: Path, tmp_path: Path) -> None:
    report = export(folder, tmp_path / "export")
    assert report.dtype == "float32"
    back, small = parameters(load(tmp_path / "export")), parameters(load(folder))
    for name, value in small.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    again = load(tmp_path / "export", weights="int8")  # rounding what is rounded: the same integers
    for found, wanted in zip(stored_parameters(again), stored_parameters(load(folder)), strict=True):
        if found.value.dtype == jnp.int8:
            np.testing.assert_array_equal(found.value, wanted.value)


def test_exports_of_experts(tmp_path: Path) -> None:
    source = SOURCES["experts"](tmp_path / "source")
    convert_checkpoint(source, tmp_path / "int8", weights="int8")
    export(tmp_path / "int8", tmp_path / "export")
    file, stored = load_file(tmp_path / "export" / "model.safetensors"), random_tensors(CONFIG | EXPERTS)
    for name, value in stored.items():
        step = np.abs(value).max(axis=-1, keepdims=True) / 127
        assert (np.abs(file[name] - value) <= 0.51 * step).all(), name
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    np.testing.assert_array_equal(file[gate], stored[gate])


# ---- verification


def test_verification_measures_what_rounding_changes(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    proof = convert_checkpoint(source, tmp_path / "out", weights="int8", verify=True).verification
    assert proof is not None
    assert proof.divergence is not None
    assert proof.agreement is not None
    assert 1e-3 < proof.relative < verify.INT8_TOLERANCE
    assert 0 < proof.divergence < verify.INT8_DIVERGENCE
    assert 0.7 < proof.agreement <= 1
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["verification"]["divergence"] == proof.divergence
    assert record["weights"] == "int8"


def test_verification_finds_a_wrong_model(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")

    def shifted(weights: np.ndarray, axes: tuple[int, ...], own: Any) -> Any:
        return round_weights(np.roll(weights, 1, axis=0), axes, own)

    monkeypatch.setattr("convert.output.rounded.round_weights", shifted)
    with pytest.raises(TideError, match=r"^the written output head.* rounding steps away .*, expected at most"):
        convert_checkpoint(source, tmp_path / "out", weights="int8", verify=True)
    monkeypatch.setattr("convert.conversion.verify_weights", lambda *args: None)  # logits by themselves find it, too
    with pytest.raises(TideError, match=r"differ from transformers' by .* nothing was written"):
        convert_checkpoint(source, tmp_path / "out", weights="int8", verify=True)
    assert not (tmp_path / "out").exists()


def test_measures_of_a_comparison() -> None:
    expected = np.log([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])
    found = np.log([[0.25, 0.5, 0.25], [0.125, 0.75, 0.125]])
    proof = verify.compare_logits(found, expected, 2, "int8")
    assert proof.divergence == pytest.approx(0.5 * 0.25 * np.log(2))
    assert proof.agreement == 0.5
    assert verify.describe_excess(proof) is not None
    assert verify.compare_logits(found, expected, 2, "float").divergence is None
    assert verify.describe_excess(verify.compare_logits(expected, expected, 2, "int8")) is None


# ---- the command line


def test_commands_take_weights(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert convert.__main__.main([str(source), str(out), "--weights", "int8"]) == 0
    assert "float32 with int8 weights" in capsys.readouterr().out
    assert tide_jax.cli.main.main(["inspect", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    read = [p for p in stored_parameters(load(out)) if p.path != "embed.kernel"]
    assert facts["stored"] == "float32 with int8 weights"
    assert facts["bytes_read"][facts["stored"]] == sum(p.value.nbytes for p in read)
    assert facts["kept_as_floats"] == ["embed.kernel"]


@pytest.mark.parametrize("command", ["generate", "calibrate"])
def test_weights_reach_the_model(command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def stop(source: str, dtype: Any, **options: Any) -> None:
        asked.update(options)
        raise TideError("stop")

    monkeypatch.setattr(tide_jax, "load", stop)
    monkeypatch.setattr(tide_jax, "load_tokenizer", lambda source: ByteTokenizer())
    (tmp_path / "text.txt").write_text("a text\n" * 20)
    output = str(tmp_path / "routers.safetensors")
    calibrate = ["--text", str(tmp_path / "text.txt"), "--output", output, "--checkpoint-interval", "1"]
    more = {"generate": ["--prompt", "a", "--raw"], "calibrate": [*calibrate, "--min-layers", "1"]}
    assert tide_jax.cli.main.main([command, str(folder), "--weights", "int8", *more[command]]) == 2
    assert asked["weights"] == "int8"


def test_lm_eval_takes_weights(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from tide_jax.lm_eval.arguments import open_engine

    convert_checkpoint(source, tmp_path / "plain")
    engine = open_engine(str(tmp_path / "plain"), None, {}, None, None, "int8")
    assert engine.model.weights == "int8"
    with pytest.raises(TideError, match="already has its routers, dtype and weights"):
        open_engine(engine, None, {}, None, None, "int8")


def test_a_token_reads_the_experts_that_it_chooses(tmp_path: Path) -> None:
    source = SOURCES["experts"](tmp_path / "source")
    facts = describe_model(source)
    whole = sum(p.value.nbytes for p in stored_parameters(load(source)) if not p.path.startswith("embed"))
    experts = sum(p.value.nbytes for p in stored_parameters(load(source)) if ".experts." in p.path)
    assert facts["bytes_read"]["float32"] == whole - experts // 3
    assert facts["stored"] is None
    assert "with int8 weights" in format_facts(facts)


# ---- bad input


def change(folder: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = {name: array.copy() for name, array in load_file(folder / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def number(value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[Q_SCALE].reshape(-1)[3] = value

    return edit


DAMAGES: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "missing": (lambda t: t.pop(Q_SCALE), f"missing parameter {Q_SCALE}"),
    "zero": (number(0), "holds 0, expected positive finite numbers"),
    "negative": (number(-0.5), "holds -0.5, expected positive finite numbers"),
    "nan": (number(np.nan), "holds nan, expected positive finite numbers"),
    "infinite": (number(np.inf), "holds inf, expected positive finite numbers"),
    "scale shape": (lambda t: t.update({Q_SCALE: t[Q_SCALE][:1]}), r"has shape \(1, 6\), expected \(3, 6\)"),
    "integer shape": (lambda t: t.update({Q: t[Q][:1]}), r"has shape \(1, 6, 12\), expected \(3, 6, 12\)"),
    "scale type": (lambda t: t.update({Q_SCALE: t[Q_SCALE].astype(np.float16)}), "is of type F16, expected F32"),
    "integer type": (lambda t: t.update({Q: t[Q].astype(np.float32)}), "is of type F32, expected I8"),
    "an unknown scale": (lambda t: t.update({"final_norm.kernel": t[Q]}), "has dtype I8, expected one of F32"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders(name: str, folder: Path) -> None:
    edit, expected = DAMAGES[name]
    change(folder, edit)
    with pytest.raises(TideError, match=expected) as caught:
        load(folder)
    message = str(caught.value).replace(str(folder), "FOLDER")
    assert "FOLDER" in message
    assert "convert the checkpoint again" in message
    assert len(message) <= 300
    assert "\n" not in message


@pytest.mark.parametrize("name", ["zero", "nan", "integer type", "scale shape"])
def test_damaged_folders_are_not_exported(name: str, folder: Path, tmp_path: Path) -> None:
    edit, _ = DAMAGES[name]
    change(folder, edit)
    with pytest.raises(TideError, match="again"):
        export(folder, tmp_path / "export")


def test_integers_in_a_folder_of_floats(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "plain")
    change(tmp_path / "plain", lambda t: t.update({Q: np.ones(t[Q].shape, np.int8)}))
    for weights in (None, "int8"):
        with pytest.raises(TideError, match=f"{Q} has dtype I8, expected one of F32"):
            load(tmp_path / "plain", weights=weights)


@pytest.mark.parametrize("weights", ["INT8", "int4", "", 8, True, np.int8, jnp.float32, ["int8"], {"a": 1}, "x" * 999])
def test_weights_that_are_none(weights: Any, source: Path, tmp_path: Path) -> None:
    calls: tuple[Callable[[], Any], ...] = (
        lambda: load(source, weights=weights),
        lambda: open_model(source, weights=weights),
        lambda: convert_checkpoint(source, tmp_path / "out", weights=weights),
    )
    for call in calls:
        with pytest.raises(TideError, match=r"^weights=.* is not known; choose 'int8' or 'float'") as caught:
            call()
        assert len(str(caught.value)) < 200
    assert not (tmp_path / "out").exists()


def test_integers_cannot_be_loaded_as_floats(folder: Path) -> None:
    with pytest.raises(TideError, match="holds int8 weights, and weights='float' asks for floats: leave") as caught:
        load(folder, weights="float")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("entry", [{"weights": "int4"}, {"weights": 8}, {"weights": None}, {"fingerprint": 5}])
def test_damaged_settings(entry: dict[str, Any], folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["tide_jax"] |= entry
    path.write_text(json.dumps(values))
    with pytest.raises(TideError, match=rf"config\.json.*{next(iter(entry))}.*convert again") as caught:
        load(folder)
    assert len(str(caught.value).replace(str(folder), "")) < 300


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["model.layers.1.mlp.down_proj.weight"][2, 3] = np.inf
    source = save(tmp_path / "source", tensors)
    for call in (
        lambda: load(source, weights="int8"),
        lambda: convert_checkpoint(source, tmp_path / "o", weights="int8"),
    ):
        with pytest.raises(TideError, match=r"down_proj\.weight holds NaN or infinity"):
            call()

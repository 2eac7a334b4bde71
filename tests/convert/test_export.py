"""Export: a converted model as a Hugging Face checkpoint again, with the weights and logits of the source."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_gguf_tokenizer import bpe_metadata, write_with_tokenizer
from tiny_llama import CONFIG, random_tensors, save

import convert.exporting
import tide_jax
import tide_jax.cli.main
import tide_jax.model.files.checkpoint
from convert import convert as convert_checkpoint
from convert import export
from convert.configuration.older_names import add_older_names
from convert.configuration.settings import build_configuration
from convert.families import FAMILIES, Family
from convert.parity.tiny_recurrent import RECURRENT_VARIANTS
from convert.weights.rules import Rule, Target
from tide_jax.errors import TideError
from tide_jax.model.files.shards import ShardedTensors


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def refusal(converted: Path, **kwargs: Any) -> str:
    """The message an export fails with: one line, and nothing is left behind."""
    destination = kwargs.pop("destination", None) or converted.parent / "hf"
    with pytest.raises(TideError) as caught:
        export(converted, destination, **kwargs)
    assert "\n" not in str(caught.value)
    assert not list(destination.parent.glob(".*")), "a partial directory was left"
    return str(caught.value)


@pytest.fixture
def converted(source: Path, tmp_path: Path) -> Path:
    """A converted tiny Llama."""
    convert_checkpoint(source, tmp_path / "converted")
    return tmp_path / "converted"


# ---- against transformers ----


def load_hf(directory: Path) -> Any:
    """A checkpoint in transformers, complete, in float32."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, info = loaded
    assert not any(info.values()), info
    return model.eval()


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(4, 40).reshape(2, 18)).logits.numpy()


def assert_same_logits(reference: Any, exported: Path) -> None:
    expected = logits(reference)
    assert np.ptp(expected) > 1
    np.testing.assert_array_equal(logits(load_hf(exported)), expected)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "model_type", ["gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "qwen2", "qwen3"]
)
def test_logits(model_type: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from convert.parity.tiny import save_tiny

    reference = save_tiny(model_type, tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "converted", max_shard_bytes=30_000)
    report = export(tmp_path / "converted", tmp_path / "hf", max_shard_bytes=60_000)
    assert len(report.shards) > 1
    assert_same_logits(reference, tmp_path / "hf")


# Text decoders that exist only inside a multimodal model are those of tests/convert/test_text_model.py.
ALONE = sorted(name for name in FAMILIES if not name.endswith("_vl_text") or name == "minimax_m3_vl_text")


# Factors that a conversion takes into its configuration, and none of them into the weights.
MULTIPLIED = ("falcon_h1-multiplied", "falcon_h1-norm-first", "minimax-factors")


@pytest.mark.matrix(keep=5)
@pytest.mark.parametrize("name", [*ALONE, *MULTIPLIED])
def test_tensors_of_every_family(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from convert.parity.tiny import save_tiny

    model_type, fields = RECURRENT_VARIANTS[name] if name in MULTIPLIED else (name, {})
    save_tiny(model_type, tmp_path / "source", **fields)
    try:
        convert_checkpoint(tmp_path / "source", tmp_path / "converted")
    except TideError as error:
        pytest.skip(f"converts in other settings only: {error}")
    blocks = FAMILIES[model_type].shared_blocks
    if blocks is not None and blocks.adapters:
        assert "layers' adapters to a shared block are merged" in refusal(tmp_path / "converted")
        return
    config = tide_jax.model.files.checkpoint.load_config(tmp_path / "converted")
    longest = read_config(tmp_path / "source").get("max_position_embeddings", 0)
    if config.max_positions < longest and not config.learned_positions:
        message = refusal(tmp_path / "converted")
        assert f"was converted for {config.max_positions} of {longest} tokens, without " in message
        return
    report = export(tmp_path / "converted", tmp_path / "hf")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "hf"))
    assert found.keys() == {tensor for tensor in expected if tensor in found or tensor not in report.ignored}
    for tensor, values in found.items():
        unused = values == 0 if tensor in report.ignored else False
        np.testing.assert_array_equal(values, np.where(unused, 0, expected[tensor]), err_msg=tensor)
    written, original = read_config(tmp_path / "hf"), read_config(tmp_path / "source") | {"dtype": "float32"}
    assert added_names(written, original) <= {"torch_dtype", *OLDER_ROTARY_NAMES}
    assert same_rotation(written, original)


def test_bfloat16_in_shards(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from convert.parity.tiny import save_tiny

    reference = save_tiny("mixtral", tmp_path / "source", dtype="bfloat16", max_shard_size="60KB")
    convert_checkpoint(tmp_path / "source", tmp_path / "converted")
    report = export(tmp_path / "converted", tmp_path / "hf", max_shard_bytes=50_000)
    assert report.dtype == "bfloat16"
    assert read_config(tmp_path / "hf")["dtype"] == "bfloat16"
    assert_same_logits(reference, tmp_path / "hf")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("tied", [True, False])
def test_heads_tied_and_not(model_type: str, tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from convert.parity.tiny import save_tiny

    reference = save_tiny(model_type, tmp_path / "source", tie_word_embeddings=tied)
    convert_checkpoint(tmp_path / "source", tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "hf")
    assert_same_logits(reference, tmp_path / "hf")


# ---- without torch ----

# What the configuration classes of transformers 4.57 read, where it is not `rope_theta` and `rope_scaling`.
OLDER_THETA = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base"}
OLDER_SHARE = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}
OLDER_ROTARY_NAMES = {
    *("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq", "rotary_emb_base", "rotary_pct"),
    *("global_rope_theta", "local_rope_theta", "original_max_position_embeddings"),
}
LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FACTORS = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 2.5]}


def added_names(written: dict[str, Any], original: dict[str, Any]) -> set[str]:
    """Names that are new in a configuration or its parts; what it had is there as it was."""
    added = set(written) - set(original)
    for name, value in original.items():
        if isinstance(value, dict) and written[name] != value:
            added |= added_names(written[name], value)
        else:
            assert written[name] == value, name
    return added


def same_rotation(written: dict[str, Any], original: dict[str, Any]) -> bool:
    """Whether the installed transformers reads the same rotary settings with the older names beside the new ones."""
    from transformers import CONFIG_MAPPING

    found = [build_configuration(CONFIG_MAPPING[c["model_type"]], c).to_dict() for c in (written, original)]
    return found[0].get("rope_parameters") == found[1].get("rope_parameters")


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen3", "mixtral", "glm", "stablelm", "gpt_neox", "gpt_neox_japanese"]
)
def test_rotary_settings_under_the_names_of_transformers_4(model_type: str) -> None:
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    config = {"model_type": model_type, "dtype": "float16", "rope_parameters": rope}
    written = add_older_names(config)
    assert written == config | {
        "torch_dtype": "float16",
        OLDER_THETA.get(model_type, "rope_theta"): 500.0,
        OLDER_SHARE.get(model_type, "partial_rotary_factor"): 0.5,
        "rope_scaling": None,
    }
    assert same_rotation(written, config)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi"])
@pytest.mark.parametrize(
    "kind, settings", [("linear", {"factor": 3.0}), ("llama3", LLAMA3), ("dynamic", {"factor": 2.0})]
)
def test_scaling_under_the_name_of_transformers_4(name: str, kind: str, settings: dict[str, Any]) -> None:
    config = {"model_type": name, "rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **settings}}
    written = add_older_names(config)
    assert written["rope_scaling"] == {"rope_type": kind, **settings}
    assert same_rotation(written, config)


def test_settings_of_two_kinds_of_layers() -> None:
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    nested = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 77.0}}
    config = {"model_type": "gemma3_text", "rope_parameters": nested}
    written = add_older_names(config)
    older = {"rope_theta": 1e6, "rope_local_base_freq": 77.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert written == config | older
    assert same_rotation(written, config)
    assert add_older_names({"model_type": "gemma3", "text_config": config})["text_config"] == written


def test_long_rope_of_phi_3_has_three_fields() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.5, **FACTORS}
    rope["original_max_position_embeddings"] = 16
    config = {"model_type": "phi3", **sizes, "rope_parameters": rope}
    written = add_older_names(config)
    assert written["rope_scaling"] == {"type": "longrope", **FACTORS}
    assert written["original_max_position_embeddings"] == 16
    assert add_older_names(config | {"model_type": "llama"})["rope_scaling"] == {
        key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")
    }


def test_words_of_transformers_4_stay_as_they_are() -> None:
    config = {"model_type": "llama", "torch_dtype": "float32", "rope_theta": 500.0, "rope_scaling": None}
    assert add_older_names(config) == config | {"dtype": "float32"}
    both = config | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    assert add_older_names(both) == both | {"dtype": "float32"}


def test_tensors_are_the_source_s(source: Path, converted: Path, tmp_path: Path) -> None:
    report = export(converted, tmp_path / "hf")
    expected, found = random_tensors(), load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert report.parameters == sum(value.size for value in expected.values())
    assert report.bytes == 4 * report.parameters


def test_shards_hold_what_the_index_says(converted: Path, tmp_path: Path) -> None:
    report = export(converted, tmp_path / "hf", max_shard_bytes=3000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(report.shards)
    found = {name: value for shard in report.shards for name, value in load_file(tmp_path / "hf" / shard).items()}
    for name, value in random_tensors().items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_side_files_and_configuration(source: Path, tmp_path: Path) -> None:
    config = read_config(source) | {"torch_dtype": "float32", "made_by": "us", "inner": {"dtype": "float32"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    (source / "tokenizer_config.json").write_text("{}")
    convert_checkpoint(source, tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "hf", dtype="bfloat16")
    half = {"torch_dtype": "bfloat16", "dtype": "bfloat16", "inner": {"dtype": "bfloat16"}}
    assert read_config(tmp_path / "hf") == config | half
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == {"eos_token_id": 7}
    assert (tmp_path / "hf" / "tokenizer_config.json").read_text() == "{}"
    assert load_file(tmp_path / "hf" / "model.safetensors")["model.norm.weight"].dtype == ml_dtypes.bfloat16


def test_ignored_tensors_are_reported(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    convert_checkpoint(save(tmp_path / "source", tensors, tie_word_embeddings=True), tmp_path / "converted")
    report = export(tmp_path / "converted", tmp_path / "hf")
    assert set(report.ignored) == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert json.loads((tmp_path / "hf" / "export.json").read_text())["ignored"] == report.ignored
    assert load_file(tmp_path / "hf" / "model.safetensors").keys() == tensors.keys() - set(report.ignored)


def test_a_head_of_its_own_is_not_tied(tmp_path: Path) -> None:
    convert_checkpoint(save(tmp_path / "source", tie_word_embeddings=True), tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "hf")
    assert read_config(tmp_path / "hf")["tie_word_embeddings"] is False
    np.testing.assert_array_equal(
        load_file(tmp_path / "hf" / "model.safetensors")["lm_head.weight"], random_tensors()["lm_head.weight"]
    )


def test_from_gguf(tmp_path: Path) -> None:
    source = write_with_tokenizer(tmp_path / "m.gguf", bpe_metadata())
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == source.tensors.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, source.read(name), err_msg=name)
    assert read_config(tmp_path / "hf")["model_type"] == "llama"
    assert tide_jax.load_tokenizer(tmp_path / "hf")("cat").input_ids == source.load_tokenizer()("cat").input_ids


def test_an_export_converts_again(converted: Path, tmp_path: Path) -> None:
    export(converted, tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "again")
    first, second = ((path / "model.safetensors").read_bytes() for path in (converted, tmp_path / "again"))
    assert first == second


def test_headers_name_the_format_transformers_asks_for(converted: Path, tmp_path: Path) -> None:
    export(converted, tmp_path / "hf")
    with safe_open(tmp_path / "hf" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_an_expert_is_read_without_its_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"model_type": "mixtral", "num_local_experts": 7, "num_experts_per_tok": 2, "vocab_size": 3}
    save(tmp_path / "source", random_tensors(CONFIG | settings), **settings)
    convert_checkpoint(tmp_path / "source", tmp_path / "converted")
    read, sizes = ShardedTensors.read, []

    def measured(*arguments: Any) -> np.ndarray:
        sizes.append((part := read(*arguments)).size)
        return part

    monkeypatch.setattr(ShardedTensors, "read", measured)
    export(tmp_path / "converted", tmp_path / "hf")
    assert max(sizes) == 12 * 2 * 10  # one expert's gate and up projection


@pytest.mark.parametrize("index", [(), (1,), (1, 2), (1, 2, 3)])
def test_parts_of_a_stored_tensor(index: tuple[int, ...], tmp_path: Path) -> None:
    whole = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    save_file({"before": np.ones(7, np.float32), "whole": whole}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(ShardedTensors(tmp_path).read("whole", index), whole[index])


def test_progress_reaches_the_total(converted: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = export(converted, tmp_path / "hf", progress=lambda *call: calls.append(call))
    assert calls[-1] == (report.bytes, report.bytes)
    assert calls == sorted(calls)


def test_command_line(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(converted), str(tmp_path / "hf"), "--dtype", "float16"]
    assert tide_jax.cli.main.main(arguments) == 0
    assert "float16" in capsys.readouterr().out
    assert tide_jax.cli.main.main(arguments) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert tide_jax.cli.main.main([*arguments, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shards"] == ["model.safetensors"]


# ---- what is refused ----


def test_not_converted(source: Path, tmp_path: Path) -> None:
    assert "is not a converted model" in refusal(source)
    assert "is not a converted model" in refusal(tmp_path / "absent")


def test_overwrite_spares_directories_that_are_no_export(converted: Path, source: Path, tmp_path: Path) -> None:
    assert "does not hold an export" in refusal(converted, destination=source, overwrite=True)
    assert "exists and is not empty" in refusal(converted, destination=source)
    assert (source / "model.safetensors").exists()


def test_conversions_without_a_list_of_tensors(converted: Path) -> None:
    record = json.loads((converted / "conversion.json").read_text())
    (converted / "conversion.json").write_text(json.dumps(record | {"source_tensors": {"a": [1, 2, 3]}}))
    assert "its source_tensors are not [dtype, shape] pairs: convert the checkpoint again" in refusal(converted)
    del record["source_tensors"]
    (converted / "conversion.json").write_text(json.dumps(record))
    assert "an older version made it: convert the checkpoint again" in refusal(converted)
    (converted / "conversion.json").unlink()
    assert "conversion.json is missing" in refusal(converted)


def fills(rule: Rule, path: str) -> bool:
    return any(target.path == path for target in rule.targets)


def test_a_changed_weight_map_is_noticed(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = tuple(rule for rule in FAMILIES["llama"].rules if not fills(rule, "final_norm.scale"))
    monkeypatch.setitem(FAMILIES, "llama", dataclasses.replace(FAMILIES["llama"], rules=rules))
    message = refusal(converted)
    assert "was converted with another weight map: convert the checkpoint again" in message
    assert "model.norm.weight" in message


def with_final_norm(take: Any) -> Family:
    """Llama whose final norm is arranged in another way."""
    target = Target("final_norm.scale", take)
    rules = (
        dataclasses.replace(rule, targets=(target,)) if fills(rule, target.path) else rule
        for rule in FAMILIES["llama"].rules
    )
    return dataclasses.replace(FAMILIES["llama"], rules=tuple(rules))


@pytest.mark.parametrize("take", [lambda a, c: a * 2, lambda a, c: np.broadcast_to(a[:1], 12)])
def test_conversions_that_do_arithmetic(take: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "llama", with_final_norm(take))
    convert_checkpoint(save(tmp_path / "source"), tmp_path / "converted")
    message = refusal(tmp_path / "converted")
    assert message == "model.norm.weight cannot be exported: its conversion does more than rearrange numbers"


def test_numbers_the_conversion_dropped_are_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "llama", with_final_norm(lambda a, c: a[2:]))
    tensors = random_tensors() | {"model.norm.weight": np.arange(1, 15, dtype=np.float32)}
    convert_checkpoint(save(tmp_path / "source", tensors), tmp_path / "converted")
    report = export(tmp_path / "converted", tmp_path / "hf")
    assert report.ignored == {"model.norm.weight": "2 of its 14 numbers, which the model does not use, are zeros"}
    found = load_file(tmp_path / "hf" / "model.safetensors")["model.norm.weight"]
    assert found.tolist() == [0, 0, *range(3, 15)]


def test_parameters_of_another_shape(converted: Path, tmp_path: Path) -> None:
    longer = random_tensors(CONFIG | {"vocab_size": 20})
    convert_checkpoint(save(tmp_path / "longer", longer, vocab_size=20), tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "model.safetensors", converted / "model.safetensors")
    message = refusal(converted)
    assert (
        "2 parameters that do not fit its configuration (embed.kernel has shape (20, 12), expected (19, 12))" in message
    )


def test_overflow(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["lm_head.weight"][0, 0] = 1e6
    convert_checkpoint(save(tmp_path / "source", tensors), tmp_path / "converted")
    assert "tensor lm_head.weight overflows float16" in refusal(tmp_path / "converted", dtype="float16")


def test_a_failure_leaves_nothing(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert.exporting, "copy_side_files", fail)
    with pytest.raises(KeyboardInterrupt):
        export(converted, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "source"]

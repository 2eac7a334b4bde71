"""What a conversion refuses, one line each."""

from __future__ import annotations

import importlib.util
import json
import logging
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_llama import random_tensors, refusal, save, save_sharded

from convert import open_model
from convert.architecture import decoder_config
from convert.families import FAMILIES, REFUSED
from convert.sources.huggingface import HuggingFaceSource
from convert.sources.open import open_source
from convert.weights.rules import Target, ignore, move, plan_conversion
from tide_jax.errors import TideError
from tide_jax.model.files.shards import TensorInfo

# ---- what does not fit ----


MISFITS: dict[str, tuple[dict[str, tuple[int, ...] | None], str]] = {
    "unknown": ({"model.layers.0.surprise": (3,)}, "tensor model.layers.0.surprise [3] is unknown to this family"),
    "twice": (
        {"embed_tokens.weight": (19, 12)},
        "parameter embed.kernel is filled more than once, by embed_tokens.weight, model.embed_tokens.weight",
    ),
    "another shape": (
        {"model.layers.0.self_attn.q_proj.weight": (7, 12)},
        "q_proj.weight has shape [7, 12], expected one that can be arranged as layers.0.attention.q.kernel [12, 3, 6]",
    ),
    "another size": (
        {"model.layers.1.mlp.down_proj.weight": (12, 11)},
        "down_proj.weight has shape [12, 11], which gives [11, 12], expected layers.1.mlp.down.kernel [10, 12]",
    ),
    "no place": (
        {"model.layers.0.mlp.up_proj.bias": (10,)},
        "up_proj.bias [10] would fill layers.0.mlp.gate_up.bias, which the model does not have",
    ),
    "half missing": (
        {"model.layers.1.self_attn.v_proj.weight": None},
        "parameter layers.1.attention.kv.kernel[:, :, 1] [12, 1, 6] has no source tensor",
    ),
    "missing": ({"model.norm.weight": None}, "parameter final_norm.scale [12] has no source tensor"),
}


def misfit(path: Path, *cases: str) -> str:
    """The refusal of a checkpoint with some of `MISFITS`."""
    tensors = random_tensors()
    for case in cases:
        for name, shape in MISFITS[case][0].items():
            tensors[name] = np.zeros(shape or (1,), np.float32)
            if shape is None:
                del tensors[name]
    return refusal(save(path, tensors))


@pytest.mark.parametrize("case", MISFITS)
def test_every_misfit_is_named(case: str, tmp_path: Path) -> None:
    message = misfit(tmp_path / "source", case)
    assert MISFITS[case][1] in message
    assert "1 problem: " in message


def test_the_first_three_of_many_misfits_are_named(tmp_path: Path) -> None:
    """The configuration of another model misfits everywhere."""
    message = misfit(tmp_path / "source", *MISFITS)
    assert "7 problems: source tensor" in message
    assert message.endswith("; and 4 more")
    assert message.count("; ") == 3
    deep = save(tmp_path / "deep", random_tensors(), num_hidden_layers=99, vocab_size=99999)
    assert "problems: source tensor" in refusal(deep)


def test_a_configuration_nested_too_deep(source: Path) -> None:
    (source / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    assert "config.json cannot be read as JSON" in refusal(source)


def test_a_tensor_that_two_rules_match(source: Path) -> None:
    opened = HuggingFaceSource(source)
    rules = (*FAMILIES["llama"].rules, ignore(r"model\.norm\.weight", "for the test"))
    with pytest.raises(TideError, match=r"model\.norm\.weight \[12\] matches 2 rules, expected one"):
        plan_conversion(opened.tensors, rules, decoder_config(opened))


def test_a_slot_outside_the_parameter(source: Path) -> None:
    opened = HuggingFaceSource(source)
    rules = (*FAMILIES["llama"].rules, move("extra.{row}", Target("embed.kernel", slot="{row}")))
    with pytest.raises(TideError, match=r"extra\.19 \[12\] would fill embed\.kernel\[19\], outside \[19, 12\]"):
        plan_conversion({**opened.tensors, "extra.19": TensorInfo((12,), "F32")}, rules, decoder_config(opened))


# ---- bad input, one line each ----


def test_missing_shard(tmp_path: Path) -> None:
    sharded = save_sharded(tmp_path / "source")
    (sharded / "model-00002-of-00002.safetensors").unlink()
    assert "names shards that are not there: model-00002-of-00002.safetensors" in refusal(sharded)


def test_index_lists_tensors_that_are_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = save_sharded(tmp_path / "source") / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"model.extra": "model-00001-of-00002.safetensors"}}))
    with caplog.at_level(logging.WARNING):
        open_model(index.parent)  # nothing needs it
    assert "lists tensors that its shards do not hold: model.extra" in caplog.text
    tensors = random_tensors()
    del tensors["model.norm.weight"]
    missing = save_sharded(tmp_path / "missing", tensors)
    (missing / index.name).write_text(json.dumps({"weight_map": weight_map}))
    assert "parameter final_norm.scale [12] has no source tensor" in refusal(missing)


@pytest.mark.parametrize("values", [3, [1], None, {"file": "x"}])
def test_index_maps_to_something_other_than_file_names(values: Any, tmp_path: Path) -> None:
    index = save_sharded(tmp_path / "source") / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": values}}))
    assert "maps tensors to something else than file names" in refusal(index.parent)


def change_header(file: Path, **entries: Any) -> None:
    """Replaces what a safetensors header says of some tensors; the data stays."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for name, values in entries.items():
        header[name] |= values
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"data_offsets": [-48, 0]}, "expected whole numbers, 0 or more"),
        ({"data_offsets": [96, 48]}, "has -48 bytes"),
        ({"data_offsets": [8, 56]}, "overlap"),
        ({"data_offsets": [0]}, "not a readable safetensors file"),
        ({"data_offsets": [0.0, 48.0]}, "expected whole numbers, 0 or more"),
        ({"shape": [-12]}, "expected whole numbers, 0 or more"),
        ({"shape": 12}, "not a readable safetensors file"),
    ],
)
def test_senseless_header(values: dict[str, Any], reason: str, source: Path) -> None:
    change_header(source / "model.safetensors", **{"model.norm.weight": values})
    message = refusal(source)
    assert reason in message
    assert "model.safetensors is not a readable safetensors file" in message


def test_a_file_without_a_header_is_cut_short(source: Path) -> None:
    (source / "model.safetensors").write_bytes(b"abc")
    assert "model.safetensors is cut short: 3 bytes" in refusal(source)


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
    tensors = random_tensors() | {"model.norm.weight": np.ones(12, np.int16)}
    assert "model.norm.weight has dtype I16, expected one of F32, F16, BF16" in refusal(save(tmp_path / "s", tensors))


@pytest.mark.parametrize("which", ["all", "model.norm.weight"])
def test_float64_is_rounded_to_float32(which: str, tmp_path: Path) -> None:
    tensors = random_tensors()
    wide = {name: a.astype(np.float64) if which in ("all", name) else a for name, a in tensors.items()}
    found, expected = open_model(save(tmp_path / "wide", wide)), open_model(save(tmp_path / "source", tensors))
    tokens = np.arange(6)[None]
    assert np.array_equal(found(tokens), expected(tokens))
    wide["model.norm.weight"] = np.full(12, 1e300)
    assert "tensor model.norm.weight overflows float32" in refusal(save(tmp_path / "huge", wide))


def test_no_config(source: Path) -> None:
    (source / "config.json").unlink()
    assert "config.json is missing" in refusal(source)


def test_config_is_not_json(source: Path) -> None:
    (source / "config.json").write_text("{]")
    assert "config.json cannot be read as JSON" in refusal(source)


def test_config_without_model_type(tmp_path: Path) -> None:
    message = refusal(save(tmp_path / "source", model_type=None))
    assert "config.json has no model_type, expected one such as 'llama'" in message


def test_unsupported_model_type(tmp_path: Path) -> None:
    message = refusal(save(tmp_path / "source", model_type="acme"))
    assert "model_type 'acme' is in no table (" in message


def test_an_encoder_decoder_is_refused_with_the_reason(tmp_path: Path) -> None:
    message = refusal(save(tmp_path / "source", model_type="t5"))
    assert "model_type 't5' is an encoder and a decoder that reads the encoder's output" in message


@pytest.mark.parametrize(
    "values",
    [{"model_type": ["llama"]}, {"model_type": 7}, {"architectures": 5}, {"architectures": "A"}, {"auto_map": ["A"]}],
)
def test_a_key_that_decides_how_to_read_the_rest_has_the_wrong_type(values: dict[str, Any], tmp_path: Path) -> None:
    assert f"config.json has {next(iter(values))}=" in refusal(save(tmp_path / "source", **values))


def test_a_refused_model_type_says_the_reason(tmp_path: Path) -> None:
    message = refusal(save(tmp_path / "source", model_type="reformer"))
    assert "model_type 'reformer' is not supported: it attends by locality-sensitive hashing" in message
    assert set(REFUSED).isdisjoint(FAMILIES)


def test_invalid_config_value(tmp_path: Path) -> None:
    assert "config.json is not valid for llama" in refusal(save(tmp_path / "source", rms_norm_eps="small"))
    assert "config.json is not valid for llama" in refusal(save(tmp_path / "other", hidden_size="twelve"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "gpt2", "n_layer": 1, "add_cross_attention": True}, "add_cross_attention=True"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"hidden_act": "mish"}, "activation 'mish' is not supported, expected one of"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "rope_type 'spiral'"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quantised with aqlm"),
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


def test_missing_source(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent")
    assert "absent.gguf does not exist" in refusal(tmp_path / "absent.gguf")


def test_hub_id_without_network(tmp_path: Path) -> None:
    with pytest.raises(TideError, match="could not be downloaded from the Hugging Face hub"):
        open_source("nobody/no-such-model")


def test_verify_without_torch(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "run `pip install torch accelerate`" in refusal(source, verify=True)


# ---- settings ----


@pytest.mark.parametrize("value", ["</s>", 2.5, [2, "x"], True, {"id": 2}])
@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id"])
def test_special_tokens_that_are_no_ids(name: str, value: Any, source: Path) -> None:
    (source / "generation_config.json").write_text(json.dumps({name: value}))
    assert f"{name} is {value!r}, expected a token id" in refusal(source)


@pytest.mark.parametrize("outside", [-1, 19])
def test_special_tokens_outside_the_vocabulary_are_ignored(
    outside: int, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"eos_token_id": [outside, 7], "pad_token_id": outside}
    (source / "generation_config.json").write_text(json.dumps(settings))
    with caplog.at_level(logging.WARNING):
        config = decoder_config(HuggingFaceSource(source))
    assert config.eos_token_ids == (7,)
    assert config.pad_token_id is None
    assert [record.message.split(" ")[0] for record in caplog.records] == [
        f"eos_token_id=[{outside}]",
        f"pad_token_id=[{outside}]",
    ]


@pytest.mark.parametrize(
    "name", ["num_attention_heads", "num_key_value_heads", "num_hidden_layers", "hidden_size", "vocab_size"]
)
@pytest.mark.parametrize("value", [0, -3])
def test_sizes_below_one(name: str, value: int, tmp_path: Path) -> None:
    assert f"config.json has {name}={value}, expected 1 or more" in refusal(save(tmp_path / "source", **{name: value}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"short_factor": [1.0, 2.0]}, "2 values in short_factor, expected 3"),
        ({"long_factor": [1.0] * 6}, "6 values in long_factor, expected 3"),
        ({"long_factor": [1.0, "wide", 3.0]}, "rope_type 'longrope'"),
        ({"original_max_position_embeddings": 1, "factor": 4.0}, "rope_type 'longrope'"),
    ],
)
def test_senseless_longrope(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 16, "rope_theta": 1e4}
    factors = {"short_factor": [1.0, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0]}
    assert reason in refusal(save(tmp_path / "source", rope_parameters=rope | factors | change))

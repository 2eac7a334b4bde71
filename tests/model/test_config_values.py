"""Configurations with values that make no sense: one clear line, and nothing of their size is ever made."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from test_settings import Settings
from tiny_llama import refusal, save
from tiny_models import CONFIGS

from convert import convert
from convert.architecture import decoder_config
from convert.parity.tiny import tiny_config
from convert.sources.text_model import text_decoder
from tide_jax import TIDE, TideError
from tide_jax.functional import Decoder, DecoderConfig
from tide_jax.model.activations import ACTIVATIONS, KNOWN_ACTIVATIONS
from tide_jax.model.architecture_parts import GatedActivation, PlainActivation, UngatedActivation
from tide_jax.model.files.checkpoint import load, load_config
from tide_jax.testing import tiny_config as tiny_decoder_config

EXAMPLES = settings(max_examples=int(os.environ.get("TIDE_EXAMPLES", "150")), deadline=None, derandomize=True)
TYPES = [
    "llama",
    "gemma3_text",
    "gpt2",
    "mixtral",
    "deepseek_v2",
    "qwen2",
    "gpt_oss",
    "bloom",
    "bert",
    "granitemoehybrid",
]
CHECKPOINTS = {name: json.loads(tiny_config(name).to_json_string(use_diff=False)) for name in TYPES}
VALUES = st.one_of(
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, True, None, "8", "", [], {}, [[]], 0.5, -0.0, 1e300, 1e-300, "relu"]),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), [float("nan")], {"a": 1}, [1, "2"], 10**400]),
    st.integers(-5, 5),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
)


def places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where anything stands in JSON, at any depth."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [place for name, item in items for place in ((*path, name), *places(item, (*path, name)))]


def changed(values: Any, place: tuple[Any, ...], value: Any) -> Any:
    values = copy.deepcopy(values)
    inside = values
    for name in place[:-1]:
        inside = inside[name]
    inside[place[-1]] = value
    return values


def check_result(read: Callable[[], DecoderConfig]) -> None:
    """The configuration that `read` returns makes sense, or its refusal is one line."""
    try:
        found = read()
    except TideError as error:
        message = str(error)
    else:
        return found.check()
    assert "\n" not in message
    assert 20 <= len(message) <= 300, message
    return None


@EXAMPLES
@given(st.data())
def test_a_checkpoint_with_another_value_is_refused_in_one_line_or_makes_sense(data: st.DataObject) -> None:
    config = CHECKPOINTS[data.draw(st.sampled_from(TYPES))]
    for _ in range(data.draw(st.integers(1, 2))):
        config = changed(config, data.draw(st.sampled_from(places(config))), data.draw(VALUES))
    source: Any = Settings(config)
    source.config["model_type"] = (
        source.config["model_type"] if isinstance(source.config["model_type"], str) else "llama"
    )
    check_result(lambda: decoder_config(text_decoder(source)))


@EXAMPLES
@given(st.data())
def test_a_converted_model_with_another_value_is_refused_in_one_line_or_makes_sense(data: st.DataObject) -> None:
    values = json.loads(json.dumps(CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))].to_dict()))
    values = changed(values, data.draw(st.sampled_from(places(values))), data.draw(VALUES))
    check_result(lambda: DecoderConfig.from_dict(values))


@pytest.mark.parametrize("name", ["norm_eps", "tie_embeddings", "moe", "eos_token_ids"])
def test_a_missing_field_of_a_converted_model_is_no_default(name: str) -> None:
    values = CONFIGS["mixture"].to_dict() if "mixture" in CONFIGS else next(iter(CONFIGS.values())).to_dict()
    del values[name]
    with pytest.raises(TideError, match=f"{name} is missing"):
        DecoderConfig.from_dict(values)


def test_missing_fields_inside_of_parts_are_named() -> None:
    values = next(iter(CONFIGS.values())).to_dict()
    values["attention_types"] = [{"scale": 1.0}]
    with pytest.raises(TideError, match=r"attention_types\.0\.window is missing; .*; and \d+ more: damaged"):
        DecoderConfig.from_dict(values)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"norm_eps": float("nan")}, "norm_eps=nan should be a finite number"),
        ({"norm_eps": -1e-6}, "norm_eps=-1e-06 should be at least 0"),
        ({"vocab_size": True}, "vocab_size=True should be a integer"),
        ({"vocab_size": "199"}, "vocab_size='199' should be a integer"),
        ({"vocab_size": 2**63}, "vocab_size=9223372036854775808 should be at most 16777216"),
        ({"num_layers": 2**31}, "num_layers=2147483648 should be at most 4096"),
        ({"norm": "batch"}, "norm='batch' should be 'rms' or 'layer'"),
        ({"logit_scale": 0.0}, "logit_scale=0.0 should be at least"),
        ({"surprise": 1}, "surprise=1 is not a known field"),
        ({"activation": "x"}, "activation='x' is not known; choose one of silu, "),
        ({"activation": "xielu"}, "activation='xielu' is not known"),
        ({"activation": "swiglu_oai", "mlp_gated": False}, "activation='swiglu_oai' is not known"),
        ({"head_transform": {"activation": "x", "size": None, "bias": True}}, "activation='x'"),
        ({"attention_types": []}, "layer_pattern names layer type 0, expected one of the 0"),
        ({"carried": "x"}, "carried='x' should be 'nothing', 'embedding' or 'shortcut'"),
        ({"carried": "embedding"}, 'carried="embedding" is for plain attention beside a recurrent layer'),
        ({"carried": "shortcut"}, 'carried="shortcut" is for experts that are in some layers'),
    ],
)
def test_values_of_a_converted_model(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(TideError) as caught:
        DecoderConfig.from_dict(next(iter(CONFIGS.values())).to_dict() | changes)
    assert expected in str(caught.value)


def test_an_layer_pattern_names_types_that_are_there() -> None:
    values = next(iter(CONFIGS.values())).to_dict()
    values["layer_pattern"] = [*values["layer_pattern"][:-1], 7]
    with pytest.raises(TideError, match="layer_pattern names layer type 7, expected one of the"):
        DecoderConfig.from_dict(values)


def test_the_activations_of_a_configuration_are_those_that_there_are() -> None:
    assert get_args(PlainActivation) == tuple(ACTIVATIONS)
    assert {*get_args(GatedActivation), *get_args(UngatedActivation)} == set(KNOWN_ACTIVATIONS)


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["logit_scale", "residual_scale", "logit_softcap", "activation_limit", "clip_qkv"])
def test_whole_numbers_beyond_32_bits_run(name: str) -> None:
    """JSON writes 3e9 as it likes; JAX takes no int of this size in the place of a float."""
    values = tiny_decoder_config().to_dict()
    found, wanted = (DecoderConfig.from_dict(values | {name: value}) for value in (3_000_000_000, 3e9))
    # Equal numbers share a compiled program: the whole one has to make its own.
    logits = [TIDE(Decoder(config, rngs=nnx.Rngs(0)))([[3, 4, 5]]).logits for config in (found, wanted)]
    np.testing.assert_array_equal(*logits)


def test_a_damaged_config_names_the_file(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["tide_jax"]["decoder"]["norm_eps"] = "small"
    file.write_text(json.dumps(config))
    for read in (load, load_config):
        with pytest.raises(TideError, match=r"out/config\.json: norm_eps='small' should be a number"):
            read(tmp_path / "out")
    file.write_text(json.dumps(config | {"tide_jax": config["tide_jax"] | {"dtype": 5}}))
    with pytest.raises(TideError, match="its dtype entry is no string"):
        load(tmp_path / "out")


@pytest.mark.matrix(keep=3)
@pytest.mark.parametrize(
    "values, expected",
    [
        ({"num_hidden_layers": 2**31}, "num_hidden_layers=2147483648, expected 4096 or less"),
        ({"vocab_size": 2**63}, "vocab_size=9223372036854775808, expected 16777216 or less"),
        ({"num_labels": 2**40}, "num_labels=1099511627776, expected 65536 or less"),
        ({"vision_config": {"depth": 2**40}}, "depth=1099511627776, expected 4096 or less"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "norm_eps=nan should be a finite number"),
        ({"rms_norm_eps": -1.0}, "norm_eps=-1.0 should be at least 0"),
        ({"rope_theta": float("inf")}, "theta=inf"),
        ({"rope_theta": "10000"}, "rope_theta='10000'"),
        ({"rope_theta": True}, "rope_theta=True"),
        ({"rope_theta": 0}, "theta=0.0 should be at least 1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor=nan should be a finite number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "factor='4'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2.0}}, "factor=-2.0 should be at least"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope_type"),
    ],
)
def test_values_of_a_checkpoint(values: dict[str, Any], expected: str, tmp_path: Path) -> None:
    message = refusal(save(tmp_path / "source", **values))
    assert expected in message
    assert str(tmp_path / "source") in message

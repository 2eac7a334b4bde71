"""Kinds of recurrent layers as flags: JSON there and back, and values that make no sense."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tide_jax import TideError
from tide_jax.functional import DecoderConfig
from tide_jax.model.recurrent.types import GatedDeltaType, StateSpaceType
from tide_jax.testing import tiny_hybrid_config


def values_of(config: DecoderConfig) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict()))


def test_every_kind_survives_json() -> None:
    config = tiny_hybrid_config()
    assert DecoderConfig.from_dict(values_of(config)) == config
    assert len({type(kind) for kind in config.recurrent_types}) == 5


@pytest.mark.parametrize(
    ("number", "change", "said"),
    [
        (1, {"state_size": ...}, r"recurrent_types\.1\.state_size is missing"),
        (2, {"key_dim": 0}, "key_dim"),
        (2, {"tilt": 1}, "tilt"),
        (0, {"width": "three"}, "width"),
    ],
)
def test_a_damaged_kind_is_named(number: int, change: dict[str, Any], said: str) -> None:
    values = values_of(tiny_hybrid_config())
    kind = values["recurrent_types"][number] | change
    values["recurrent_types"][number] = {name: value for name, value in kind.items() if value is not ...}
    with pytest.raises(TideError, match=said):
        DecoderConfig.from_dict(values)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GatedDeltaType(3, 4, 8, 8, 4), "value_heads=4 is not a multiple of key_heads=3"),
        (lambda: StateSpaceType(6, 8, 4, 5, 4), "heads=6 is not a multiple of groups=4"),
        (lambda: StateSpaceType(6, 8, 2, 5, 4, step_limit=(2.0, 1.0)), "must be the least and the largest time step"),
        (lambda: StateSpaceType(6, 8, 2, 5, 4, step_limit=(2.0,)), "must be the least and the largest time step"),
        (
            lambda: StateSpaceType(6, 8, 2, 5, 4, scales=(1.0,) * 4),
            "must be five: of gate, inner stream, keys, queries",
        ),
        (lambda: tiny_hybrid_config(layer_pattern=(0, 1, 2, 3, 4, 6)), "names layer type 6, expected one of the 6"),
        (lambda: tiny_hybrid_config(beside_attention=5), "beside_attention=5 names no recurrent type, expected one of"),
        (lambda: tiny_hybrid_config(mlp_layers=(0, 6)), "mlp_layers names layer 6, expected layers below 6"),
    ],
)
def test_sizes_that_do_not_fit(make: Any, said: str) -> None:
    with pytest.raises(TideError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"beside_attention": -1}, "beside_attention=-1 should be at least 0"),
        ({"beside_attention": "0"}, "beside_attention='0' should be a integer"),
        ({"beside_attention": 5}, "beside_attention=5 names no recurrent type"),
        ({"mlp_layers": [-1]}, "mlp_layers.0=-1 should be at least 0"),
        ({"mlp_layers": [0, 6]}, "mlp_layers names layer 6, expected layers below 6"),
    ],
)
def test_layers_of_a_converted_model_that_are_not_there(change: dict[str, Any], said: str) -> None:
    with pytest.raises(TideError) as caught:
        DecoderConfig.from_dict(values_of(tiny_hybrid_config()) | change)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        ([1.0] * 4, "recurrent_types.1.StateSpaceType: scales=(1.0, 1.0, 1.0, 1.0) must be five"),
        ([1.0] * 4 + [0.0], "scales.4=0.0 should be at least"),
        ([1.0] * 4 + ["wide"], "scales.4='wide' should be a number"),
    ],
)
def test_scales_of_a_converted_state_space_layer(scales: list[Any], said: str) -> None:
    values = values_of(tiny_hybrid_config())
    number = next(i for i, kind in enumerate(values["recurrent_types"]) if kind["kind"] == "state_space")
    values["recurrent_types"][number]["scales"] = scales
    with pytest.raises(TideError) as caught:
        DecoderConfig.from_dict(values)
    assert said in str(caught.value)


def test_a_kind_of_the_wrong_size_is_named_without_the_other_kinds() -> None:
    config = tiny_hybrid_config(recurrent_types=(StateSpaceType(6, 8, 2, 0, 4),), layer_pattern=(0, 1, 1, 1, 1, 1))
    with pytest.raises(TideError) as caught:
        config.check()
    assert str(caught.value) == "recurrent_types.0.StateSpaceType.state_size=0 should be at least 1"

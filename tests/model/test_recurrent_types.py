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
        (lambda: tiny_hybrid_config(layer_pattern=(0, 1, 2, 3, 4, 6)), "names layer type 6, expected one of the 6"),
    ],
)
def test_sizes_that_do_not_fit(make: Any, said: str) -> None:
    with pytest.raises(TideError, match=said):
        make()

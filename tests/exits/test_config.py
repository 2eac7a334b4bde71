"""Configurations: values that are refused, and the way to JSON and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tiny_models import CONFIGS

from tide_jax import CalibrationConfig, ExitConfig, TideError
from tide_jax.config import exit_point_layers, layer_groups
from tide_jax.functional import DecoderConfig
from tide_jax.model.architecture import AttentionType, RopeConfig
from tide_jax.testing import tiny_config


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"exit_threshold": 1.2}, "exit_threshold=1.2"),
        ({"exit_threshold": -0.1}, "exit_threshold=-0.1"),
        ({"exit_threshold": float("nan")}, "exit_threshold=nan"),
        ({"exit_threshold": "high"}, "exit_threshold='high'"),
        ({"exit_threshold": True}, "exit_threshold=True"),
        ({"exit_threshold": (0.5, 2)}, "exit_threshold=2"),
        ({"min_layers": -1}, "min_layers=-1"),
        ({"min_layers": 2.5}, "min_layers=2.5"),
        ({"min_layers": True}, "min_layers=True"),
        ({"kv_strategy": "forget"}, "kv_strategy='forget'.*propagate.*recompute"),
        ({"threshold_tilt": 1.5}, "threshold_tilt=1.5"),
        ({"threshold_tilt": 0.5, "exit_threshold": (0.5, 0.6)}, "threshold_tilt needs a single exit_threshold"),
    ],
)
def test_exit_settings_out_of_range(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(TideError, match=expected):
        ExitConfig(**values)


def test_a_tilted_threshold_asks_more_of_deep_exit_points() -> None:
    exit_points = (1, 3, 5)
    assert ExitConfig(exit_threshold=0.8).thresholds(exit_points, 8) == (0.8, 0.8, 0.8)
    tilted = ExitConfig(exit_threshold=0.8, threshold_tilt=1.0).thresholds(exit_points, 8)
    assert tilted == pytest.approx((0.7, 0.8, 0.9)), "what may go wrong is in proportion to the layers saved"
    assert ExitConfig(exit_threshold=0.1, threshold_tilt=1.0).thresholds((0,), 8) == (0.0,)
    assert ExitConfig(exit_threshold=1.0, threshold_tilt=1.0).thresholds(exit_points, 8) == (1.0, 1.0, 1.0)
    assert ExitConfig(exit_threshold=(0.1, 0.2, 0.3)).thresholds(exit_points, 8) == (0.1, 0.2, 0.3)


def test_a_list_of_thresholds_stays_hashable() -> None:
    assert hash(ExitConfig(exit_threshold=[0.1, 0.2])) == hash(ExitConfig(exit_threshold=(0.1, 0.2)))  # type: ignore


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"checkpoint_interval": 0}, "checkpoint_interval=0"),
        ({"calibration_samples": 0}, "calibration_samples=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"router_bottleneck_dim": 0}, "router_bottleneck_dim=0"),
        ({"max_epochs": 0}, "max_epochs=0"),
        ({"max_length": 1}, "max_length=1"),
        ({"exit_strategy": "magic"}, "exit_strategy='magic'"),
        ({"label": "luck"}, "label='luck'"),
        ({"convergence_threshold": 1.5}, "convergence_threshold=1.5"),
        ({"exit_threshold": -1}, "exit_threshold=-1"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"exit_head_rank": 0}, "exit_head_rank=0"),
        ({"min_layers": -2}, "min_layers=-2"),
        ({"reservoir_bytes": 0}, "reservoir_bytes=0"),
    ],
)
def test_calibration_settings_out_of_range(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(TideError, match=expected):
        CalibrationConfig(**values)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"norm": "batch"}, "norm='batch'"),
        ({"norm_placement": "inside"}, "norm_placement='inside'"),
        ({"positions": "alibi"}, "positions='alibi'"),
        ({"layer_pattern": (0, 0)}, "2 entries, expected one for each of the 6"),
        ({"num_kv_heads": 4}, "num_heads=6 is not a multiple of num_kv_heads=4"),
        ({"num_kv_heads": 0}, "num_kv_heads=0"),
    ],
)
def test_decoder_settings_that_make_no_model(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(TideError, match=expected):
        tiny_config(**changes)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoder_settings_survive_json(name: str) -> None:
    values = json.loads(json.dumps(CONFIGS[name].to_dict()))
    again = DecoderConfig.from_dict(values)
    assert again == CONFIGS[name]
    assert hash(again) == hash(CONFIGS[name])


def test_frequencies_survive_json() -> None:
    rope = RopeConfig(10000.0, 8, "longrope", short_factor=(1.0, 1.1), long_factor=(2.0, 2.1))
    config = tiny_config(attention_types=(AttentionType(1.0, rope=rope),))
    assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("damage", [{"surprise": 1}, {"vocab_size": ...}, {"attention_types": [{"tilt": 1}]}])
def test_settings_of_another_version_are_refused(damage: dict[str, Any]) -> None:
    values = tiny_config().to_dict() | damage
    values = {name: value for name, value in values.items() if value is not ...}
    with pytest.raises(TideError, match="another version"):
        DecoderConfig.from_dict(values)


def test_dynamic_rotary_scaling_stretches_the_context() -> None:
    rope = RopeConfig(10000.0, 8, "dynamic", factor=2.5, max_positions=512)
    assert tiny_config(attention_types=(AttentionType(1.0, rope=rope),)).context_length == 1280
    assert tiny_config().context_length == 512


@pytest.mark.matrix(keep=4)
@pytest.mark.parametrize("layers", range(1, 14))
@pytest.mark.parametrize("interval", range(1, 6))
def test_groups_cover_every_layer_once_and_the_last_has_no_exit_point(layers: int, interval: int) -> None:
    exit_points = exit_point_layers(layers, interval)
    assert list(exit_points) == [layer for layer in range(layers - 1) if (layer + 1) % interval == 0]
    groups = layer_groups(layers, exit_points)
    assert [layer for group in groups for layer in group] == list(range(layers))
    assert [group[-1] for group in groups] == [*exit_points, layers - 1]

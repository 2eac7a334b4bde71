"""What a run cost, counted by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tide_jax.generation.stats import ExitStats

STATS = ExitStats.from_exit_layers(
    np.asarray([[3, 1, 1, 3], [3, 0, -1, -1]]), num_layers=4, layers_executed=13, steps=4, wall_time=2.0
)


def test_counts() -> None:
    assert STATS.tokens == 6
    assert STATS.layers_run == 4 + 2 + 2 + 4 + 4 + 1
    assert STATS.exits_per_layer == (1, 2, 0, 3)
    assert STATS.full_depth_tokens == 3
    assert STATS.layers_per_token == pytest.approx(17 / 6)
    assert STATS.depth == pytest.approx(17 / 24)
    assert STATS.tokens_per_second == pytest.approx(3.0)


def test_json() -> None:
    values = json.loads(json.dumps(STATS.to_dict()))
    assert values["layers_executed"] == 13
    assert values["depth"] == pytest.approx(17 / 24)
    assert values["tokens_per_second"] == pytest.approx(3.0)
    assert values["compile_time"] == 0.0


def test_summary_shows_layers_and_wall_clock() -> None:
    text = STATS.summary()
    for part in ("6 tokens in 2.00 s", "3.0 tokens/s", "2.83 of 4", "70.8%", "3.25", "3 of 6", "layer 1: 2"):
        assert part in text
    assert "layer 2" not in text


def test_nothing_at_all() -> None:
    empty = ExitStats.from_exit_layers(np.full((2, 3), -1), num_layers=4, layers_executed=0, steps=0, wall_time=0.0)
    assert (empty.tokens, empty.depth, empty.tokens_per_second) == (0, 0.0, 0.0)
    assert "none" in empty.summary()

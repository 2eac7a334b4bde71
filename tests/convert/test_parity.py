"""The parity harness itself: every kind of wrong model is found out, on the path it is wrong on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from convert.parity import measure as parity
from convert.parity.measure import measure_parity
from convert.parity.tiny import save_tiny
from tide_jax.errors import TideError
from tide_jax.exits.walk import Walk
from tide_jax.model.attention.span import KeyValue
from tide_jax.model.cache import KVCache
from tide_jax.model.decoder import Decoder

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mistral")
    save_tiny("mistral", directory, num_hidden_layers=4)
    return directory


def wrong_paths(checkpoint: Path) -> set[str]:
    return {problem.partition(":")[0] for problem in measure_parity(checkpoint).problems}


def test_a_right_model_has_no_problems(checkpoint: Path) -> None:
    report = measure_parity(checkpoint)
    assert report.problems == ()
    assert 0 < report.relative < parity.TOLERANCE
    assert report.model_type == "mistral"


def test_a_wrong_norm(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path, dtype: str) -> Decoder:
        model = real(path, dtype)
        model.layers[3].pre_mlp_norm.eps = 5.0
        return model

    real = parity.load
    monkeypatch.setattr(parity, "load", load)
    assert {"prefill", "padded", "decode", "greedy"} <= wrong_paths(checkpoint)


def test_a_cache_that_forgets(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def append(cache: KVCache, new: Any, positions: Any, *more: Any, **options: Any) -> KVCache:
        return real(cache, new, jnp.where(positions == 3, -1, positions), *more, **options)

    real = KVCache.append
    monkeypatch.setattr(KVCache, "append", append)
    assert wrong_paths(checkpoint) - {"greedy"} == {"padded", "decode", "forced_exit", "mixed_exit"}


def test_skipped_layers_that_leave_nothing_behind(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def projection(walk: Any, group: int, *arguments: Any) -> Callable[[Any], Any]:
        def fill(state: Any) -> Any:
            state, rows = real(walk, group, *arguments)(state)
            return state, (KeyValue(jnp.zeros_like(rows[0].keys), rows[0].values),)

        return fill

    real = Walk._projection
    monkeypatch.setattr(Walk, "_projection", projection)
    assert wrong_paths(checkpoint) == {"mixed_exit"}


def test_tokens_that_exit_one_layer_late(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = parity.constant_routers
    monkeypatch.setattr(parity, "constant_routers", lambda config, interval: real(config, interval=interval + 1))
    assert {"forced_exit", "mixed_exit"} <= wrong_paths(checkpoint)


def test_logits_that_hardly_differ(tmp_path: Path) -> None:
    save_tiny("cohere", tmp_path, logit_scale=0.01, num_hidden_layers=2)
    assert "nothing was tested" in "".join(measure_parity(tmp_path).problems)


def test_a_checkpoint_that_does_not_convert(tmp_path: Path) -> None:
    save_tiny("zamba", tmp_path)
    with pytest.raises(TideError, match="zamba"):
        measure_parity(tmp_path)

"""The engine where a program has turned `jax_enable_x64` on: the same tokens, whatever mode, strategy or dial.

Numbers that JAX makes without being told a dtype are twice as wide there. With strict promotion (which the whole test
run has), one that meets an int32 or float32 is an error.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from tiny_models import CONFIGS as ARCHITECTURES
from tiny_models import random_prompts, tiny_model

import tide_jax
from tide_jax import TIDE, CalibrationConfig, DriftMonitor, ExitConfig
from tide_jax.lm_eval.continuations import Continuation, score_continuations
from tide_jax.model.architecture import AttentionType, RopeConfig
from tide_jax.testing import random_routers, tiny_config

PROMPTS = random_prompts((9, 4))
DRAWN: dict[str, Any] = {"temperature": 0.8, "key": jax.random.key(7)}
FILTERS: dict[str, Any] = {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3}
EXITS: dict[str, dict[str, Any]] = {
    "propagate": {},
    "recompute": {"kv_strategy": "recompute"},
    "prompts exit": {"prefill_exits": True},
}


def tokens(engine: TIDE, **options: Any) -> list[Any]:
    out = engine.generate(PROMPTS, max_new_tokens=6, **options)
    return [out.tokens.tolist(), out.exit_layers.tolist()]


def streamed(engine: TIDE, mode: Any) -> list[Any]:
    return [step.tokens.tolist() for step in engine.stream(PROMPTS, max_new_tokens=4, mode=mode)]


def scored(engine: TIDE) -> list[Any]:
    out = engine(PROMPTS, prompt_lengths=2)
    return [np.argmax(np.asarray(out.logits), axis=-1).tolist(), out.exit_layers.tolist()]


def continuations(engine: TIDE) -> list[Any]:
    pairs = [Continuation(PROMPTS[0][:4], PROMPTS[0][4:]), Continuation(PROMPTS[1][:2], PROMPTS[1][2:])]
    return [(s.greedy, s.exit_layers.tolist()) for s in score_continuations(engine, pairs)]


def audited(engine: TIDE) -> list[Any]:
    out = engine.generate(PROMPTS, max_new_tokens=4, monitor=DriftMonitor(rate=1.0))
    report = out.stats.drift
    assert report is not None
    return [out.tokens.tolist(), report.tokens, report.agreement]


RUNS: dict[str, Callable[[TIDE], list[Any]]] = {
    "exit": lambda e: [tokens(e.with_config(**dials)) for dials in EXITS.values()],
    "full": lambda e: tokens(e, mode="full"),
    "lossless": lambda e: tokens(e, mode="lossless")[0],
    "lossless twin": lambda e: tokens(e, mode="lossless", draft="int8")[0],
    "sampled": lambda e: tokens(e, **DRAWN, **FILTERS),
    "sampled lossless": lambda e: tokens(e, mode="lossless", **DRAWN)[0],
    "stream": lambda e: streamed(e, "exit"),
    "lossless stream": lambda e: streamed(e, "lossless"),
    "scoring": scored,
    "continuations": continuations,
    "drift": audited,
}
WINDOWED = tiny_config(
    num_layers=2,
    attention_types=(AttentionType(scale=0.4, window=3, rope=RopeConfig(theta=100.0, rotary_dim=4)),),
)
CONFIGS = {
    "dense": tiny_config(num_layers=2),
    "experts": dataclasses.replace(ARCHITECTURES["experts"], num_layers=2),
    "windows": WINDOWED,
}
"""All calls are for the first; the others have sums, sorts and masks of their own."""


def new_engine(name: str) -> TIDE:
    """With every part that routers can have."""
    model = tiny_model(CONFIGS[name])
    routers = random_routers(model.config, interval=1, affine=True, translator_rank=3, model=model)
    return TIDE(model, routers, ExitConfig(min_layers=0, exit_threshold=0.5))


engine_of = functools.cache(new_engine)


@functools.cache
def engine_there() -> TIDE:
    return new_engine("dense")


def wide(function: Callable[[], Any]) -> Any:
    with jax.enable_x64(True):
        return function()


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_answers(run: str) -> None:
    expected = RUNS[run](engine_of("dense"))
    assert wide(lambda: RUNS[run](engine_there())) == expected


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["experts", "windows"])
@pytest.mark.parametrize("mode", ["exit", "lossless"])
def test_architectures(name: str, mode: Any) -> None:
    expected = tokens(engine_of(name), mode=mode)[0]
    assert wide(lambda: tokens(new_engine(name), mode=mode)[0]) == expected


def test_calibration_and_its_guarantee() -> None:
    """Routers can be made there, and promise something about texts."""
    model, texts = engine_of("dense").model, random_prompts((40,) * 24)
    settings = CalibrationConfig(
        calibration_samples=24, max_length=40, min_layers=1, checkpoint_interval=1, batch_size=8, max_epochs=1
    )

    def thresholds() -> Any:
        routers = tide_jax.calibrate(model, None, texts, settings)
        assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(routers.routers))
        config = tide_jax.ExitConfig(min_layers=1, exit_threshold=0.99)
        return tide_jax.guarantee(TIDE(model, routers, config), texts, risk=0.9, delta=0.3, max_length=40)

    assert wide(thresholds).guarantee is not None

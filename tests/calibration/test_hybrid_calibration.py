"""What a user does with a model, done with ones of recurrent layers: calibrate, promise, watch, score, round."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from tiny_models import CONFIGS, random_prompts, tiny_model, with_parameters

import tide_jax
from tide_jax import TIDE, CalibrationConfig, DriftMonitor, ExitConfig, Routers
from tide_jax.functional import Decoder
from tide_jax.lm_eval.continuations import Continuation, score_continuations
from tide_jax.lossless.twin import make_twin
from tide_jax.model.decoder import from_parameters, parameters

TEXTS = random_prompts(tuple(np.random.default_rng(3).integers(8, 25, 60)), seed=4)
SETTINGS = CalibrationConfig(
    checkpoint_interval=2, max_length=24, batch_size=8, router_bottleneck_dim=8, max_epochs=4,
    min_layers=0, exit_strategy="identity",
)  # fmt: skip


KERNELS = {  # some of those that are rounded
    "hybrid": {"recurrent.q.kernel", "recurrent.stream.kernel", "recurrent.inputs.kernel"},
    "side by side": {"recurrent.stream.kernel", "recurrent.gate.kernel", "recurrent.out.kernel"},
}
MODELS = pytest.mark.parametrize("name", KERNELS)


@functools.cache
def finished_model(name: str) -> Decoder:
    """Layers from the third on add nothing: after the second the state is already the last one, but for its size."""
    model = tiny_model(CONFIGS[name])
    adding = ("attention.out.kernel", "recurrent.out.kernel", "mlp.down.kernel")
    names = [path for path in parameters(model) if path.endswith(adding) and int(path.split(".")[1]) > 1]
    return with_parameters(model, dict.fromkeys(names, 0.0))


@functools.cache
def routers(name: str) -> Routers:
    return tide_jax.calibrate(finished_model(name), None, TEXTS, SETTINGS)


def engine(name: str, **settings: Any) -> TIDE:
    return TIDE(finished_model(name), routers(name), ExitConfig(**{"min_layers": 0, "exit_threshold": 0.85} | settings))


@MODELS
def test_calibrated_tokens_leave_where_nothing_is_left_to_do(name: str) -> None:
    report = routers(name).report
    assert [point["agreement"] for point in report["exit_points"]] == [1.0, 1.0]
    row = TEXTS[0]
    early, full = (engine(name)(row, mode=mode) for mode in ("exit", "full"))
    assert early.exit_layers[0, 1:].max() < 5
    np.testing.assert_array_equal(np.argmax(early.logits, axis=-1), np.argmax(full.logits, axis=-1))


@pytest.mark.matrix
@MODELS
def test_a_promise_holds_and_is_watched(name: str) -> None:
    config = tide_jax.guarantee(engine(name), TEXTS, 0.2, 0.1, max_length=24, batch_size=60)
    assert config.guarantee is not None
    assert config.guarantee.observed == 0.0
    monitor = DriftMonitor(1.0)
    out = engine(name, exit_threshold=config.exit_threshold).generate(
        TEXTS[:4], max_new_tokens=9, eos_token_id=[], monitor=monitor
    )
    assert out.stats.depth < 1.0
    assert out.stats.drift is not None
    assert (out.stats.drift.audited, out.stats.drift.agreement) == (4, 1.0)


@MODELS
@pytest.mark.parametrize("mode", ["exit", "full"])
def test_continuations_score_as_all_logits(mode: Any, name: str) -> None:
    context, tokens = TEXTS[1][:5], TEXTS[1][5:8]
    (found,) = score_continuations(engine(name), [Continuation(context, tokens)], mode=mode)
    logits = np.asarray(engine(name)([*context, *tokens], mode=mode, prompt_lengths=5).logits[0, 4:7], np.float64)
    chosen = logits[np.arange(3), tokens] - np.log(np.exp(logits).sum(-1))
    assert found.log_likelihood == pytest.approx(chosen.sum(), abs=1e-4)


@MODELS
def test_rounded_weights_run_as_the_floats_that_they_stand_for(name: str) -> None:
    twin = make_twin(finished_model(name))
    assert twin.weights == "int8"
    kernels = {path.split(".", 2)[2] for path in parameters(twin) if ".recurrent." in path}
    assert KERNELS[name] <= kernels
    same = from_parameters(twin.config, parameters(twin).items(), dtype=twin.dtype)
    floats, rounded, before = (TIDE(model)(TEXTS[2]).logits for model in (same, twin, finished_model(name)))
    np.testing.assert_allclose(rounded, floats, rtol=0, atol=1e-4)
    assert np.abs(floats - before).max() > 1e-2, "rounding changes something"

"""What calibration trains for the answer at an exit: tuned heads, and the second look."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_model

from tide_jax.calibration.calibrate import auc
from tide_jax.calibration.confidence_training import final_scores, train_confidence
from tide_jax.calibration.exit_heads import fit_heads
from tide_jax.calibration.reservoir import Reservoir
from tide_jax.calibration.tuned_heads import frequent_tokens, tune_heads
from tide_jax.config import CalibrationConfig
from tide_jax.exits.confidence import exit_scores, features
from tide_jax.exits.router import SCREEN_LEVELS, Candidates, ExitHead, Router, Routers
from tide_jax.testing import random_routers, tiny_config

MODEL = tiny_model(tiny_config())
SIZE = MODEL.config.hidden_size


def normed(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))


def answers(states: np.ndarray) -> np.ndarray:
    return np.asarray(MODEL.logits(MODEL.final_norm(jnp.asarray(states, jnp.float32)[None]))[0])


def sample(tokens: int, seed: int, noise: float = 1.0) -> Reservoir:
    """Last states, and an exit point's: the same ones seen through a fixed matrix, with noise."""
    mix = np.random.default_rng(0).normal(size=(SIZE, SIZE)) / np.sqrt(SIZE)
    rng = np.random.default_rng(seed)
    last = normed(rng.normal(size=(tokens, SIZE)))
    states = normed(last @ mix + noise * rng.normal(size=last.shape))
    reservoir = Reservoir(tokens, 1, SIZE, seed=0)
    targets = answers(last).argmax(axis=1).astype(np.int32)
    reservoir.add(states[None].astype(np.float16), last.astype(np.float16), targets)
    return reservoir


def divergence(head: ExitHead, held_out: Reservoir) -> float:
    """Mean KL divergence over the whole vocabulary."""
    out = answers(np.asarray(head(jnp.asarray(held_out.states[0], jnp.float32), eps=MODEL.config.norm_eps)))
    full = answers(held_out.last)
    full, out = (np.asarray(jax.nn.log_softmax(jnp.asarray(a), axis=-1)) for a in (full, out))
    return float(np.mean(np.sum(np.exp(full) * (full - out), axis=1)))


def test_tuning_brings_predictions_closer_to_the_full_models() -> None:
    fit, validation, fresh = sample(2000, 1), sample(600, 2), sample(600, 3)
    config = CalibrationConfig(exit_head_steps=60, seed=5)
    closed = fit_heads(fit, validation, None)
    tuned = tune_heads(MODEL, closed, fit, validation, config)
    assert divergence(tuned[0], fresh) < 0.98 * divergence(closed[0], fresh)
    again = tune_heads(MODEL, closed, fit, validation, config)
    jax.tree.map(np.testing.assert_array_equal, tuned, again)
    for leaf in jax.tree.leaves(tuned):
        np.testing.assert_array_equal(leaf, np.asarray(leaf, np.float16).astype(np.float32))


def test_a_head_that_tuning_does_not_better_stays() -> None:
    """Tuned on few tokens that are all noise, a head gets worse on others: one fitted to those others stays."""
    fit, validation = sample(64, 1, noise=30.0), sample(600, 2)
    heads = fit_heads(validation, validation, None)
    config = CalibrationConfig(exit_head_steps=40)
    kept = tune_heads(MODEL, heads, fit, validation, config)
    jax.tree.map(np.testing.assert_array_equal, kept, heads)
    changed = tune_heads(MODEL, heads, fit, fit, config)
    assert divergence(changed[0], validation) > divergence(heads[0], validation), "tuning would have made it worse"


def test_low_rank_heads_are_tuned_too() -> None:
    fit, validation = sample(600, 1), sample(600, 2)
    (head,) = tune_heads(MODEL, fit_heads(fit, validation, 8), fit, validation, CalibrationConfig(exit_head_steps=5))
    assert [factor.shape for factor in head.factors] == [(SIZE, 8), (8, SIZE)]


def test_frequent_tokens_come_first_and_two_at_least() -> None:
    targets = np.asarray([7, 7, 7, 3, 3, 9], np.int32)
    assert frequent_tokens(targets, 12, 2).tolist() == [7, 3]
    assert frequent_tokens(targets, 12, 100).tolist() == [7, 3, 9]
    assert len(frequent_tokens(targets[:3], 12, 100)) == 2


def test_features_are_those_of_the_candidates_logits() -> None:
    states = np.random.default_rng(0).normal(size=(1, 5, SIZE)).astype(np.float32)
    ids = np.asarray([4, 90, 17, 33])
    first = np.asarray([[0.1, 0.5, 0.9, 1.0, 0.0]], np.float32)
    found = np.asarray(features(MODEL, MODEL.head_rows(jnp.asarray(ids)), jnp.asarray(states), jnp.asarray(first)))[0]
    logits = np.sort(np.asarray(MODEL.logits(jnp.asarray(states)))[0][:, ids], axis=1)
    total = np.log(np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(found[:3, 0], np.log(first[0, :3] / (1 - first[0, :3])), atol=1e-5)
    assert np.isfinite(found).all(), "a certain router has finite odds"
    expected = np.stack([logits[:, -1] - total, logits[:, -1] - logits[:, -2], total], axis=1)
    np.testing.assert_allclose(found[:, 1:], expected, atol=1e-4)


def blind_routers(head: ExitHead | None = None) -> Routers:
    """Routers that know nothing: every token scores one half."""
    zeros = jnp.zeros((SIZE, 1)), jnp.zeros((1,)), jnp.zeros((1,)), jnp.float32(0.0)
    ids = jnp.arange(259, dtype=jnp.int32)
    return Routers(
        (Router(*zeros),), None if head is None else (head,), (1,), candidates=Candidates(ids, MODEL.head_rows(ids))
    )


def test_the_second_look_knows_what_the_router_does_not() -> None:
    (head,) = fit_heads(sample(3000, 4, noise=0.5), sample(600, 3, noise=0.5), None)
    fit, fresh = sample(3000, 1, noise=0.5), sample(2000, 2, noise=0.5)  # the head has seen neither
    routers = blind_routers(head)

    def right(each: Reservoir) -> np.ndarray:
        out = head(jnp.asarray(each.states[0], jnp.float32), eps=MODEL.config.norm_eps)
        return (answers(np.asarray(out)).argmax(axis=1) == each.targets)[None]

    looks = train_confidence(MODEL, routers, fit.states, right(fit), seed=0)
    routers = dataclasses.replace(routers, confidence=looks)
    scores = final_scores(MODEL, routers, fresh.states)
    found = auc(scores[0], right(fresh)[0])
    assert found is not None
    assert found > 0.6, "the router alone has .5"
    likely = scores[0] > np.quantile(scores[0], 0.75)  # 500 tokens: a standard error of 0.02
    assert right(fresh)[0, likely].mean() == pytest.approx(scores[0, likely].mean(), abs=0.07), "a probability"


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_labels_all_alike_are_learned(rate: float) -> None:
    fit = sample(200, 1)
    labels = np.full((1, 200), bool(rate))
    looks = train_confidence(MODEL, blind_routers(), fit.states, labels, seed=0)
    scores = final_scores(MODEL, dataclasses.replace(blind_routers(), confidence=looks), fit.states)
    assert (scores > 0.9).all() if rate else (scores < 0.1).all()


def test_the_screen_hides_what_lies_below_it() -> None:
    routers = random_routers(tiny_config(), interval=2, model=MODEL)
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(200, SIZE)), jnp.float32)
    first = np.asarray(routers.scores(0, rows, eps=MODEL.config.norm_eps))
    scores = np.asarray(exit_scores(MODEL, routers, 0, rows).scores[0])
    assert routers.confidence is not None
    screened = first <= float(routers.confidence[0].screens[0])
    assert 0 < screened.sum() < 200
    assert (scores[screened] == 0).all()
    assert (scores[~screened] > 0).all()


def test_a_screen_lets_pass_what_its_threshold_may() -> None:
    fit, fresh = sample(3000, 1), sample(2000, 2)
    routers = random_routers(tiny_config(), interval=2, model=MODEL)
    routers = dataclasses.replace(routers, routers=routers.routers[:1], exit_points=routers.exit_points[:1])

    def first(each: Reservoir) -> np.ndarray:
        states = jnp.asarray(each.states[0], jnp.float32)
        return np.asarray(routers.scores(0, states, eps=MODEL.config.norm_eps))

    likely = np.quantile(first(fit), 0.6)
    draws = np.random.default_rng(0).random(len(fit))
    labels = (draws < jax.nn.sigmoid(12 * (first(fit) - likely)))[None]
    looks = train_confidence(MODEL, routers, fit.states, labels, seed=0)
    scores = final_scores(MODEL, dataclasses.replace(routers, confidence=looks), fresh.states)[0]
    passed = []
    for level in SCREEN_LEVELS:
        screen = float(looks[0].screen(jnp.float32(level)))
        assert screen <= level + 1e-6, "what the router itself takes for so likely is looked at"
        above = scores > level
        assert (above & (first(fresh) <= screen)).sum() <= max(0.05 * above.sum(), 3)
        passed.append((first(fresh) > screen).mean())
    assert passed == sorted(passed, reverse=True)
    assert passed[-1] < 0.6 * passed[0]
    assert float(looks[0].screen(jnp.float32(1.0))) == 1.0, "nothing ends above 1"
    assert float(looks[0].screen(jnp.float32(0.1))) == float(looks[0].screens[0])

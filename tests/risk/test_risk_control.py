"""The statistics of guarantees: p-values against exact sums, and how often a promise fails over many random splits."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tide_jax import ExitConfig, TideError
from tide_jax.config import RiskGuarantee
from tide_jax.risk.statistics import GuaranteeError, fixed_sequence_test, hb_p_value, smallest_sample

# ------------------------------------------------------------------------------------------------------------ p-values


def exact_bentkus(wrong: int, count: int, risk: Fraction) -> float:
    terms = (math.comb(count, k) * risk**k * (1 - risk) ** (count - k) for k in range(wrong + 1))
    return math.e * float(sum(terms))


@pytest.mark.parametrize("count", [1, 7, 60, 400])
@pytest.mark.parametrize("risk", [Fraction(1, 50), Fraction(1, 3), Fraction(9, 10)])
def test_p_values_are_the_smaller_of_two_bounds(count: int, risk: Fraction) -> None:
    a = float(risk)
    for wrong in sorted({0, 1, count // 10, count // 3, count}):
        low = min(wrong / count, a)
        entropy = (low and low * math.log(low / a)) + (1 - low) * math.log((1 - low) / (1 - a))
        expected = min(1.0, math.exp(-count * entropy), exact_bentkus(wrong, count, risk))
        assert hb_p_value(wrong / count, count, a) == pytest.approx(expected, rel=1e-9)


def test_each_bound_wins_somewhere() -> None:
    hoeffding = math.exp(-100 * math.log(1 / 0.9))  # no loss at all: without Bentkus's factor e
    assert hb_p_value(0.0, 100, 0.1) == pytest.approx(hoeffding)
    assert hb_p_value(0.05, 1000, 0.1) == pytest.approx(exact_bentkus(50, 1000, Fraction(1, 10)))
    # A mean between two counts is taken as the greater.
    assert hb_p_value(0.0497, 1000, 0.1) == pytest.approx(exact_bentkus(50, 1000, Fraction(1, 10)))


def test_p_values_grow_with_the_loss_and_reach_one() -> None:
    found = [hb_p_value(loss, 500, 0.1) for loss in np.linspace(0, 1, 101)]
    assert found == sorted(found)
    assert found[10:] == [1.0] * 91, "nothing speaks against a risk that the sample itself exceeds"


def test_many_examples_do_not_underflow() -> None:
    assert 0.0 < hb_p_value(0.0195, 200_000, 0.02) < 0.2
    assert hb_p_value(0.0, 10_000_000, 0.02) == 0.0


@pytest.mark.parametrize(
    "values, expected",
    [
        ((1.2, 10, 0.1), "mean_loss=1.2"),
        ((0.1, 0, 0.1), "count=0"),
        ((0.1, 10, 0.0), "risk=0.0 must lie between 0 and 1"),
        ((0.1, 10, 1.0), "risk=1.0"),
    ],
)
def test_p_values_of_nonsense(values: tuple[Any, Any, Any], expected: str) -> None:
    with pytest.raises(TideError, match=expected):
        hb_p_value(*values)


@pytest.mark.parametrize("risk, delta", [(0.02, 0.05), (0.01, 0.1), (0.5, 0.25), (0.9, 0.5), (0.001, 0.001)])
def test_the_smallest_sample_is_just_enough(risk: float, delta: float) -> None:
    count = smallest_sample(risk, delta)
    assert hb_p_value(0.0, count, risk) <= delta
    assert count == 1 or hb_p_value(0.0, count - 1, risk) > delta


# ---------------------------------------------------------------------------------------------------------- the testing


def test_testing_stops_at_the_first_failure_and_measures_no_further() -> None:
    asked: list[float] = []

    def p_values() -> Iterator[float]:
        for p_value in (0.01, 0.05, 0.0501, 0.0):
            asked.append(p_value)
            yield p_value

    assert fixed_sequence_test(p_values(), 0.05) == 2
    assert asked == [0.01, 0.05, 0.0501]
    assert fixed_sequence_test([0.2], 0.05) == 0
    assert fixed_sequence_test([0.0, 0.0], 0.05) == 2
    with pytest.raises(TideError, match="delta=0"):
        fixed_sequence_test([0.0], 0)


RISK, DELTA, SPLITS, COUNT = 0.1, 0.1, 1000, 200


def population(risks: np.ndarray, *, graded: bool = False) -> np.ndarray:
    """Losses [settings, texts] with given risks. All-or-nothing losses are the hardest; graded ones come in eighths."""
    rng = np.random.default_rng(5)
    texts = np.repeat(rng.random((1, 20_000)), len(risks), axis=0)  # a text is hard at every setting,
    texts = np.where(rng.random(texts.shape) < 0.5, texts, rng.random(texts.shape))  # or now and then at one alone
    if not graded:
        return (np.argsort(np.argsort(texts, axis=1), axis=1) < (risks * 20_000).round()[:, None]).astype(float)
    return np.random.default_rng(6).binomial(8, np.broadcast_to(risks[:, None], texts.shape)) / 8


def violations(losses: np.ndarray, choose: Callable[[np.ndarray], int]) -> float:
    """Share of random splits at which the setting chosen from a sample has too great a risk in the population."""
    rng, risks = np.random.default_rng(0), losses.mean(axis=1)
    wrong = 0
    for _ in range(SPLITS):
        sample = losses[:, rng.choice(losses.shape[1], COUNT, replace=False)]
        chosen = choose(sample.mean(axis=1))
        wrong += chosen >= 0 and risks[chosen] > RISK
    return wrong / SPLITS


def p_values(means: np.ndarray) -> Iterator[float]:
    return (hb_p_value(float(mean), COUNT, RISK) for mean in means)


def learn_then_test(means: np.ndarray) -> int:
    return fixed_sequence_test(p_values(means), DELTA) - 1


def boldest_below_the_risk(means: np.ndarray) -> int:
    return int(np.flatnonzero(means <= RISK).max(initial=-1))


def boldest_that_passes_alone(means: np.ndarray) -> int:
    return int(np.flatnonzero([p <= DELTA for p in p_values(means)]).max(initial=-1))


JUST_TOO_BOLD = np.concatenate([[0.02, 0.05, 0.08], np.full(25, 0.1005)])
SLACK = 3 * math.sqrt(DELTA * (1 - DELTA) / SPLITS)
POPULATIONS = {
    "rising": np.linspace(0.01, 0.4, 25),
    "just too bold": JUST_TOO_BOLD,
    "too bold from the start": np.full(10, 0.1005),
    "up and down": np.asarray([0.03, 0.1005, 0.02, 0.3, 0.05, 0.1005, 0.01]),
}


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("name", POPULATIONS)
def test_promises_fail_at_most_as_often_as_stated(name: str, graded: bool) -> None:
    assert violations(population(POPULATIONS[name], graded=graded), learn_then_test) <= DELTA + SLACK


def test_the_promise_is_not_kept_by_promising_nothing() -> None:
    losses, chosen = population(POPULATIONS["rising"]), list[int]()
    violations(losses, lambda means: chosen.append(learn_then_test(means)) or chosen[-1])
    risks = losses.mean(axis=1)[chosen]
    assert min(chosen) >= 0
    assert 0.05 < risks.mean() < RISK


def test_choosing_by_the_sample_itself_breaks_the_promise() -> None:
    """So these populations can tell a right procedure from a wrong one."""
    losses = population(JUST_TOO_BOLD)
    assert violations(losses, boldest_below_the_risk) > 0.6
    assert violations(losses, boldest_that_passes_alone) > 2 * DELTA, "many tests, each right alone, uncorrected"
    assert violations(losses, learn_then_test) > DELTA / 20, "and the right one is not idle here"


# ---------------------------------------------------------------------------------------------------------- its record

GUARANTEE = RiskGuarantee(
    risk=0.02,
    delta=0.05,
    loss="disagreement",
    sequences=300,
    tokens=9000,
    p_value=0.03,
    observed=0.011,
    depth=0.9,
    max_length=256,
    exit_threshold=(0.9, 0.8),
    min_layers=4,
)
CONFIG = ExitConfig(exit_threshold=(0.9, 0.8), min_layers=4, guarantee=GUARANTEE)


def test_a_guarantee_survives_json_and_hashing() -> None:
    again = ExitConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict())))
    assert again == CONFIG
    assert again.guarantee == GUARANTEE
    assert hash(again) == hash(CONFIG)
    assert ExitConfig.from_dict(json.loads(json.dumps(ExitConfig().to_dict()))) == ExitConfig()


@pytest.mark.parametrize(
    "changes",
    [
        {"exit_threshold": 0.9},
        {"exit_threshold": (0.9, 0.81)},
        {"min_layers": 5},
        {"prefill_exits": True},
        {"kv_strategy": "recompute"},
    ],
)
def test_other_settings_lose_the_guarantee(changes: dict[str, Any]) -> None:
    assert dataclasses.replace(CONFIG, **changes).guarantee is None
    kept = dataclasses.replace(GUARANTEE, **changes)
    assert dataclasses.replace(CONFIG, **changes, guarantee=kept).guarantee == kept
    assert dataclasses.replace(CONFIG, min_layers=4).guarantee == GUARANTEE


def test_another_tilt_loses_the_guarantee() -> None:
    found = dataclasses.replace(GUARANTEE, exit_threshold=0.9, threshold_tilt=1.0)
    config = ExitConfig(exit_threshold=0.9, threshold_tilt=1.0, min_layers=4, guarantee=found)
    assert config.guarantee == found
    assert dataclasses.replace(config, threshold_tilt=0.5).guarantee is None


def test_settings_written_without_a_tilt_have_none() -> None:
    values = CONFIG.to_dict()
    del values["threshold_tilt"], values["guarantee"]["threshold_tilt"]
    assert ExitConfig.from_dict(values) == CONFIG


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"surprise": 1}, "exit settings can't be read"),
        ({"guarantee": {"risk": 0.1}}, "guarantee can't be read"),
        ({"guarantee": "trust me"}, "guarantee"),
    ],
)
def test_settings_of_another_version_are_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(TideError, match=expected) as caught:
        ExitConfig.from_dict(values)
    assert "\n" not in str(caught.value)


def test_a_guarantee_must_be_one() -> None:
    with pytest.raises(TideError, match=r"guarantee=.* must be a RiskGuarantee"):
        ExitConfig(guarantee=0.02)  # type: ignore


@pytest.mark.parametrize("risk", [1e-9, 1e-17, 1e-320])
def test_a_risk_that_no_sample_can_show_is_refused_by_name(risk: float) -> None:
    with pytest.raises(GuaranteeError, match=r"risk=.*more than a billion texts"):
        smallest_sample(risk, 0.05)

"""Drift: statistics that stay valid while being watched, and audits recomputed by hand."""

from __future__ import annotations

import functools
import json
import logging
import math
from typing import Any

import jax
import numpy as np
import pytest
from brute_force import BruteForce
from tiny_models import random_prompts, tiny_model, with_parameters

from tide_jax import TIDE, DriftMonitor, ExitConfig, TideError
from tide_jax.config import RiskGuarantee
from tide_jax.drift.confidence_sequence import ConfidenceSequence, RiskTest
from tide_jax.generation.stats import DriftReport
from tide_jax.testing import random_routers, tiny_config

# ---------------------------------------------------------------------------------------------------------- statistics

KINDS = ("shares", "whole texts", "large")


def losses(kind: str, shape: tuple[int, ...], *, mean: float | None = None, seed: int = 0) -> tuple[np.ndarray, float]:
    """Random losses of sequences and their mean: of 50 tokens with a rate of their own each, or all or nothing."""
    rng = np.random.default_rng(seed)
    mean = mean or {"shares": 0.03, "whole texts": 0.03, "large": 0.4}[kind]
    if kind == "whole texts":
        return (rng.random(shape) < mean).astype(float), mean
    return rng.binomial(50, rng.beta(20 * mean, 20 * (1 - mean), shape)) / 50, mean


def watched(values: np.ndarray, delta: float) -> list[tuple[float, float]]:
    """The interval after each value."""
    sequence, out = ConfidenceSequence(delta), []
    for value in values:
        sequence.update(float(value))
        out.append(sequence.interval())
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_watched_interval_seldom_ever_misses_the_mean(kind: str) -> None:
    runs, delta = 150, 0.1
    values, mean = losses(kind, (runs, 150))
    missed = sum(any(not low <= mean <= high for low, high in watched(row, delta)) for row in values)
    assert missed <= runs * delta


def test_an_interval_for_a_fixed_sample_size_does_not_stand_watching() -> None:
    """The very data above, one interval of its confidence after each value: what the betting is for."""
    values, mean = losses("shares", (150, 150))
    counts = np.arange(1, 151)
    means = np.cumsum(values, axis=1) / counts
    errors = np.sqrt((np.cumsum(values**2, axis=1) / counts - means**2) / counts)
    outside = (np.abs(means - mean) > 1.645 * errors)[:, 20:]
    assert outside[:, -1].mean() < 0.2, "one look is right"
    assert outside.any(axis=1).mean() > 0.25, "many looks are not"


def test_the_interval_is_the_set_of_means_that_capital_has_not_refuted() -> None:
    values, _ = losses("shares", (60,), seed=4)

    def capital(candidate: float, sign: int) -> float:
        total, squares, capital = 0.05, 0.01, 1.0
        for t, value in enumerate(values, 1):
            bet = math.sqrt(2 * math.log(2 / 0.05) / (squares / t * t * math.log(t + 1)))
            bet = min(bet, 0.9 / (candidate if sign > 0 else 1 - candidate))
            capital *= 1 + sign * bet * (value - candidate)
            total += value
            squares += (value - total / (t + 1)) ** 2
        return capital

    low, high = watched(values, 0.05)[-1]
    step = 1e-3
    assert 0 < low < high < 1
    assert capital(low, 1) >= 40 > capital(low + step, 1)
    assert capital(high, -1) >= 40 > capital(high - step, -1)


def test_the_interval_is_tight_at_small_risks() -> None:
    values, mean = losses("shares", (20, 200), mean=0.02, seed=1)
    ends = np.asarray([watched(row, 0.05)[-1] for row in values]).mean(axis=0)
    assert mean - 0.01 < ends[0] < mean < ends[1] < mean + 0.025


def run_test(values: np.ndarray, risk: float, delta: float = 0.05) -> int | None:
    """Number of values after which the risk counted as exceeded."""
    test = RiskTest(risk, delta)
    for count, value in enumerate(values, 1):
        test.update(float(value))
        if test.exceeded:
            return count
    return None


@pytest.mark.parametrize("kind", ["shares", "whole texts"])
def test_a_kept_risk_is_seldom_ever_called_exceeded(kind: str) -> None:
    values, mean = losses(kind, (150, 300), seed=2)
    assert sum(run_test(row, mean, delta=0.1) is not None for row in values) <= 15


def test_a_risk_below_the_promise_for_a_while_and_just_kept_later_is_not_exceeded() -> None:
    calm, busy = (losses("shares", (150, 150), mean=mean, seed=3)[0] for mean in (0.01, 0.03))
    rows = np.concatenate([calm, busy], axis=1)
    assert sum(run_test(row, 0.03, delta=0.1) is not None for row in rows) <= 15


def test_a_late_rise_is_found_soon() -> None:
    calm, risen = (losses("shares", (10, 400), mean=mean, seed=5)[0] for mean in (0.01, 0.08))
    for before, after in zip(calm, risen, strict=True):
        assert run_test(before, 0.02) is None
        assert 400 < (run_test(np.concatenate([before, after]), 0.02) or 0) < 460


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "much"])
def test_values_are_shares(value: Any) -> None:
    for statistic in (ConfidenceSequence(0.05), RiskTest(0.02, 0.05)):
        with pytest.raises(TideError, match="value="):
            statistic.update(value)


# -------------------------------------------------------------------------------------------------------------- audits

PROMPTS = random_prompts((9, 14, 1, 11), seed=2)
NEW = 8
SAMPLED = {"temperature": 1.0, "key": jax.random.key(5)}


def engine(**changes: Any) -> TIDE:
    """The engine of these tests with other exit settings."""
    return base_engine().with_config(**changes)


@functools.cache
def base_engine() -> TIDE:
    """A small model that writes lower-case letters, and routers that let a good part of them leave early."""
    config = tiny_config(num_layers=3, tie_embeddings=False, head_bias=True, pad_token_id=2)
    bias = np.full(config.vocab_size, -1e4, np.float32)
    bias[[ord(letter) + 3 for letter in "abcdefghijklmnopqrstuvwxyz "]] = 0.0
    model = with_parameters(tiny_model(config, seed=3), {"head.bias": bias})
    return TIDE(model, random_routers(config, interval=1), ExitConfig(exit_threshold=0.5, min_layers=0))


def disagreements(row: list[int], prompt: int, start: int) -> np.ndarray:
    """Tokens from `start` on whose argmax differs between two slow walks, with exits and without."""
    model, routers = engine().model, engine().routers
    exits, full = BruteForce(model, routers, 0.5).walk(row, prompt), BruteForce(model).walk(row, prompt)
    return (exits.logits.argmax(axis=1) != full.logits.argmax(axis=1))[start:]


def check(report: DriftReport | None, rows: list[np.ndarray]) -> None:
    """A report of audits of everything, against comparisons of each row."""
    assert report is not None
    assert report.agreement is not None
    rows = [row for row in rows if row.size]
    assert (report.sequences, report.audited, report.tokens) == (len(rows), len(rows), sum(row.size for row in rows))
    assert report.agreement == pytest.approx(1 - np.mean([row.mean() for row in rows]))
    assert 0 <= report.lower < report.agreement < report.upper <= 1
    assert 0 < sum(row.sum() for row in rows) < report.tokens, "something to find"


ARGUMENTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": SAMPLED,
    "repetition penalty": {"repetition_penalty": 1e6},
    "sampled with a penalty": SAMPLED | {"repetition_penalty": 1.5},
}


@pytest.mark.parametrize("prompt_exits", [False, True])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_generations_are_audited(name: str, prompt_exits: bool) -> None:
    arguments = {"max_new_tokens": NEW, "eos_token_id": [ord(c) + 3 for c in "aeq"], **ARGUMENTS[name]}
    watching = engine(prefill_exits=prompt_exits)
    plain = watching.generate(PROMPTS, **arguments)
    out = watching.generate(PROMPTS, monitor=DriftMonitor(1.0), **arguments)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert plain.stats.drift is None
    assert len(set(out.lengths)) > 1, "rows of unequal lengths"
    rows = []
    for prompt, tokens, length in zip(PROMPTS, out.tokens.tolist(), out.lengths, strict=True):
        row, many = [*prompt, *tokens[: length - 1]], len(prompt)
        rows.append(disagreements(row, 0, max(1, many - 1)) if prompt_exits else disagreements(row, many, many))
    check(out.stats.drift, rows)


@pytest.mark.parametrize("side", ["left", "right"])
def test_scoring_calls_are_audited(side: str) -> None:
    rows, prompts = random_prompts((9, 14, 1, 11, 6), seed=9), [0, 5, 0, 1, 6]
    ids, mask = np.full((5, 16), 200), np.zeros((5, 16), int)
    for b, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(16 - len(row), 16)
        ids[b, span], mask[b, span] = row, 1
    expected = [disagreements(row, n, max(1, n)) for row, n in zip(rows, prompts, strict=True)]
    assert sum(row.size == 0 for row in expected) == 2, "a row of one token, and a row that is all prompt"
    scored = engine()(ids, attention_mask=mask, prompt_lengths=prompts, monitor=DriftMonitor(1.0))
    check(scored.stats.drift, expected)
    ragged = engine()(rows, prompt_lengths=prompts, monitor=DriftMonitor(1.0))
    check(ragged.stats.drift, expected)


def test_a_streamed_generation_is_audited_after_its_end() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.count = 0

        def put(self, value: Any) -> None:
            self.count += 1

        def end(self) -> None:
            assert monitor.report().audited == 0

    monitor, whole = DriftMonitor(1.0), DriftMonitor(1.0)
    prompt = PROMPTS[:1]
    engine().generate(prompt, max_new_tokens=NEW, streamer=Streamer(), monitor=monitor)
    engine().generate(prompt, max_new_tokens=NEW, monitor=whole)
    assert same(monitor.report(), whole.report())
    assert monitor.report().audited == 1


def same(*reports: DriftReport) -> bool:
    values = [vars(report) | {"wall_time": 0.0} for report in reports]
    return all(value == values[0] for value in values)


def test_audits_follow_from_the_seed_and_not_from_batching() -> None:
    rows = random_prompts((6,) * 24, seed=10)

    def reported(seed: int, size: int) -> DriftReport:
        monitor = DriftMonitor(0.5, seed=seed)
        for start in range(0, len(rows), size):
            engine()(rows[start : start + size], monitor=monitor)
        return monitor.report()

    first = reported(1, 4)
    assert same(first, reported(1, 4), reported(1, 2))
    picked = [row for row, drawn in zip(rows, np.random.default_rng(1).random(24), strict=True) if drawn < 0.5]
    assert 5 < len(picked) < 19
    assert (first.sequences, first.audited) == (24, len(picked))
    expected = np.mean([disagreements(row, 0, 1).mean() for row in picked])
    assert first.agreement == pytest.approx(1 - expected)
    assert not same(first, reported(2, 4))


def test_rate_zero_audits_nothing() -> None:
    monitor = DriftMonitor(0.0, risk=0.1)
    engine()(PROMPTS, monitor=monitor)
    report = monitor.report()
    assert report == DriftReport(3, 0, 0, None, 0.0, 1.0, 0.95, 0.1, "unknown", 0.0)
    assert "not known yet, 0 of 3" in report.summary()


def test_where_nothing_leaves_early_there_is_nothing_to_audit() -> None:
    monitor = DriftMonitor(1.0)
    for out in (
        engine()(PROMPTS, mode="full", monitor=monitor),
        engine().generate(PROMPTS, max_new_tokens=2, mode="full", monitor=monitor),
        TIDE(engine().model)(PROMPTS, monitor=monitor),
        engine()(PROMPTS, prompt_lengths=14, monitor=monitor),  # all prompt
        engine().generate(PROMPTS, max_new_tokens=1, monitor=monitor),  # the first new token is the prompt's
    ):
        assert out.stats.drift is not None
        assert (out.stats.drift.sequences, out.stats.drift.audited) == (0, 0)


def test_routers_that_never_exit_agree() -> None:
    report = engine(exit_threshold=1.0)(random_prompts((12,) * 4), monitor=DriftMonitor(1.0)).stats.drift
    assert report is not None
    assert (report.audited, report.tokens, report.agreement) == (4, 44, 1.0)


# --------------------------------------------------------------------------------------------------------------- drift


@functools.cache
def kinds() -> tuple[list[list[int]], list[list[int]], float]:
    """Texts on which exits are mostly right, texts on which they are mostly wrong, and a risk between."""
    rows = random_prompts((12,) * 240, seed=11)
    exits, full = (np.asarray(engine()(rows, mode=mode).logits).argmax(axis=-1) for mode in ("exit", "full"))
    wrong = (exits != full)[:, 1:].mean(axis=1)
    order = np.argsort(wrong)
    easy, hard = np.sort(order[:120]), np.sort(order[120:])
    risk = float(wrong[easy].mean() + wrong[hard].mean()) / 2
    return [rows[i] for i in easy], [rows[i] for i in hard], risk


def run(monitor: DriftMonitor, rows: list[list[int]]) -> DriftReport:
    for start in range(0, len(rows), 8):
        engine()(rows[start : start + 8], monitor=monitor)
    return monitor.report()


def test_drift_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    easy, hard, risk = kinds()
    monitor = DriftMonitor(1.0, risk=risk)
    with caplog.at_level(logging.INFO, logger="tide_jax"):
        report = run(monitor, easy[:8])
        assert report.status == "unknown", "so few say nothing"
        assert 1 - report.lower > risk
        report = run(monitor, easy)
        assert (report.status, caplog.records) == ("ok", [])
        assert 1 - report.lower < risk
        report = run(monitor, hard)
        assert report.status == "exceeded"
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "more often than promised" in caplog.text
        assert "exceeded" in caplog.text
        run(monitor, hard)
        assert run(monitor, easy).status == "exceeded", "for good"
        assert len(caplog.records) == 1
        monitor.reset()
        assert monitor.report().audited == 0
        assert run(monitor, easy).status == "ok"
        assert run(monitor, hard[:80]).status == "exceeded"
        assert len(caplog.records) == 2


def test_texts_on_which_exits_are_wrong_exceed_at_once(caplog: pytest.LogCaptureFixture) -> None:
    _, hard, risk = kinds()
    report = run(DriftMonitor(1.0, risk=risk), hard)
    assert report.status == "exceeded"
    assert 1 - report.upper > risk
    assert len(caplog.records) == 1


def test_without_a_promise_nothing_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    report = run(DriftMonitor(1.0), kinds()[1])
    assert (report.risk, report.status, caplog.records) == (None, "unknown", [])
    assert "nothing promised" in report.summary()


def promised(**changes: Any) -> TIDE:
    fields = {"risk": 0.3, "delta": 0.1, "loss": "disagreement", "sequences": 9, "tokens": 9, "p_value": 0.1}
    fields |= {"observed": 0.1, "depth": 0.5, "max_length": 9, "exit_threshold": 0.5, "min_layers": 0}
    return engine(guarantee=RiskGuarantee(**(fields | changes)))


def test_the_promise_is_the_engines_own() -> None:
    drift = promised()(PROMPTS, monitor=DriftMonitor(1.0)).stats.drift
    assert drift is not None
    assert drift.risk == 0.3
    drift = promised()(PROMPTS, monitor=DriftMonitor(1.0, risk=0.25)).stats.drift
    assert drift is not None
    assert drift.risk == 0.25, "unless another is asked for"


def test_a_promise_about_another_loss_can_not_be_watched() -> None:
    with pytest.raises(TideError, match=r"guarantee bounds nll.*pass DriftMonitor\(risk="):
        promised(loss="nll")(PROMPTS, monitor=DriftMonitor())
    assert promised(loss="nll")(PROMPTS, monitor=DriftMonitor(risk=0.1)).stats.drift is not None


def test_a_monitor_watches_one_setting() -> None:
    monitor = DriftMonitor(1.0)
    engine()(PROMPTS, monitor=monitor)
    with pytest.raises(TideError, match="other exit settings"):
        engine(exit_threshold=0.6).generate(PROMPTS, monitor=monitor)
    assert monitor.report().sequences == 3
    monitor.reset()
    engine(exit_threshold=0.6)(PROMPTS, monitor=monitor)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a rate above 1": ({"rate": 1.5}, "rate=1.5"),
    "a rate below 0": ({"rate": -0.1}, "rate=-0.1"),
    "no promise at all": ({"risk": 1.0}, "risk=1.0"),
    "a risk of none": ({"risk": 0.0}, "risk=0.0"),
    "certainty": ({"delta": 0}, "delta=0"),
    "a negative seed": ({"seed": -1}, "seed=-1"),
    "text": ({"rate": "all"}, "rate='all'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    arguments, message = BAD[name]
    with pytest.raises(TideError, match=message):
        DriftMonitor(**arguments)


def test_something_else_than_a_monitor() -> None:
    with pytest.raises(TideError, match=r"monitor is float, expected a tide_jax\.DriftMonitor"):
        engine()(PROMPTS, monitor=0.05)  # pyright: ignore[reportArgumentType]


def test_statistics_show_drift() -> None:
    stats = engine()(PROMPTS, monitor=DriftMonitor(1.0, risk=0.01, delta=0.1)).stats
    assert stats.drift is not None
    line = stats.summary().splitlines()[-1]
    for part in (f"{stats.drift.agreement:.2%}", "90 % interval", "3 of 3 sequences", "promised 99.00%"):
        assert part in line
    assert line.endswith(stats.drift.status)
    values = json.loads(json.dumps(stats.to_dict()))["drift"]
    assert values["agreement"] == stats.drift.agreement
    assert values["status"] == stats.drift.status

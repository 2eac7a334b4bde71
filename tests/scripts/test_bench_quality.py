"""What scripts/bench/quality.py measures, against brute-force numbers from whole logits on a tiny model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_models import random_prompts, tiny_model

from scripts.bench import quality_generation, quality_measures
from tide_jax import TIDE, ExitConfig
from tide_jax.exits.exits import Exits
from tide_jax.testing import random_routers, tiny_config

MODEL = tiny_model(tiny_config(num_layers=3))
ROUTERS = random_routers(MODEL.config, interval=1, affine=True)
TEXTS = random_prompts((17, 18, 3, 19, 21), seed=4)  # in batches of one width


ENGINE = TIDE(MODEL, ROUTERS, ExitConfig(min_layers=0))


def exits_at(threshold: float, min_layers: int = 0) -> Exits:
    return Exits.uniform(ROUTERS, threshold, min_layers)


@pytest.fixture(scope="module")
def reference() -> quality_measures.Reference:
    return quality_measures.Reference(MODEL, TEXTS, max_length=24, batch_size=3)


def log_softmax(logits: Any) -> np.ndarray:
    values = np.asarray(logits, np.float64)
    values = values - values.max(axis=-1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


def brute_force(threshold: float) -> dict[str, float]:
    """From whole logits."""
    columns: dict[str, list[float]] = {"agrees": [], "kl": [], "full": [], "early": [], "layers": []}
    scored = ENGINE.with_config(exit_threshold=threshold)(TEXTS)
    both = log_softmax(ENGINE(TEXTS, mode="full").logits), log_softmax(scored.logits)
    for b, text in enumerate(TEXTS):
        full, early = (logs[b] for logs in both)
        for t in range(1, len(text)):
            columns["agrees"].append(full[t].argmax() == early[t].argmax())
            columns["kl"].append(float((np.exp(full[t]) * (full[t] - early[t])).sum()))
            columns["layers"].append(int(scored.exit_layers[b, t]) + 1)
            if t + 1 < len(text):
                columns["full"].append(-full[t, text[t + 1]])
                columns["early"].append(-early[t, text[t + 1]])
    means = {name: float(np.mean(values)) for name, values in columns.items()}
    return means | {"tokens": len(columns["kl"]), "rate": float(np.mean(np.asarray(columns["layers"]) < 3))}


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_text_measures_equal_brute_force(reference: quality_measures.Reference, threshold: float) -> None:
    row = quality_measures.summarise(reference.compare(exits_at(threshold)), 3)
    wanted = brute_force(threshold)
    assert 0 < wanted["rate"] < 1, "some tokens leave, others stay"
    assert row["tokens"] == wanted["tokens"]
    assert row["agreement"] == pytest.approx(wanted["agrees"])
    assert row["layers"] == pytest.approx(wanted["layers"])
    assert row["depth"] == pytest.approx(wanted["layers"] / 3)
    assert row["exit_rate"] == pytest.approx(wanted["rate"])
    assert row["kl"] == pytest.approx(wanted["kl"], rel=1e-4)
    assert row["full_nll"] == pytest.approx(wanted["full"], rel=1e-5)
    assert row["exit_nll"] == pytest.approx(wanted["early"], rel=1e-5)
    assert row["perplexity_ratio"] == pytest.approx(np.exp(wanted["early"] - wanted["full"]), rel=1e-4)
    assert sum(row["share_by_last_layer"].values()) == pytest.approx(1.0)
    assert set(row["share_by_last_layer"]) <= {"0", "1", "2"}


def test_nothing_differs_where_nothing_exits(reference: quality_measures.Reference) -> None:
    row = quality_measures.summarise(reference.compare(exits_at(1.0)), 3)
    assert (row["depth"], row["agreement"], row["exit_rate"]) == (1.0, 1.0, 0.0)
    assert row["kl"] == pytest.approx(0.0, abs=1e-5)
    assert row["perplexity_ratio"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("min_layers", [0, 2])
def test_the_oracle_leaves_at_the_first_right_exit_point(
    reference: quality_measures.Reference, min_layers: int
) -> None:
    prefixes = [text[: t + 1] for text in TEXTS for t in range(1, len(text))]
    last = np.arange(len(prefixes)), np.asarray([len(prefix) - 1 for prefix in prefixes])
    full = log_softmax(np.asarray(ENGINE(prefixes, mode="full").logits)[last])
    right, kl = [], []
    for c, layer in enumerate(ROUTERS.exit_points):  # only the last token may leave: its past is at full depth
        thresholds = tuple(0.0 if i == c else 1.0 for i in range(len(ROUTERS.exit_points)))
        out = ENGINE.with_config(exit_threshold=thresholds)(prefixes, prompt_lengths=last[1])
        assert set(out.exit_layers[last].tolist()) == {layer}
        early = log_softmax(np.asarray(out.logits)[last])
        right.append(early.argmax(-1) == full.argmax(-1))
        kl.append((np.exp(full) * (full - early)).sum(-1))
    layers = [layer for layer in ROUTERS.exit_points if layer + 1 >= min_layers]
    by_layer = dict(zip(ROUTERS.exit_points, right, strict=True))
    run = [next((layer + 1 for layer in layers if by_layer[layer][n]), 3) for n in range(len(prefixes))]
    assert np.mean(run) < 3, "some token may leave"
    oracles = reference.oracles(ROUTERS, min_layers, 1.5)
    found, by_kl = oracles["oracle"], oracles["oracle_by_kl"]
    assert list(found["kl_by_layer"].values()) == pytest.approx(np.mean(kl, axis=1).tolist(), abs=1e-5)
    assert 0 < by_kl["kl"] <= np.log(1.5)
    assert by_kl["depth"] < 1
    assert found["layers"] == pytest.approx(np.mean(run))
    assert list(found["agreement_by_layer"].values()) == pytest.approx(np.mean(right, axis=1).tolist())


def test_generation_is_scored_on_its_own_prefixes() -> None:
    prompts, new = random_prompts((6, 6, 6), seed=7), 8
    row = quality_generation.Generator(MODEL, prompts, new).measure(exits_at(0.3))
    engine, agrees, layers, nll = ENGINE.with_config(exit_threshold=0.3), [], [], dict[str, float]()
    for mode in ("exit", "full"):
        rows = np.asarray(prompts)
        out = engine(rows, mode=mode, prompt_lengths=6)
        for _ in range(new):
            rows = np.concatenate([rows, np.asarray(out.logits)[:, -1:].argmax(-1)], axis=1)
            out = engine(rows, mode=mode, prompt_lengths=6)
        made = rows[:, 7:]  # the first new token comes from the prompt
        read = log_softmax(engine(rows, mode="full").logits)[:, 6:-1]
        nll[mode] = -np.take_along_axis(read, made[:, :, None], axis=-1).mean()
        agrees.append((read.argmax(-1) == made).mean())
        layers.append((out.exit_layers[:, 6:-1] + 1).mean())  # the newest token is not run
    assert 0 < agrees[0] < 1
    assert (row["agreement"], row["full_agreement"]) == (pytest.approx(agrees[0]), 1.0)
    assert (row["layers"], layers[1]) == (pytest.approx(layers[0]), 3)
    assert row["perplexity_ratio"] == pytest.approx(np.exp(nll["exit"] - nll["full"]), rel=1e-4)


def test_gain_is_time_saved_over_layers_skipped() -> None:
    scores = [quality_generation.Scores(np.asarray([True, False]), np.zeros(2))] * 3

    def run(layer: int, seconds: float) -> quality_generation.Run:
        return quality_generation.Run(np.zeros(3), np.asarray([layer, 9]), np.asarray([layer + 1, 10]), seconds)

    pairs = [(run(4, s), run(9, 2.0)) for s in (1.0, 1.7, 1.6)]
    row = quality_generation.summarise(pairs, scores, scores, 10)
    assert row["depth"] == pytest.approx(0.75)
    assert row["time_ratio"] == pytest.approx(0.8)
    assert row["gain_per_skipped"] == pytest.approx(0.8)
    full = quality_generation.summarise([(run(9, 2.0), run(9, 2.0))], scores[:1], scores[:1], 10)
    assert full["gain_per_skipped"] is None


def row_of(threshold: float, depth: float, agreement: float, ratio: float) -> dict[str, float]:
    return {"threshold": threshold, "depth": depth, "agreement": agreement, "perplexity_ratio": ratio}


FULL = row_of(1.0, 1.0, 1.0, 1.0)
KEPT = row_of(0.9, 0.9, 0.97, 1.005)


def test_the_oracle_by_kl_spends_its_limit_where_most_layers_are_saved() -> None:
    exit_points = np.asarray([1, 3])  # of 6 layers: leaving saves 4 or 2
    kl = np.asarray([[0.4, 0.1, 9.0], [0.3, 0.1, 0.15]])

    def spent(limit: float, min_layers: int = 0) -> tuple[float, float]:
        depth, found = quality_measures.least_depth(kl, exit_points, 6, min_layers, limit)
        return round(depth * 18), round(found * 3, 6)

    assert spent(0.0) == (18, 0.0)
    assert spent(0.1 / 3) == (14, 0.1), "the second token leaves early"
    assert spent(0.3 / 3) == (12, 0.25), "the third follows, later; together they save six layers of 18"
    assert spent(10.0) == (6, 9.5)
    assert spent(10.0, min_layers=4) == (12, 0.55)


def test_at_target_is_a_measured_row_that_keeps_both_limits() -> None:
    wrong_ratio, wrong_agreement = row_of(0.8, 0.8, 0.96, 1.02), row_of(0.7, 0.7, 0.94, 1.0)
    rows = [FULL, KEPT, wrong_ratio, wrong_agreement]
    assert quality_measures.at_target(rows, 0.95, 1.01) is KEPT
    assert quality_measures.at_target(rows, 0.95, 1.03) is wrong_ratio
    assert quality_measures.at_target(rows, 0.9, 1.01) is wrong_agreement
    assert quality_measures.at_target(rows[2:], 0.99, 1.01) is None
    assert quality_measures.at_target([row_of(0.5, 1.0, 1.0, 1.0), FULL], 0.95, 1.01) is FULL, "nothing leaves at 0.5"


def test_bisection_goes_on_below_the_best_row() -> None:
    failing = row_of(0.8, 0.8, 0.9, 1.1)
    assert quality_measures.next_threshold([FULL, KEPT, failing], 0.95, 1.01) == pytest.approx(0.85)
    assert quality_measures.next_threshold([FULL, KEPT], 0.95, 1.01) == pytest.approx(0.45)
    assert quality_measures.next_threshold([FULL, failing], 0.95, 1.01) == pytest.approx(0.9)
    assert quality_measures.next_threshold([row_of(0.0, 0.3, 1.0, 1.0)], 0.95, 1.01) is None


def test_errors_of_means_take_texts_as_independent() -> None:
    # One value a text, repeated: four observations, however many tokens.
    values, texts = np.repeat([0.0, 1.0, 1.0, 0.0], 50), np.repeat(np.arange(4), 50)
    assert quality_measures.standard_error(values, texts) == pytest.approx(np.sqrt(1 / 12))
    assert quality_measures.standard_error(values[:50], texts[:50]) is None

"""Thresholds with a guarantee, end to end on tiny models: what is promised is measured again with the engine."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tiny_models import random_prompts, tiny_model, with_parameters

import tide_jax
from tide_jax import TIDE, ExitConfig, Routers, TideError
from tide_jax.calibration.collect import Sample
from tide_jax.config import RiskGuarantee
from tide_jax.errors import GuaranteeError
from tide_jax.exits.router import Router
from tide_jax.functional import Decoder
from tide_jax.model.decoder import parameters
from tide_jax.risk.answers import TextAnswers
from tide_jax.risk.guarantee import THRESHOLDS
from tide_jax.risk.statistics import hb_p_value
from tide_jax.risk.threshold_path import TokenScores, greedy_path
from tide_jax.testing import ByteTokenizer, constant_routers, random_routers, tiny_config

guarantee = functools.partial(tide_jax.guarantee, max_length=24, batch_size=100)


def texts_of(count: int, seed: int) -> list[list[int]]:
    return random_prompts(tuple(np.random.default_rng(seed).integers(8, 25, count)), seed=seed + 1)


TEXTS, HELD_OUT = texts_of(300, 1), texts_of(1200, 2)


@functools.cache
def nearly_finished(change: float = 0.15) -> Decoder:
    """After layer 0 little is left to do: leaving early mostly gives the same answer."""
    model = tiny_model(tiny_config(num_layers=3))
    kernels = {name: p for name, p in parameters(model).items() if name.endswith(("out.kernel", "down.kernel"))}
    later = {name: p for name, p in kernels.items() if not name.startswith("layers.0.")}
    return with_parameters(model, {name: change * np.asarray(p) for name, p in later.items()})


@functools.cache
def engine_of(**settings: Any) -> TIDE:
    model = nearly_finished()
    return TIDE(model, random_routers(model.config, interval=1), ExitConfig(**{"min_layers": 0} | settings))


def log_softmax(logits: Any) -> np.ndarray:
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def measure(engine: TIDE, texts: Sequence[Sequence[int]], start: int = 1) -> dict[str, np.ndarray]:
    """Losses and depth of each text, by scoring them with the engine."""
    scored = [engine(list(texts), mode=mode, prompt_lengths=start) for mode in ("exit", "full")]
    early, full = (out._replace(logits=np.asarray(out.logits)) for out in scored)
    rows: dict[str, list[float]] = {"disagreement": [], "nll": [], "first": [], "layers": [], "tokens": []}
    for b, text in enumerate(texts):
        differs = np.argmax(early.logits[b], -1) != np.argmax(full.logits[b], -1)
        following = np.arange(start, len(text) - 1), np.asarray(text[start + 1 :])
        found = [log_softmax(out.logits[b])[following] for out in (full, early)]
        rows["disagreement"].append(differs[start : len(text)].mean())
        rows["first"].append(differs[start : len(text)].any())
        rows["nll"].append(np.clip(found[0].mean() - found[1].mean(), 0, 1))
        rows["layers"].append((early.exit_layers[b, start : len(text)] + 1).sum())
        rows["tokens"].append(len(text) - start)
    return {name: np.asarray(values, float) for name, values in rows.items()}


def any_difference(answers: TextAnswers) -> float:
    return float((answers.full_argmax != answers.exit_argmax)[answers.counted].any())


CASES: list[tuple[str, Any, float]] = [
    ("disagreement", "disagreement", 0.08),
    ("nll", "nll", 0.02),
    ("first", any_difference, 0.3),
]


@pytest.mark.matrix
@pytest.mark.parametrize("per_exit_point", [False, True])
@pytest.mark.parametrize("name, loss, risk", CASES)
def test_what_is_promised_holds(name: str, loss: Any, risk: float, per_exit_point: bool) -> None:
    engine = engine_of()
    config = guarantee(engine, TEXTS, risk, 0.1, loss, per_exit_point=per_exit_point)
    promise = config.guarantee
    assert promise is not None
    assert (promise.risk, promise.delta, promise.loss) == (risk, 0.1, getattr(loss, "__name__", loss))
    assert isinstance(config.exit_threshold, tuple) == per_exit_point
    found = measure(TIDE(engine.model, engine.routers, config), HELD_OUT)
    assert 0.0 < found[name].mean() <= risk, "on new texts"
    assert promise.observed < risk
    assert promise.p_value <= 0.1
    assert promise.depth < 0.99, "and something was saved"
    assert promise.depth == pytest.approx(found["layers"].sum() / found["tokens"].sum() / 3, abs=0.02)
    assert promise.sequences == (225 if per_exit_point else 300)


@pytest.mark.matrix
@pytest.mark.parametrize("name, loss, risk", CASES)
def test_the_record_is_what_the_engine_does_and_the_next_threshold_fails(name: str, loss: Any, risk: float) -> None:
    config = guarantee(engine_of(), TEXTS, risk, 0.1, loss)
    promise, number = config.guarantee, THRESHOLDS.index(config.exit_threshold)
    assert promise is not None
    for step in (number - 1, number, number + 1):
        found = measure(engine_of().with_config(exit_threshold=THRESHOLDS[step]), TEXTS)
        p_value = hb_p_value(found[name].mean(), len(TEXTS), risk)
        assert (p_value <= 0.1) == (step <= number)
        if step == number:
            assert promise.observed == pytest.approx(found[name].mean(), rel=1e-4)
            assert promise.p_value == pytest.approx(p_value, rel=1e-3)
            assert promise.tokens == found["tokens"].sum()
            assert promise.depth == pytest.approx(found["layers"].sum() / promise.tokens / 3)


def test_prompts_run_deep_and_are_not_counted() -> None:
    samples = [Sample(text, 4) for text in TEXTS]
    threshold = {"thresholds": [0.8], "delta": 0.1, "risk": 0.3}
    promise = guarantee(engine_of(), samples, **threshold).guarantee
    found = measure(engine_of().with_config(exit_threshold=0.8), TEXTS, start=4)
    assert promise is not None
    assert promise.observed == pytest.approx(found["disagreement"].mean())
    assert promise.tokens == found["tokens"].sum()
    prompts_exit = guarantee(engine_of(prefill_exits=True), samples, **threshold)
    assert prompts_exit.guarantee is not None
    assert prompts_exit.guarantee.observed != promise.observed, "prompts have left their mark on the cache"
    assert prompts_exit.prefill_exits
    assert prompts_exit.guarantee.tokens == promise.tokens


def test_min_layers_of_the_engine_are_kept() -> None:
    config = guarantee(engine_of(min_layers=2), TEXTS, 0.1, 0.1)
    assert config.min_layers == 2
    assert config.guarantee is not None
    assert config.guarantee.min_layers == 2
    found = measure(engine_of(min_layers=2).with_config(exit_threshold=config.exit_threshold), TEXTS)
    assert config.guarantee.observed == pytest.approx(found["disagreement"].mean())


@pytest.mark.parametrize("per_exit_point", [False, True])
@pytest.mark.matrix
def test_the_same_texts_give_the_same_guarantee(per_exit_point: bool) -> None:
    first = guarantee(engine_of(), TEXTS, 0.08, 0.1, per_exit_point=per_exit_point)
    again = guarantee(engine_of(), iter(TEXTS), 0.08, 0.1, per_exit_point=per_exit_point)
    assert first == again
    other = guarantee(engine_of(), TEXTS, 0.08, 0.1, per_exit_point=per_exit_point, seed=3)
    assert (first == other) != per_exit_point, "the seed says which texts choose the path"


def test_a_bad_exit_point_does_not_spoil_the_others() -> None:
    """Leaving after layer 0 is always wrong and its router always sure; after layer 1 nothing is left to do."""
    model = with_parameters(
        tiny_model(tiny_config(num_layers=3)),
        {f"layers.2.{name}.kernel": 0.0 for name in ("attention.out", "mlp.down")},
    )
    sure, unsure = (Router(*constant_routers(model.config, interval=1).routers[0][:3], np.float32(b)) for b in (6, 0))
    engine = TIDE(model, Routers((sure, unsure), None, (0, 1)), ExitConfig(min_layers=0))
    with pytest.raises(GuaranteeError, match="no threshold qualifies"):
        guarantee(engine, TEXTS, 0.02, 0.05, thresholds=[0.9, 0.4])
    config = guarantee(engine, TEXTS, 0.02, 0.05, per_exit_point=True)
    assert isinstance(config.exit_threshold, tuple)
    assert config.exit_threshold[0] > 0.99
    assert config.exit_threshold[1] < 0.5
    assert config.guarantee is not None
    assert config.guarantee.depth == pytest.approx(2 / 3)


# ----------------------------------------------------------------------------------------------- what can't be promised


def test_too_few_texts_are_refused_before_anything_runs() -> None:
    seen: list[Any] = []
    for count, per_exit_point in ((148, False), (197, True)):
        texts = texts_of(count, 5)
        with pytest.raises(GuaranteeError, match=r"^148 texts .* risk=0\.02 with delta=0\.05 needs at least 149 ") as e:
            guarantee(engine_of(), texts, per_exit_point=per_exit_point, progress=lambda *what: seen.append(what))
        assert "\n" not in str(e.value)
    assert not seen


def test_no_threshold_qualifies() -> None:
    model = tiny_model(tiny_config(num_layers=3))
    engine = TIDE(model, constant_routers(model.config, interval=1), ExitConfig(min_layers=0))
    with pytest.raises(
        GuaranteeError, match=r"safest tested, 0\.998, has a mean loss of 0\.\d+ \(p-value 1, d"
    ) as caught:
        guarantee(engine, TEXTS)
    assert "exit_threshold=1.0" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_thresholds_after_the_first_failure_are_not_measured() -> None:
    stages: list[str] = []
    bad = 0.0  # everybody leaves at once
    config = guarantee(
        engine_of(), TEXTS, 0.08, 0.1, thresholds=[0.999, bad, 1.0], progress=lambda name, *_: stages.append(name)
    )
    assert config.exit_threshold == 0.999, "not 1.0, though it would pass: the order counts"
    assert list(dict.fromkeys(stages)) == [
        "reading at full depth",
        "testing threshold 1 of at most 3",
        "testing threshold 2 of at most 3",
    ]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"risk": 0.0}, "risk=0.0 must lie between 0 and 1"),
        ({"risk": 1.0}, "risk=1.0 must lie between 0 and 1"),
        ({"risk": 2.0, "loss": "nll", "bound": 2.0}, "risk=2.0 must lie between 0 and 2"),
        ({"risk": "low"}, "risk='low' must be a number"),
        ({"delta": 1.5}, "delta=1.5 must lie between 0 and 1"),
        ({"loss": "vibes"}, "loss='vibes' is not known"),
        ({"loss": "nll", "bound": 0.0}, "bound=0.0 must be"),
        ({"max_length": 1}, "max_length=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"per_exit_point": True, "thresholds": [0.9]}, "leave out thresholds or per_exit_point"),
        ({"thresholds": []}, "thresholds is empty"),
        ({"thresholds": [1.5]}, "exit_threshold=1.5"),
        ({"thresholds": [(0.5, 0.5, 0.5)]}, "exit_threshold has 3 values, expected one or 2"),
        ({"thresholds": 0.9}, "thresholds=0.9 must be a sequence"),
        ({"texts": "one string"}, "texts is a single string"),
        ({"texts": [[999]]}, "outside the vocabulary"),
        ({"loss": lambda answers: 1.5}, "<lambda> must return a number in .0, 1. for every text: loss=1.5"),
        ({"loss": lambda answers: None}, "<lambda> must return a number"),
        ({"loss": lambda answers: float("nan")}, "<lambda> must return a number"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(TideError, match=expected) as caught:
        guarantee(engine_of(), **{"texts": TEXTS} | arguments)
    assert "\n" not in str(caught.value)


def test_without_routers_there_is_nothing_to_promise() -> None:
    with pytest.raises(TideError, match="no routers"):
        guarantee(TIDE(nearly_finished()), TEXTS)


# --------------------------------------------------------------------------------------------------------------- texts


def test_strings_go_through_the_tokenizer_and_long_texts_are_cut() -> None:
    tokenizer = ByteTokenizer()
    strings = ["".join(chr(97 + i % 26) for i in text) for text in TEXTS]
    loose: dict[str, Any] = {"risk": 0.3, "delta": 0.1, "thresholds": [0.7], "max_length": 10}
    config = guarantee(engine_of(), strings, tokenizer=tokenizer, **loose)
    assert config == guarantee(engine_of(), [tokenizer.encode(text)[:10] for text in strings], **loose)
    assert config.guarantee is not None
    assert config.guarantee.max_length == 10
    assert config.guarantee.tokens == sum(min(9, len(text)) for text in TEXTS)
    shorter = guarantee(engine_of(), [*TEXTS, [5], []], **loose | {"batch_size": 30})
    assert shorter.guarantee is not None
    assert shorter.guarantee.sequences == len(TEXTS), "texts with nothing to count are no evidence"
    one_token = [Sample(text, len(text) - 1) for text in TEXTS]
    with pytest.raises(GuaranteeError, match=r"^0 texts"):  # nothing follows the only counted token
        guarantee(engine_of(), one_token, **loose | {"loss": "nll", "max_length": 24})


def test_a_loss_function_sees_each_text() -> None:
    seen: list[TextAnswers] = []

    def share_of_depth(answers: TextAnswers) -> float:
        seen.append(answers)
        return float(np.mean(answers.exit_layers[answers.counted] + 1) / answers.num_layers)

    samples = [Sample(text, 3) for text in TEXTS]
    config = guarantee(engine_of(), samples, 0.95, 0.1, share_of_depth, thresholds=[0.6])
    assert config.guarantee is not None
    assert config.guarantee.loss == "share_of_depth"
    assert sorted(tuple(a.tokens.tolist()) for a in seen) == sorted(map(tuple, TEXTS))
    engine = engine_of().with_config(exit_threshold=0.6)
    for answers in seen[:5] + seen[-5:]:
        row, count = [answers.tokens.tolist()], len(answers.tokens)
        assert answers.counted.tolist() == [False] * 3 + [True] * (count - 3)
        for mode, argmax, log_probs in (
            ("exit", answers.exit_argmax, answers.exit_log_probs),
            ("full", answers.full_argmax, answers.full_log_probs),
        ):
            out = engine(row, mode=mode, prompt_lengths=3)
            assert argmax.tolist() == np.argmax(out.logits[0], axis=-1).tolist()
            expected = log_softmax(out.logits[0])[np.arange(count - 1), row[0][1:]]
            np.testing.assert_allclose(log_probs, [*expected, 0.0], atol=1e-4)
            if mode == "exit":
                assert answers.exit_layers.tolist() == out.exit_layers[0].tolist()


def test_a_changed_dial_drops_the_guarantee() -> None:
    config = guarantee(engine_of(), TEXTS, 0.08, 0.1)
    engine = TIDE(engine_of().model, engine_of().routers, config)
    assert isinstance(engine.config.guarantee, RiskGuarantee)
    assert engine.with_config(exit_threshold=config.exit_threshold).config.guarantee == config.guarantee
    assert engine.with_config(exit_threshold=0.1).config.guarantee is None
    assert engine.with_config(min_layers=1).config.guarantee is None


# ------------------------------------------------------------------------------------------------------------ the path


def scored(seed: int = 0, count: int = 4000) -> TokenScores:
    """Two exit points: the later one's router is the better."""
    rng = np.random.default_rng(seed)
    scores = rng.random((2, count)).astype(np.float32)
    return TokenScores(
        scores, rng.random((2, count)) < np.stack([0.5 + 0.4 * scores[0], scores[1] ** 0.1]), np.full(count, 1 / count)
    )


def outcome(sample: TokenScores, vector: Sequence[float], shares: Sequence[float]) -> tuple[float, float]:
    depth, wrong = 0.0, 0.0
    for n, weight in enumerate(sample.weights):
        left = next((c for c, t in enumerate(vector) if sample.scores[c, n] > np.float32(t)), None)
        depth += weight * (1.0 if left is None else shares[left])
        wrong += weight * (left is not None and not sample.agrees[left, n])
    return depth, wrong


def test_the_path_leads_from_safe_to_bold() -> None:
    sample, shares = scored(), (0.25, 0.5)
    path = greedy_path(sample, shares, (True, True))
    found = [outcome(sample, vector, shares) for vector in path]
    assert len(path) > 8
    assert found[0][1] <= 0.001
    assert found[-1][0] == pytest.approx(0.25), "in the end everybody leaves at once"
    assert [depth for depth, _ in found] == sorted((depth for depth, _ in found), reverse=True)
    assert all(a[c] >= b[c] for a, b in itertools.pairwise(path) for c in range(2))


def test_the_path_uses_the_better_exit_point() -> None:
    sample, shares = scored(), (0.25, 0.5)
    path = [outcome(sample, vector, shares) for vector in greedy_path(sample, shares, (True, True))]
    for threshold in (0.8, 0.7, 0.6):
        depth, wrong = outcome(sample, (threshold, threshold), shares)
        between = np.interp(wrong, [w for _, w in path], [d for d, _ in path])
        assert between < depth - 0.01, "less depth for as many errors as one threshold for both"


def test_the_path_leaves_barred_exit_points_shut() -> None:
    path = greedy_path(scored(count=500), (0.25, 0.5), (False, True))
    assert {vector[0] for vector in path} == {1.0}
    assert len({vector[1] for vector in path}) == len(path) > 3
    assert greedy_path(scored(count=500), (0.25, 0.5), (False, False)) == [(1.0, 1.0)]

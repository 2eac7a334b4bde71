"""Calibration: on models whose right answer is known, with its report recomputed by hand."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import BruteForce
from tiny_models import random_prompts, tiny_model, with_parameters

from tide_jax import TIDE, CalibrationConfig, ExitConfig, Routers, TideError, calibrate
from tide_jax.calibration.calibrate import auc, expected_exits
from tide_jax.calibration.collect import ReadingResult, Sample, collect_states, tokenise
from tide_jax.calibration.exit_heads import fit_heads
from tide_jax.calibration.reservoir import Reservoir
from tide_jax.calibration.router_training import router_probabilities, train_routers
from tide_jax.config import exit_point_layers
from tide_jax.exits.evaluation import measure_exits
from tide_jax.functional import Decoder
from tide_jax.testing import ByteTokenizer, random_routers, tiny_config

TEXTS = random_prompts(tuple(np.random.default_rng(1).integers(13, 25, 90)), seed=2)
CONFIG = CalibrationConfig(
    checkpoint_interval=1,
    max_length=24,
    batch_size=8,
    router_bottleneck_dim=8,
    max_epochs=4,
    min_layers=0,
    exit_strategy="identity",
)


def config(**changes: Any) -> CalibrationConfig:
    return CalibrationConfig(**(vars(CONFIG) | changes))


@functools.cache
def random_model() -> Decoder:
    return tiny_model(tiny_config(num_layers=3))


@functools.cache
def finished_model() -> Decoder:
    """Layers 1 and 2 add nothing: after layer 0 the state is already the last one."""
    names = ("attention.out.kernel", "mlp.down.kernel")
    return with_parameters(random_model(), {f"layers.{i}.{name}": 0.0 for i in (1, 2) for name in names})


def gather(model: Decoder, calibration: CalibrationConfig, texts: Any = None) -> ReadingResult:
    exit_points = exit_point_layers(model.config.num_layers, calibration.checkpoint_interval)
    samples = tokenise(None, TEXTS if texts is None else texts, calibration, model.config.vocab_size)
    return collect_states(model, samples, exit_points, calibration)


# ------------------------------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize("candidates", [0, 64])
@pytest.mark.matrix
def test_tokens_leave_where_nothing_is_left_to_do(candidates: int) -> None:
    model = finished_model()
    routers = calibrate(model, None, TEXTS, config(confidence_candidates=candidates))
    assert [c["agreement"] for c in routers.report["exit_points"]] == [1.0, 1.0]
    at_dial = next(e for e in routers.report["exits"] if e["threshold"] == 0.85)
    assert at_dial["exit_rate"] == at_dial["agreement"] == 1.0
    # A second look holds back where two answers are all but equal, if only because float16 states may swap them.
    assert at_dial["depth"] == pytest.approx(1 / 3, abs=0.01 if candidates else 1e-6)
    engine = TIDE(model, routers, ExitConfig(exit_threshold=0.85, min_layers=0))
    row = random_prompts((16,), seed=7)
    early, full = (engine(row, mode=mode) for mode in ("exit", "full"))
    np.testing.assert_array_equal(np.argmax(early.logits, axis=-1), np.argmax(full.logits, axis=-1))
    assert early.exit_layers.tolist() == [[2] + [0] * 15], "all but the first token left at the first exit point"
    assert early.stats.depth < 0.4 < full.stats.depth == 1.0


def test_nothing_leaves_where_no_state_is_close_to_the_last() -> None:
    routers = calibrate(random_model(), None, TEXTS, config(label="cosine"))
    assert [c["positives_in_training"] for c in routers.report["exit_points"]] == [0.0, 0.0]
    assert [c["auc"] for c in routers.report["exit_points"]] == [None, None]
    assert all(e["exit_rate"] == 0.0 and e["depth"] == 1.0 for e in routers.report["exits"])
    engine = TIDE(random_model(), routers, ExitConfig(exit_threshold=0.5, min_layers=0))
    assert engine(random_prompts((16,))).stats.depth == 1.0


def test_cosine_labels_where_every_state_is_the_last_one() -> None:
    routers = calibrate(finished_model(), None, TEXTS, config(label="cosine"))
    assert [c["agreement"] for c in routers.report["exit_points"]] == [1.0, 1.0]


# ------------------------------------------------------------------------------------------------ the recomputed report


@pytest.mark.parametrize("rank", [None, 6])
def test_the_report_is_what_the_routers_do_on_the_validation_split(rank: int | None) -> None:
    model, settings = random_model(), config(exit_strategy="affine", exit_head_rank=rank, confidence_candidates=0)
    routers = calibrate(model, None, TEXTS, settings)
    assert routers.heads is not None
    assert routers.confidence is None
    width = model.config.hidden_size
    shapes = [(width, width)] if rank is None else [(width, rank), (rank, width)]
    assert [[f.shape for f in head.factors] for head in routers.heads] == [shapes] * 2
    validation = gather(model, settings).splits.validation
    scores, labels = np.zeros((2, len(validation))), np.zeros((2, len(validation)), bool)
    for c in range(2):
        states = jnp.asarray(validation.states[c], jnp.float32)
        out = model.final_norm(routers.exit_state(c, states[None], eps=1e-6))
        labels[c] = np.argmax(model.logits(out)[0], axis=-1) == validation.targets
        down, down_bias, up, up_bias = (np.asarray(a, np.float64) for a in routers.routers[c])
        hidden = validation.states[c].astype(np.float64) @ down + down_bias
        scores[c] = 1 / (1 + np.exp(-((hidden / (1 + np.exp(-hidden))) @ up + up_bias)))
        found = routers.report["exit_points"][c]
        assert found["layer"] == routers.exit_points[c]
        assert found["agreement"] == pytest.approx(labels[c].mean())
        assert found["auc"] == pytest.approx(auc_by_pairs(scores[c], labels[c]), abs=2e-3)
    assert 0.0 < labels.mean() < 1.0
    for dial in routers.report["exits"]:
        left = [next((c for c in range(2) if scores[c, n] > dial["threshold"]), None) for n in range(len(validation))]
        right = [c is None or labels[c, n] for n, c in enumerate(left)]
        assert dial["label_agreement"] == pytest.approx(np.mean(right))
    oracle = [next((routers.exit_points[c] + 1 for c in range(2) if labels[c, n]), 3) for n in range(len(validation))]
    assert routers.report["oracle"]["depth"] == pytest.approx(np.mean(oracle) / 3)


def test_measured_exits_are_those_of_the_brute_force() -> None:
    """With the cache that exits leave behind, on the texts that were held out; prompts run every layer."""
    model = random_model()
    routers = random_routers(model.config, interval=1)
    rows, batches = [], gather(model, CONFIG, [Sample(text, start=len(text) // 2) for text in TEXTS]).held_out_batches
    for batch in batches:
        for tokens, positions, counted in zip(*map(np.asarray, batch), strict=True):
            if counted.any():
                rows.append((tokens[positions >= 0].tolist(), int(np.argmax(counted))))
    full = [np.argmax(BruteForce(model).walk(row, 0).logits[start:], axis=1) for row, start in rows]
    count = sum(len(answers) for answers in full)
    assert count > 80
    for threshold, min_layers in ((0.4, 0), (0.7, 2)):
        (dial,) = measure_exits(model, routers, batches, [threshold], min_layers)
        brute_force = BruteForce(model, routers, threshold, min_layers)
        walked = [brute_force.walk(row, start) for row, start in rows]
        layers = np.concatenate([w.exit_layers[start:] for w, (_, start) in zip(walked, rows, strict=True)])
        agrees = [np.argmax(w.logits[s:], axis=1) == a for w, (_, s), a in zip(walked, rows, full, strict=True)]
        few = 1.5 / count  # scores this close to a threshold may fall on either side
        assert dial["exit_rate"] == pytest.approx((layers < 2).mean(), abs=few)
        assert dial["depth"] == pytest.approx((layers + 1).mean() / 3, abs=few)
        assert dial["agreement"] == pytest.approx(np.concatenate(agrees).mean(), abs=few)
        assert dial["threshold"] == threshold
        for layer in (0, 1):
            assert dial["exits_by_layer"][str(layer)] == pytest.approx((layers == layer).mean(), abs=few)
        assert 0.1 < dial["exit_rate"] < 0.9
        assert dial["agreement"] < 0.99


def test_scoring_agrees_with_what_training_saw() -> None:
    """Routers score raw states while running and normed float16 ones while training: the same numbers."""
    model = random_model()
    routers = calibrate(model, None, TEXTS, CONFIG)
    row = jnp.asarray([TEXTS[0]], jnp.int32)
    positions = jnp.arange(row.shape[1], dtype=jnp.int32)[None]
    x, contexts = model.embed_tokens(row, positions), model.contexts(positions, None)
    for layer in model.layers[:1]:
        x, _ = layer(x, contexts, None)
    normed = np.asarray(x[0]) / np.sqrt(np.mean(np.square(x[0]), axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(
        routers.scores(0, x[0], eps=1e-6),
        routers.scores(0, jnp.asarray(normed.astype(np.float16)), eps=1e-6),
        atol=2e-3,
    )


def auc_by_pairs(scores: np.ndarray, labels: np.ndarray) -> float:
    pairs = itertools.product(scores[labels], scores[~labels])
    return float(np.mean([1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs]))


@pytest.mark.parametrize("levels", [3, 1000])
def test_auc_counts_ordered_pairs(levels: int) -> None:
    rng = np.random.default_rng(levels)
    labels = rng.random(80) < 0.3
    scores = rng.integers(0, levels, 80) / levels + 0.2 * labels * (levels > 3)
    assert auc(scores, labels) == pytest.approx(auc_by_pairs(scores, labels))
    assert auc(scores, np.ones(80, bool)) is None


def test_expected_exits_by_hand() -> None:
    scores = np.asarray([[0.9, 0.9, 0.1, 0.2, 0.5], [0.9, 0.1, 0.8, 0.3, 0.9]])
    labels = np.asarray([[True, False, True, True, True], [False, True, False, True, True]])
    found = expected_exits(scores, labels, (1, 3), 6, 0.5, min_layers=0)
    assert found == {
        "threshold": 0.5,
        "exit_rate": pytest.approx(4 / 5),
        "depth": pytest.approx((2 + 2 + 4 + 6 + 4) / 30),
        "agreement": pytest.approx(3 / 5),
        "exits_by_layer": {"1": pytest.approx(2 / 5), "3": pytest.approx(2 / 5)},
    }
    barred = expected_exits(scores, labels, (1, 3), 6, 0.5, min_layers=3)
    assert barred["exits_by_layer"] == {"1": 0.0, "3": pytest.approx(3 / 5)}


# ------------------------------------------------------------------------------------------------- what is learned from


def test_the_same_seed_gives_the_same_routers() -> None:
    settings = config(exit_strategy="affine", max_epochs=2)
    first, again = (calibrate(random_model(), None, iter(TEXTS), settings) for _ in range(2))
    other = calibrate(random_model(), None, TEXTS, config(exit_strategy="affine", max_epochs=2, seed=1))
    assert first.metadata == again.metadata
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.routers[0].down, other.routers[0].down)


def test_routers_survive_saving_exactly(tmp_path: Any) -> None:
    routers = calibrate(random_model(), None, TEXTS, config(exit_strategy="affine", max_epochs=2))
    routers.save(tmp_path / "r.safetensors")
    loaded = Routers.load(tmp_path / "r.safetensors", model=random_model(), checkpoint_interval=1)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(routers), strict=True):
        np.testing.assert_array_equal(a, b)
    assert loaded.report == routers.report


def targets_of(model: Decoder, texts: list[list[int]], starts: list[int]) -> list[int]:
    """The full model's choice after every token from a text's start on, sorted."""
    padded = jnp.asarray([text + [0] * (24 - len(text)) for text in texts], jnp.int32)
    chosen = np.asarray(jax.jit(lambda model, tokens: jnp.argmax(model(tokens), axis=-1))(model, padded))
    spans = (row[start : len(text)] for row, text, start in zip(chosen, texts, starts, strict=True))
    return sorted(np.concatenate([*spans]).tolist())


@pytest.mark.parametrize("count", [90, 47])
def test_every_token_but_the_first_of_a_text_is_seen_once(count: int) -> None:
    model, texts = random_model(), TEXTS[:count]
    assert count % CONFIG.batch_size, "the last batch is a part of one"
    splits, _, _, counts = gather(model, config(exit_strategy="affine"), texts)
    assert sorted(np.concatenate([split.targets for split in splits]).tolist()) == targets_of(model, texts, [1] * count)
    assert counts == {"texts": count, "tokens": sum(len(text) - 1 for text in texts)}


def test_prompts_of_samples_are_read_but_not_learned_from() -> None:
    model, starts = random_model(), [i % 9 for i in range(90)]
    splits, _, _, counts = gather(
        model, CONFIG, [Sample(text, start) for text, start in zip(TEXTS, starts, strict=True)]
    )
    starts = [max(1, start) for start in starts]
    assert sorted(np.concatenate([split.targets for split in splits]).tolist()) == targets_of(model, TEXTS, starts)
    assert counts["tokens"] == sum(len(text) - start for text, start in zip(TEXTS, starts, strict=True))


def test_splits_share_no_text() -> None:
    """Each text is one token repeated, and the model of no layers' worth answers with it: targets name their text."""
    names = ("attention.out.kernel", "mlp.down.kernel")
    model = with_parameters(random_model(), {f"layers.{i}.{name}": 0.0 for i in range(3) for name in names})
    model = with_parameters(model, {"final_norm.scale": 1.0})
    texts = [[token] * 16 for token in range(10, 110)]
    splits, held_out, fitting, _ = gather(model, config(exit_strategy="affine"), texts)
    held = [set(split.targets.tolist()) for split in splits]
    assert sum(len(tokens) for tokens in held) == len(set.union(*held)) == 100
    assert [len(tokens) / 100 for tokens in held] == pytest.approx([0.425, 0.425, 0.15], abs=0.02)
    whole = [{int(t) for batch in batches for t in np.unique(batch.tokens) if t} for batches in (held_out, fitting)]
    assert whole[0] == held[2], "exits are measured on validation texts alone"
    assert whole[1] == held[0], "and nothing is fitted on those or on the routers'"


def test_memory_is_bounded_by_what_is_allowed() -> None:
    per_token = Reservoir.bytes_per_token(2, 48)
    splits, _, _, counts = gather(random_model(), config(reservoir_bytes=500 * per_token))
    assert counts["tokens"] > 1000
    for split, most in zip(splits, (0, 425, 75), strict=True):
        assert len(split) <= max(64, most)
        for array in (split.states, split.last, split.targets):
            assert array.nbytes <= per_token * max(64, most)


def test_affine_heads_find_a_linear_map() -> None:
    rng, size = np.random.default_rng(0), 12
    kernel, bias = 0.3 * rng.normal(size=(size, size)), rng.normal(size=size)

    def sample_of(count: int) -> Reservoir:
        reservoir = Reservoir(count, 1, size, seed=0)
        x = rng.normal(size=(count, size))
        x /= np.sqrt(np.mean(x**2, axis=1, keepdims=True))
        last = x + x @ kernel + bias
        reservoir.add(x[None].astype(np.float16), last.astype(np.float16), np.zeros(count, np.int32))
        return reservoir

    fit, held_out = sample_of(3000), sample_of(200)
    head = fit_heads(fit, held_out, None)[0]
    np.testing.assert_allclose(head.factors[0], kernel, atol=5e-3)
    np.testing.assert_allclose(head.bias, bias, atol=5e-3)
    # The best map of rank r leaves the smallest singular values, here of the map itself: inputs are white.
    low = fit_heads(fit, held_out, 5)[0]
    u, s, vt = np.linalg.svd(kernel)
    best = (u[:, :5] * s[:5]) @ vt[:5]
    found = np.asarray(low.factors[0] @ low.factors[1])
    assert np.linalg.norm(found - kernel) < 1.05 * np.linalg.norm(best - kernel)


def separable(count: int, *, seed: int, noise: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """States at two exit points, and labels a direction of theirs gives away; with `noise` nothing does."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(2, count, 16)).astype(np.float16)
    labels = rng.random((2, count)) < 0.3 if noise else states[..., 0] + states[..., 1] > 1.0
    return states, labels


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.mean(np.log(np.where(labels, probabilities, 1 - probabilities))))


def test_routers_learn_what_can_be_learned() -> None:
    settings = config(max_epochs=80, patience=80, learning_rate=1e-2)
    states, labels = separable(1500, seed=0)
    held_out_states, held_out = separable(300, seed=1)
    for c, router in enumerate(train_routers(states, labels, held_out_states, held_out, settings)):
        probabilities = router_probabilities(router, held_out_states[c])
        assert auc(probabilities, held_out[c]) > 0.98
        assert log_loss(probabilities, held_out[c]) < 0.2, "and are calibrated"


def test_routers_that_learn_nothing_keep_the_base_rate() -> None:
    """Each keeps its best epoch on the validation split: here the first, before it learns noise by heart."""
    settings = config(max_epochs=60, patience=60, learning_rate=3e-2, router_bottleneck_dim=64)
    states, labels = separable(200, seed=0, noise=True)
    held_out_states, held_out = separable(2000, seed=1, noise=True)
    for c, router in enumerate(train_routers(states, labels, held_out_states, held_out, settings)):
        rate = np.full(held_out[c].shape, labels[c].mean())
        found = log_loss(router_probabilities(router, held_out_states[c]), held_out[c])
        assert found < log_loss(rate, held_out[c]) + 1e-3


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "texts, changes, expected",
    [
        ([], {}, "no calibration text"),
        (["", "x"], {}, "too short"),
        ([[5]], {}, "no calibration text"),
        (TEXTS[:3], {}, "the calibration text is too short: 3 texts"),
        (TEXTS, {"checkpoint_interval": 5}, "checkpoint_interval=5 leaves no exit point"),
        (TEXTS, {"calibration_samples": 2}, "too short: 2 texts"),
    ],
)
def test_what_cannot_be_calibrated(texts: Any, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(TideError, match=expected) as caught:
        calibrate(random_model(), ByteTokenizer(), texts, config(**changes))
    assert "\n" not in str(caught.value)


def test_strings_go_through_the_tokenizer() -> None:
    tokenizer = ByteTokenizer()
    texts = ["".join(chr(97 + i % 26) for i in text) for text in TEXTS]
    first = calibrate(random_model(), tokenizer, texts, config(max_epochs=1))
    again = calibrate(random_model(), None, [tokenizer.encode(text) for text in texts], config(max_epochs=1))
    assert first.report == again.report
    assert first.report["counts"]["texts"] == len(TEXTS)


def test_progress_is_told_of_every_stage() -> None:
    seen: list[tuple[str, int, int]] = []
    calibrate(
        random_model(),
        None,
        TEXTS,
        config(exit_strategy="affine", max_epochs=2),
        progress=lambda *what: seen.append(what),
    )
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == [
        "reading text",
        "fitting exit heads",
        "tuning exit heads",
        "fitting translators",
        "labelling",
        "training routers",
        "training the second look",
        "measuring exits",
    ]

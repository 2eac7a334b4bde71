"""Sampling filters against transformers' logits processors, and the distribution of draws."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tide_jax import TideError
from tide_jax.generation.sampling import filter_logits, make_sampling, penalise, sample
from tide_jax.model.ops import likeliest

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.05},
    {"top_p": 0.6},
    {"top_p": 0.999},
    {"min_p": 0.02},
    {"min_p": 0.5},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.8, "top_k": 30, "min_p": 0.05},
    {"temperature": 1.3, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 0.5, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 3.0, "top_k": 5, "top_p": 0.5, "min_p": 0.3},
]


def random_logits(rows: int = 6, vocab: int = 101) -> np.ndarray:
    """Rows from flat to peaked."""
    scale = np.linspace(0.1, 6.0, rows)[:, None]
    return (scale * np.random.default_rng(0).normal(size=(rows, vocab))).astype(np.float32)


def nothing_seen(logits: np.ndarray) -> jax.Array:
    return jnp.zeros(logits.shape, bool)


@pytest.mark.matrix(keep=5)
@pytest.mark.parametrize("dials", FILTERS, ids=str)
def test_filters_are_those_of_transformers(dials: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    makers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    logits = random_logits()
    expected = torch.tensor(logits)
    for name, value in dials.items():
        expected = makers[name](value)(torch.zeros((len(logits), 1), dtype=torch.int64), expected)
    found = np.asarray(filter_logits(jnp.asarray(logits), make_sampling(**{"temperature": 1.0, **dials})))
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected.numpy()))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7, 5.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = random_logits()
    rows = np.random.default_rng(1).integers(0, logits.shape[1], (len(logits), 30))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, rows, True, axis=1)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(rows), torch.tensor(logits))
    found = penalise(jnp.asarray(logits), jnp.float32(penalty), jnp.asarray(seen))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_temperature_zero_takes_the_likeliest_whatever_the_filters() -> None:
    logits = random_logits()
    sampling = make_sampling(0.0, top_k=3, top_p=0.1, min_p=0.9)
    found = sample(jax.random.key(0), jnp.asarray(logits), sampling, nothing_seen(logits))
    np.testing.assert_array_equal(found, logits.argmax(axis=1))


def test_the_penalty_acts_on_greedy_choices_too() -> None:
    logits = jnp.asarray([[2.0, 1.9, -1.0], [2.0, 1.9, -1.0]])
    seen = jnp.asarray([[True, False, False], [False, False, True]])
    found = sample(jax.random.key(0), logits, make_sampling(0.0, repetition_penalty=2.0), seen)
    assert found.tolist() == [1, 0]


@pytest.mark.parametrize("dials", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7, "temperature": 1.5}], ids=str)
def test_draws_follow_the_filtered_distribution(dials: dict[str, Any]) -> None:
    draws = 20_000
    row = jnp.asarray([[1.0, 0.2, -0.5, 2.0, 0.0, -3.0]])
    sampling = make_sampling(**{"temperature": 1.0, **dials})
    logits = jnp.broadcast_to(row, (draws, 6))
    tokens = np.asarray(sample(jax.random.key(3), logits, sampling, jnp.zeros(logits.shape, bool)))
    expected = np.asarray(jax.nn.softmax(filter_logits(row, sampling)[0])) * draws
    counts = np.bincount(tokens, minlength=6)
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    chi_square = np.sum((counts[possible] - expected[possible]) ** 2 / expected[possible])
    assert chi_square < 25.0  # 5 degrees of freedom: once in 7000 keys, and this key is fixed


def test_a_row_draws_the_same_in_any_batch_and_rows_draw_apart() -> None:
    logits = jnp.broadcast_to(jnp.zeros((1, 5000)), (6, 5000))
    sampling, key = make_sampling(1.0), jax.random.key(11)
    many = sample(key, logits, sampling, nothing_seen(logits))
    assert len(set(many.tolist())) == 6
    for size in (1, 2, 5):
        assert sample(key, logits[:size], sampling, nothing_seen(logits[:size])).tolist() == many[:size].tolist()
    assert sample(jax.random.key(12), logits, sampling, nothing_seen(logits)).tolist() != many.tolist()


def test_turning_dials_does_not_retrace() -> None:
    traces = []

    @jax.jit
    def draw(key: jax.Array, logits: jax.Array, sampling: Any, seen: jax.Array) -> jax.Array:
        traces.append(1)
        return sample(key, logits, sampling, seen)

    logits = jnp.asarray(random_logits())
    for dials in FILTERS:
        draw(jax.random.key(0), logits, make_sampling(**dials), nothing_seen(logits))
    assert len(traces) == 1


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", 2**31),
        ("top_k", True),
        ("top_k", "5"),
        ("top_k", [5]),
        ("temperature", "warm"),
        ("temperature", None),
        ("temperature", [1.0]),
        ("temperature", 10**400),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
    ],
)
def test_dials_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(TideError, match=rf"^{name}=.* must be") as caught:
        make_sampling(**{name: value})
    assert "\n" not in str(caught.value)


def test_dials_of_numpy_and_jax() -> None:
    sampling = make_sampling(np.float32(0.5), np.int64(3), jnp.asarray(0.25), 1, repetition_penalty=np.float64(2.0))
    assert [float(dial) for dial in sampling] == [0.5, 3.0, 0.25, 1.0, 2.0]


def test_the_likeliest_is_argmax_on_every_platform() -> None:
    """Ties, infinities and NaN included: the first one."""
    nan, inf = float("nan"), float("inf")
    rows = [[1, 3, 3, 2], [-inf] * 4, [0, inf, inf, 1], [1, nan, 5, nan], [nan] * 4, [-0.0, 0.0, -1, -2]]
    logits = jnp.asarray([rows], jnp.float32)
    found = jax.jit(likeliest)(logits)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, jnp.argmax(logits, axis=-1))

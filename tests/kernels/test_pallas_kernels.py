"""The exit step's reference against float64 NumPy: every other implementation is tested against the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common import normalise, rms_normalise
from pallas_kernels.exit_step import ExitRows, ExitStep, Gate, Router, exit_step, router_scores

EPS = 1e-5


def router_of(size: int, hidden: int) -> Router:
    rng = np.random.default_rng(size)
    shapes = ((size, hidden), (hidden,), (hidden,), ())
    return Router(*(jnp.asarray(rng.normal(size=s) / np.sqrt(max(1, *s, 1)), jnp.float32) for s in shapes))


def states_of(rows: int, size: int, dtype: jnp.dtype) -> jax.Array:
    return jnp.asarray(3.0 * np.random.default_rng(rows).normal(size=(rows, size)), dtype)


def scores_by_hand(x: jax.Array, router: Router) -> np.ndarray:
    down, down_bias, up, up_bias = (np.asarray(a, np.float64) for a in router)
    rows = np.asarray(x, np.float64)
    rows = rows / np.sqrt(np.mean(rows**2, axis=1, keepdims=True) + EPS)
    hidden = rows @ down + down_bias
    return 1 / (1 + np.exp(-((hidden / (1 + np.exp(-hidden))) @ up + up_bias)))


def step(x: jax.Array, router: Router, threshold: float, candidates: np.ndarray | None = None) -> ExitStep:
    may_exit = np.ones(len(x), bool) if candidates is None else candidates
    rows = ExitRows(jnp.ones(len(x), bool), jnp.asarray(may_exit), jnp.zeros(len(x), jnp.int32))
    return exit_step(x, router, Gate(jnp.float32(threshold), 3, jnp.int32(2)), rows, eps=EPS)


@pytest.mark.matrix(keep=2)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rows", [1, 3, 17, 64])
@pytest.mark.parametrize("size, hidden", [(8, 1), (63, 16), (129, 33)])
def test_reference_is_the_formula(dtype: jnp.dtype, rows: int, size: int, hidden: int) -> None:
    x, router = states_of(rows, size, dtype), router_of(size, hidden)
    candidates = np.random.default_rng(1).random(rows) < 0.7
    expected = scores_by_hand(x, router)
    found = step(x, router, 0.5, candidates)
    assert found.scores.dtype == jnp.float32
    np.testing.assert_allclose(found.scores, expected, atol=2e-6)
    clear = np.abs(expected - 0.5) > 1e-5
    np.testing.assert_array_equal(found.exits[clear], (candidates & (expected > 0.5))[clear])


def test_a_score_must_exceed_the_threshold() -> None:
    router = Router(jnp.zeros((7, 2)), jnp.zeros((2,)), jnp.zeros((2,)), jnp.float32(0.0))  # scores of exactly 0.5
    x = states_of(4, 7, jnp.float32)
    assert not step(x, router, 0.5).exits.any()
    assert step(x, router, float(np.nextafter(np.float32(0.5), np.float32(0)))).exits.all()


def test_no_score_exceeds_one() -> None:
    router = Router(jnp.zeros((7, 2)), jnp.zeros((2,)), jnp.zeros((2,)), jnp.float32(1e4))
    found = step(states_of(4, 7, jnp.float32), router, 1.0)
    assert (found.scores == 1.0).all()
    assert not found.exits.any()


def test_rows_of_zeros_and_of_the_largest_float16_are_scored() -> None:
    x = jnp.asarray([[0.0] * 7, [60000.0] * 7], jnp.float16)
    router = router_of(7, 5)
    np.testing.assert_allclose(step(x, router, 0.5).scores, scores_by_hand(x, router), atol=2e-6)
    np.testing.assert_allclose(rms_normalise(x, EPS)[1], 1.0, rtol=1e-3)


def test_layer_norm_takes_the_mean_off_first() -> None:
    x, router = states_of(5, 63, jnp.float32) + 7, router_of(63, 16)
    centred = x - jnp.mean(x, axis=1, keepdims=True)
    np.testing.assert_array_equal(normalise(x, "layer", EPS), rms_normalise(centred, EPS))
    np.testing.assert_allclose(
        router_scores(x, router, eps=EPS, norm="layer"), scores_by_hand(centred, router), atol=2e-6
    )


def test_only_active_rows_that_may_and_have_run_enough_leave() -> None:
    router = Router(jnp.zeros((7, 2)), jnp.zeros((2,)), jnp.zeros((2,)), jnp.float32(9.0))  # scores near 1
    rows = ExitRows(
        jnp.asarray([True, True, False]), jnp.asarray([True, False, True]), jnp.asarray([1, 1, 0], jnp.int32)
    )

    def found(min_layers: int) -> ExitStep:
        gate = Gate(jnp.float32(0.5), 3, jnp.int32(min_layers))
        return exit_step(states_of(3, 7, jnp.float32), router, gate, rows, eps=EPS)

    step = found(4)
    assert step.exits.tolist() == [True, False, False]
    assert step.active.tolist() == [False, True, False]
    assert step.exit_layers.tolist() == [3, 3, 0]
    assert (bool(step.any_exits), bool(step.any_active)) == (True, True)
    assert not found(5).any_exits
    assert found(5).active.tolist() == [True, True, False]


def test_an_unknown_implementation_is_refused_with_those_there_are() -> None:
    rows = ExitRows(jnp.ones(2, bool), jnp.ones(2, bool), jnp.zeros(2, jnp.int32))
    arguments = states_of(2, 7, jnp.float32), router_of(7, 5), Gate(jnp.float32(0.5), 3, jnp.int32(2)), rows
    with pytest.raises(ValueError, match=r"implementation='magic' is not known; choose None or one of reference"):
        exit_step(*arguments, eps=EPS, implementation="magic")

"""Reservoir sampling: uniform, bounded, and its three arrays in step."""

from __future__ import annotations

import numpy as np
import pytest

from tide_jax.calibration.reservoir import Reservoir


def reservoir_of(count: int, capacity: int, *, seed: int, step: int) -> Reservoir:
    """A reservoir that was offered tokens 0 to count - 1, `step` at a time, their number in every array."""
    reservoir = Reservoir(capacity, 2, 3, seed=seed)
    for start in range(0, count, step):
        tokens = np.arange(start, min(start + step, count))
        states = np.broadcast_to(tokens.astype(np.float16)[:, None], (len(tokens), 3))
        reservoir.add(np.stack([states, states + 0.5]), states, tokens.astype(np.int32))
    return reservoir


@pytest.mark.matrix
@pytest.mark.parametrize("step", [1, 7, 100])
def test_a_reservoir_is_a_uniform_sample(step: int) -> None:
    count, capacity, runs = 100, 20, 600
    kept = np.zeros(count)
    for seed in range(runs):
        reservoir = reservoir_of(count, capacity, seed=seed, step=step)
        assert len(reservoir) == capacity
        assert reservoir.seen == count
        assert len(set(reservoir.targets.tolist())) == capacity, "no token twice"
        np.testing.assert_array_equal(reservoir.last[:, 0], reservoir.targets)
        np.testing.assert_array_equal(reservoir.states[1, :, 2], reservoir.targets + 0.5)
        kept[reservoir.targets] += 1
    expected = runs * capacity / count
    deviation = np.sqrt(expected * (1 - capacity / count))
    assert np.abs(kept - expected).max() < 4.5 * deviation
    # Neighbours in time, not single tokens alone: the first and the last tenth are kept as often as they should be.
    for tenth in (kept[:10], kept[-10:]):
        assert abs(tenth.sum() - 10 * expected) < 4.5 * np.sqrt(10) * deviation


def test_a_reservoir_keeps_everything_that_fits() -> None:
    assert sorted(reservoir_of(30, 40, seed=0, step=7).targets.tolist()) == list(range(30))

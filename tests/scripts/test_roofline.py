"""Predictions of the roofline page."""

from __future__ import annotations

import pytest

from scripts.readme.roofline import FILLED, MACHINES, SLOTS, STEPS, Step, fits, predict

H100, V5E, _ = MACHINES


def test_bytes_of_a_step() -> None:
    found = predict(Step("full depth"), H100, 20)
    # 32 layers of 218.1 million numbers and a head of 525.3 million, two bytes each; norms are a rounding error.
    layer = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    assert found.weights == pytest.approx(2 * (32 * layer + 128256 * 4096), rel=1e-3)
    assert found.cache == 32 * 2 * 8 * 128 * 2 * FILLED
    assert found.read == found.cache * SLOTS / FILLED
    assert found.floor == pytest.approx((found.weights + found.cache) / 3.35e12)
    assert found.kernels == 20 * 32


def test_what_makes_a_step_slower_or_faster() -> None:
    for machine in MACHINES:
        one, eight, _, int8, half, together = (predict(step, machine, 20) for step in STEPS)
        assert one.seconds < eight.seconds < 8 * one.seconds
        assert int8.seconds < 0.7 * one.seconds
        assert together.seconds < half.seconds < one.seconds
        assert all(p.floor < p.seconds for p in (one, eight, int8, half, together))


def test_a_tpu_reads_a_share_of_a_large_cache_and_launches_nothing() -> None:
    assert predict(Step("rows", rows=8), V5E, 20).read == predict(Step("rows", rows=8), V5E, 20).cache
    assert predict(Step("row"), V5E, 20).kernels == 0
    assert predict(Step("row"), V5E, 20).seconds == predict(Step("row"), V5E, 40).seconds


def test_what_does_not_fit_is_left_out() -> None:
    assert fits(Step("row"), V5E)
    assert not fits(Step("rows", rows=8), V5E)
    assert fits(Step("rows", rows=32), H100)

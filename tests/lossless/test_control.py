"""The control of drafts: it takes what is fastest, learns how often drafts hold, and bounds its losses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from draft_costs import CPU, costs_of
from tiny_models import CONFIGS, tiny_model

from tide_jax.functional import PassCosts
from tide_jax.lossless.control import DraftControl, Plan, Round, choose_drafts, expected_accepted, steps_of, update
from tide_jax.lossless.speculate import TEXT_ONLY
from tide_jax.lossless.twin import TwinDrafter, make_twin


@pytest.fixture(scope="module")
def twin() -> TwinDrafter:
    return TwinDrafter(make_twin(tiny_model(CONFIGS["pre norm"])))


def plan_of(
    control: DraftControl, costs: PassCosts, confidence: Any, drafters: Any = TEXT_ONLY, filled: int = 0
) -> tuple[int, int]:
    """Drafter and number of drafts for one running row."""
    running, filled = jnp.asarray([True]), jnp.int32(filled)
    plan = choose_drafts(control, costs, drafters, jnp.asarray(confidence), running, filled, most_slots=8)
    return int(plan.drafter), int(plan.drafts)


def outcome(
    drafts: int, held: int, seconds: float, *, right: bool, confidence: Any = ((1,),), drafter: int = 0
) -> Round:
    """A pass over one row."""
    plan = Plan(jnp.int32(drafter), jnp.int32(drafts))
    there = jnp.asarray(confidence)
    return Round(
        plan, there, jnp.full(there.shape, right), jnp.asarray([drafts]), jnp.asarray([held]), jnp.float32(held + 1),
        jnp.float32(seconds),
    )  # fmt: skip


@pytest.mark.matrix
@pytest.mark.parametrize("accepted", [0, 1, 3, 7])
def test_losses_are_bounded_and_gains_taken(accepted: int) -> None:
    """A row whose every draft holds for so many tokens, at the costs of a CPU."""
    control, seconds, tokens = DraftControl.start(TEXT_ONLY), 0.0, 0
    learn = jax.jit(lambda control, done: update(control, TEXT_ONLY, done))
    for _ in range(400):
        drafts = plan_of(control, CPU, [[1]])[1]
        held = min(drafts, accepted)
        spent = {0: 1.0, 3: 1.4, 7: 2.5}[drafts]
        control = learn(control, outcome(drafts, held, spent, right=accepted > 0))
        seconds, tokens = seconds + spent, tokens + held + 1
        assert seconds <= 1.02 * tokens + 6 + 2.5 - 1
    assert tokens / seconds > {0: 0.97, 1: 1.3, 3: 2.5, 7: 2.9}[accepted]


@pytest.mark.parametrize("holds", [0, 1])
def test_what_drafts_would_have_done_is_learned_without_making_any(holds: int) -> None:
    """Without credit nothing is drafted; once there is some, drafts are made where they would have held."""
    control = DraftControl.start(TEXT_ONLY)._replace(credit=jnp.float32(-1e6))
    for _ in range(60):
        assert plan_of(control, CPU, [[1]])[1] == 0
        control = update(control, TEXT_ONLY, outcome(0, 0, 1.0, right=bool(holds)))
    control = control._replace(credit=jnp.float32(0.0))
    assert (plan_of(control, CPU, [[1]])[1] > 0) == bool(holds)


def test_the_fastest_drafter_drafts(twin: TwinDrafter) -> None:
    """Long matches in the text, whose drafts cost nothing; else the twin; nobody where a draft costs a step."""
    drafters = (*TEXT_ONLY, twin)
    control = DraftControl.start(drafters)
    cheap, dear = costs_of(1.0, 1.1, 1.2, twin=0.3), costs_of(1.0, 1.1, 1.2, twin=1.0)
    assert plan_of(control, cheap, [[3], [0]], drafters) == (0, 7)
    assert plan_of(control, cheap, [[-1], [0]], drafters) == (1, 7)
    assert plan_of(control, cheap, [[0], [0]], drafters) == (1, 7)
    assert plan_of(control, dear, [[-1], [0]], drafters)[1] == 0
    assert plan_of(control, dear, [[3], [0]], drafters) == (0, 7)


def test_a_long_cache_makes_drafts_of_a_model_dear_and_copies_not(twin: TwinDrafter) -> None:
    """Each draft reads the cache as a pass does: here that takes ten steps' time at a thousand slots."""
    drafters, costs = (*TEXT_ONLY, twin), costs_of(1.0, 1.1, 1.2, twin=0.3, attention=0.01)
    control = DraftControl.start(drafters)
    assert plan_of(control, costs, [[-1], [0]], drafters, filled=0) == (1, 7)
    assert plan_of(control, costs, [[-1], [0]], drafters, filled=1000)[1] == 0
    assert plan_of(control, costs, [[3], [0]], drafters, filled=1000) == (0, 7)


def test_a_twin_that_fails_is_left_and_tried_again(twin: TwinDrafter) -> None:
    drafters, costs = (*TEXT_ONLY, twin), costs_of(1.0, 1.1, 1.2, twin=0.3)
    control, tried = DraftControl.start(drafters), []
    learn = jax.jit(lambda control, done: update(control, drafters, done))
    for _ in range(300):
        number, drafts = plan_of(control, costs, [[-1], [0]], drafters)
        spent = {0: 1.0, 3: 2.0, 7: 3.3}[drafts]
        control = learn(control, outcome(drafts, 0, spent, right=False, confidence=[[-1], [0]], drafter=number))
        tried.append(drafts > 0)
    assert any(tried[:10])
    assert any(tried[100:])
    assert sum(tried) < 15


@pytest.mark.parametrize("fails", [1, 2])
def test_bad_luck_at_the_start_does_not_stop_a_good_twin(twin: TwinDrafter, fails: int) -> None:
    """All drafts of the first passes fail, and hold from then on."""
    drafters, costs = (*TEXT_ONLY, twin), costs_of(1.0, 1.05, 1.2, twin=0.35)
    control, spent, tokens = DraftControl.start(drafters), 0.0, 0
    for number in range(20):
        index, drafts = plan_of(control, costs, [[-1], [0]], drafters)
        held = 0 if number < fails else drafts
        steps = {0: 1.0, 3: 1.05, 7: 1.2}[drafts] + 0.35 * drafts
        control = update(
            control, drafters, outcome(drafts, held, steps, right=False, confidence=[[-1], [0]], drafter=index)
        )
        spent, tokens = spent + steps, tokens + held + 1
    assert tokens / spent > 1.6


def test_a_row_without_drafts_says_nothing_of_several() -> None:
    control = DraftControl.start(TEXT_ONLY)
    for _ in range(20):  # all seven hold; the other row was not drafted for, and its first would have failed
        plan = Plan(jnp.int32(0), jnp.int32(7))
        held = jnp.asarray([7, 0])
        right = jnp.asarray([[True, False]])
        done = Round(plan, jnp.asarray([[3, 1]]), right, held, held, jnp.float32(4.5), jnp.float32(2.5))
        control = update(control, TEXT_ONLY, done)
    expected = expected_accepted(control, 7)
    assert expected[3] > 6.5
    assert control.first[1] < 0.1
    assert 0.0 < expected[1] < 0.3


def test_time_of_passes_and_drafts_counts_attention(twin: TwinDrafter) -> None:
    costs, drafters = costs_of(2.0, 3.0, 4.0, twin=0.5, attention=0.01), (*TEXT_ONLY, twin)

    def steps(drafter: int, drafts: int, filled: int) -> float:
        plan = Plan(jnp.int32(drafter), jnp.int32(drafts))
        return float(steps_of(costs, drafters, plan, jnp.int32(drafts + 1), jnp.int32(filled), most_slots=8))

    assert steps(1, 7, 0) == pytest.approx((4.0 + 7 * 0.5) / 2.0)
    assert steps(1, 7, 200) == pytest.approx((4.0 + 2.0 + 7 * (0.5 + 2.0)) / (2.0 + 2.0))
    assert steps(0, 3, 200) == pytest.approx((3.0 + 2.0) / (2.0 + 2.0)), "copies read no cache"
    assert steps(1, 0, 200) == 1.0

"""Chooses who drafts in each pass, and how many tokens: whatever makes the most tokens a second, or no drafts.

Verifying several tokens may cost more than running one, and some drafters run a model of their own, so these costs are
measured (`tide_jax.lossless.costs`). How often drafts are accepted is learned during generation. For drafters whose
drafts cost nothing it is learned without drafting, too: the token that is generated shows whether the first draft would
have been accepted.

Losses are bounded. Drafting starts with a credit of six steps, the price of two passes of seven 8-bit drafts that all
fail. Each pass pays its time, by these costs, and earns the time that its tokens take at full depth, and two percent
more. At most eight steps of credit are kept. Nothing is drafted while it is negative. In a batch, the mean row counts.

A pass that verifies K drafts gains ``first * (1 + later + ... + later**(K - 1))`` tokens on average, if the first draft
is accepted with probability `first` and each later one with probability `later`, given those before it. A row's drafts
come with a confidence, a small number, and each confidence of each drafter has a `first` and a `later` of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tide_jax.errors import TideError
from tide_jax.lossless.drafts import Drafter

MOST_DRAFTS = 7
"""Drafts in a full pass: one for each slot but the newest token's."""
_WIDTHS = (1, 4, 8)
"""Slots of a row that passes are compiled for. On a CPU, three tokens cost as much as four, and five as much as eight:
the weight product takes four or eight rows at once."""
_LEARNING_RATE = 0.15
_FADING = 0.005  # share by which estimates move back to the prior in each pass, so that failed drafts are retried
_WORTH_IT = 1.02  # least speed-up for drafting, above the error of the measured costs
_MAY_LOSE = 0.02  # share of the time at full depth that drafting may lose in the long run
_CREDIT_AT_FIRST, _MOST_CREDIT = 6.0, 8.0  # in steps


class PassCosts(NamedTuple):
    """Seconds of a pass of the full model, and of a draft.

    Attributes:
      passes: a pass without earlier tokens, for each of `verify_widths`.
      drafts: one draft of each row without earlier tokens, for each drafter; 0 for drafters that copy.
      attention: what each pass and each draft of a model takes more for each filled slot of the cache.
    """

    passes: Float[Array, " W"]
    drafts: Float[Array, " D"]
    attention: Float[Array, ""]


class DraftControl(NamedTuple):
    """Learned acceptance rates, a pytree that each generation passes on to the next.

    The entries are the confidences of the first drafter, then those of the second, and so on.

    Attributes:
      first: probability that the first draft is accepted.
      later: probability that a later draft is accepted, given those before it.
      credit: time that drafting may still lose, in steps at full depth.
    """

    first: Float[Array, " C"]
    later: Float[Array, " C"]
    credit: Float[Array, ""]

    @classmethod
    def start(cls, drafters: Sequence[Drafter]) -> DraftControl:
        """Prior estimates, with the initial credit. Raises TideError without drafters."""
        return _prior(drafters)._replace(credit=jnp.float32(_CREDIT_AT_FIRST))


class Plan(NamedTuple):
    """What the next pass does.

    Attributes:
      drafter: index of the drafter, int32; meaningless without drafts.
      drafts: most drafts of a row, int32; 0 for none.
    """

    drafter: Int[Array, ""]
    drafts: Int[Array, ""]


class Round(NamedTuple):
    """Outcome of one pass.

    Attributes:
      plan: the pass's drafter, and the drafts that it was to make.
      confidence: confidence of each drafter in a row's drafts, verified or not; -1 if it has none, or none worth
        verifying.
      right: whether each drafter's first draft is the token that was generated; read for drafters whose drafts cost
        nothing.
      drafted, accepted: verified and accepted drafts of each row.
      tokens: new tokens of a row, mean over the running rows.
      steps: time of the pass with its drafts, according to the measured costs, in steps at full depth.
    """

    plan: Plan
    confidence: Int[Array, "D B"]
    right: Bool[Array, "D B"]
    drafted: Int[Array, " B"]
    accepted: Int[Array, " B"]
    tokens: Float[Array, ""]
    steps: Float[Array, ""]


def verify_widths(most: int) -> tuple[int, ...]:
    """Slots of a row that passes are compiled for, ascending.

    >>> verify_widths(8), verify_widths(1), verify_widths(5)
    ((1, 4, 8), (1,), (1, 4, 5))
    """
    return (*(width for width in _WIDTHS if width < most), most)


def verify_index(slots: Int[Array, ""], most: int) -> Int[Array, ""]:
    """Index of the narrowest pass with at least `slots` slots."""
    return jnp.searchsorted(jnp.asarray(verify_widths(most), jnp.int32), slots).astype(jnp.int32)


def steps_of(
    costs: PassCosts,
    drafters: Sequence[Drafter],
    plan: Plan,
    slots: Int[Array, ""],
    filled: Int[Array, ""],
    *,
    most_slots: int,
) -> Float[Array, ""]:
    """Measured time of a pass over `slots` slots with the drafts of its plan, in steps at full depth.

    Args:
      filled: slots of the cache that are filled.
    """
    passes, drafts = _with_attention(costs, drafters, filled)
    seconds = passes[verify_index(slots, most_slots)] + drafts[plan.drafter] * plan.drafts.astype(jnp.float32)
    return seconds / passes[0]


def check_sizes(
    drafters: Sequence[Drafter], control: DraftControl, costs: PassCosts | None = None, *, most_slots: int
) -> None:
    """Raises TideError unless there are as many rates and costs as drafters and widths of passes need."""
    expected = (sum(len(drafter.rates) for drafter in drafters),)
    if control.first.shape != expected or control.later.shape != expected:
        raise TideError(
            f"control has rates of shape {control.first.shape}, and these drafters need {expected}: take "
            "DraftControl.start(drafters), or the control of a generation with the same drafters"
        )
    sizes = ((len(verify_widths(most_slots)),), (len(drafters),))
    if costs is not None and tuple(map(jnp.shape, costs)) != (*sizes, ()):
        found = ", ".join(f"{name} {jnp.shape(value)}" for name, value in costs._asdict().items())
        raise TideError(
            f"costs have the shapes {found}; expected {sizes[0]}, {sizes[1]} and (): call measure_pass_costs with "
            "these drafters and this most_slots"
        )


def choose_drafts(
    control: DraftControl,
    costs: PassCosts,
    drafters: Sequence[Drafter],
    confidence: Int[Array, "D B"],
    running: Bool[Array, " B"],
    filled: Int[Array, ""],
    *,
    most_slots: int,
) -> Plan:
    """The plan with the most expected tokens for its time: a drafter and a width of the pass, or no drafts.

    Args:
      control: learned acceptance rates.
      costs: measured seconds.
      drafters: the drafters of the control's rates.
      confidence: confidence of each drafter in each row's drafts, -1 for none.
      running: rows that have not ended.
      filled: slots of the cache that are filled.
      most_slots: slots of a row in the widest pass, the newest token's included.
    """
    widths = verify_widths(most_slots)
    plans = [(index, width - 1) for index in range(len(drafters)) for width in widths[1:]]
    if not plans:
        return Plan(jnp.int32(0), jnp.int32(0))
    rows = jnp.maximum(jnp.sum(running, dtype=jnp.int32), 1).astype(jnp.float32)
    entries, drafted = entries_of(drafters, confidence), running[None] & (confidence >= 0)
    pass_seconds, draft_seconds = _with_attention(costs, drafters, filled)

    def speed(index: int, drafts: int) -> Array:
        """Expected tokens of a row in the time of one step at full depth."""
        gained = expected_accepted(control, drafts)[entries[index]]
        gained = jnp.sum(jnp.where(drafted[index], gained, 0.0)) / rows
        seconds = pass_seconds[widths.index(drafts + 1)] + drafts * draft_seconds[index]
        return (1.0 + gained) * pass_seconds[0] / seconds

    speeds = jnp.stack([speed(*plan) for plan in plans])
    best = jnp.argmax(speeds)
    index, drafts = (jnp.asarray(column, jnp.int32)[best] for column in zip(*plans, strict=True))
    # Draft only if credit is left, and if the best plan beats a plain step.
    worth_it = (control.credit >= 0) & (speeds[best] > _WORTH_IT) & jnp.any(drafted[index])
    return Plan(index, jnp.where(worth_it, drafts, 0))


def _with_attention(
    costs: PassCosts, drafters: Sequence[Drafter], filled: Int[Array, ""]
) -> tuple[Float[Array, " W"], Float[Array, " D"]]:
    """Seconds of passes and drafts that read `filled` slots of the cache."""
    costs = PassCosts(*(jnp.asarray(seconds, jnp.float32) for seconds in costs))
    read = costs.attention * filled.astype(jnp.float32)
    runs = jnp.asarray([drafter.model is not None for drafter in drafters])
    return costs.passes + read[None], costs.drafts + jnp.where(runs, read[None], 0.0)


def expected_accepted(control: DraftControl, drafts: int) -> Float[Array, " C"]:
    """Expected accepted drafts of so many, by confidence."""
    return control.first * sum((control.later**n for n in range(1, drafts)), start=jnp.ones_like(control.later))


def update(control: DraftControl, drafters: Sequence[Drafter], done: Round) -> DraftControl:
    """Updates the acceptance rates and the credit with the outcome of one pass."""
    # Fade towards the prior. Without other evidence, a later draft is accepted as often as the first.
    prior = _prior(drafters)
    first = control.first + _FADING * (prior.first - control.first)
    later = control.later + _FADING * (control.first - control.later)
    # The first draft: known where drafts cost nothing, and where this drafter was chosen.
    entries, there = entries_of(drafters, done.confidence), done.confidence >= 0
    chosen = (jnp.arange(len(drafters), dtype=jnp.int32) == done.plan.drafter)[:, None] & (done.drafted > 0)[None]
    free = jnp.asarray([[drafter.model is None] for drafter in drafters])
    right = jnp.where(chosen, (done.accepted > 0)[None], done.right).astype(jnp.float32)
    first = _toward(first, entries, right, there & (free | chosen), jnp.full((1, 1), _LEARNING_RATE))
    # Later drafts: those up to the first that failed, or up to the last. Each is one observation.
    tried = jnp.minimum(done.drafted, done.accepted + 1) - 1
    share = jnp.maximum(done.accepted - 1, 0).astype(jnp.float32) / jnp.maximum(tried, 1).astype(jnp.float32)
    speed = 1.0 - (1.0 - _LEARNING_RATE) ** tried.astype(jnp.float32)
    several = there & chosen & ((done.accepted > 0) & (tried > 0))[None]
    later = _toward(later, entries, share[None], several, speed[None])
    # Gain the time that the new tokens would have taken at full depth, plus the allowed loss; pay for the pass.
    credit = control.credit + (1.0 + _MAY_LOSE) * done.tokens - done.steps
    return DraftControl(first, later, jnp.minimum(credit, _MOST_CREDIT))


def entries_of(drafters: Sequence[Drafter], confidence: Int[Array, "D B"]) -> Int[Array, "D B"]:
    """The entry of `DraftControl` for each drafter's confidence in each row's drafts; of -1, that of 0."""
    starts = [sum(len(drafter.rates) for drafter in drafters[:index]) for index in range(len(drafters))]
    return jnp.asarray(starts, jnp.int32)[:, None] + jnp.maximum(confidence, 0)


def _prior(drafters: Sequence[Drafter]) -> DraftControl:
    if not drafters:
        raise TideError("lossless generation needs a drafter: pass drafters=TEXT_ONLY or others")
    first, later = zip(*(rates for drafter in drafters for rates in drafter.rates), strict=True)
    return DraftControl(jnp.asarray(first, jnp.float32), jnp.asarray(later, jnp.float32), jnp.float32(0.0))


def _toward(
    known: Float[Array, " C"],
    entries: Int[Array, "D B"],
    seen: Float[Array, "#D B"],
    counted: Bool[Array, "D B"],
    speed: Float[Array, "1 #B"],
) -> Float[Array, " C"]:
    """Moves each entry towards the mean of `seen` over its counted rows, by their mean `speed`."""
    places = jnp.arange(known.shape[0], dtype=jnp.int32)[:, None, None]
    member = ((entries[None] == places) & counted[None]).astype(jnp.float32)
    number = jnp.maximum(jnp.sum(member, axis=(1, 2)), 1.0)
    mean, by = (jnp.sum(member * a[None], axis=(1, 2)) / number for a in (seen, speed))
    return known + by * jnp.where(jnp.any(member > 0, axis=(1, 2)), mean - known, 0.0)

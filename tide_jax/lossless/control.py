"""Chooses how many drafts to verify in each pass: the number with the highest expected tokens per second, or none.

Verifying several tokens may cost more than running one, so the cost of passes over one, two and all slots is measured
(`tide_jax.lossless.costs`). The acceptance rates of drafts are learned during generation. They are learned without
drafting, too: the token that is generated shows whether the first draft would have been accepted. Losses are bounded:
drafting stops when the total time exceeds that of full depth by more than one percent plus one or two steps.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MOST_DRAFTS = 7
"""Drafts in a full pass: one for each slot but the newest token's."""
_SHORTEST_MATCH = 2
_MATCH_EDGES = (3, 5, 8)
"""Acceptance is learned separately for matches of 2, 3 to 4, 5 to 7, and 8 or more tokens."""
_FIRST_ACCEPTED = (0.4, 0.5, 0.7, 0.85)
_MANY_ACCEPTED = (0.5, 1.0, 2.2, 4.5)
"""Prior expected number of accepted drafts, by length of match: of one draft, and of a full pass."""
_LEARNING_RATE = 0.15
_FADING = 0.005  # share by which estimates move back to the prior in each pass, so that failed drafts are retried
_WORTH_IT = 1.02  # least speed-up for drafting, above the error of the measured costs
_MAY_LOSE = 0.01
_CREDIT_AT_FIRST, _MOST_CREDIT = 1.5, 8.0


class PassCosts(NamedTuple):
    """Seconds of a pass by its width, the slots of a row: one, two, or the most (`tide_jax.exits.queue.pass_widths`).

    Attributes:
      layer: seconds of one layer.
      head: seconds of the output head.
    """

    layer: Float[Array, " W"]
    head: Float[Array, " W"]


class DraftControl(NamedTuple):
    """Learned acceptance rates, a pytree that each generation passes on to the next.

    Attributes:
      first: probability that the first draft is accepted, by length of match.
      many: expected accepted drafts of a full pass, by length of match.
      credit: time that drafting may still lose, in steps at full depth.
    """

    first: Float[Array, " M"]
    many: Float[Array, " M"]
    credit: Float[Array, ""]

    @classmethod
    def start(cls) -> DraftControl:
        """Prior estimates, with the initial credit."""
        return _prior()._replace(credit=jnp.float32(_CREDIT_AT_FIRST))


class Round(NamedTuple):
    """Outcome of one pass.

    Attributes:
      matched: length of match of each row's drafts, verified or not; 0 if there was nothing to draft.
      drafted: verified drafts of each row, int32.
      accepted: accepted drafts of each row. Without drafts: 1 if the first draft would have been accepted, which costs
        nothing to check.
      tokens: new tokens of a row, mean over the running rows.
      seconds: time of the pass, according to the measured costs.
    """

    matched: Int[Array, " B"]
    drafted: Int[Array, " B"]
    accepted: Int[Array, " B"]
    tokens: Float[Array, ""]
    seconds: Float[Array, ""]


def step_seconds(costs: PassCosts, num_layers: int) -> Float[Array, " W"]:
    """Seconds of a pass at full depth, by width."""
    return costs.layer * num_layers + costs.head


def choose_drafts(
    control: DraftControl,
    costs: PassCosts,
    num_layers: int,
    matched: Int[Array, " B"],
    running: Bool[Array, " B"],
    *,
    most: int,
) -> Int[Array, ""]:
    """Number of drafts to verify for each row in the next pass: 0, 1 or `most`.

    Args:
      control: learned acceptance rates.
      costs: measured seconds of a pass.
      num_layers: layers of the model.
      matched: length of match of each row's drafts.
      running: rows that have not ended.
      most: drafts in a full pass, beside the newest token.
    """
    seconds = step_seconds(costs, num_layers)
    drafted, bucket = running & (matched >= _SHORTEST_MATCH), _bucket(matched)
    rows = jnp.maximum(jnp.sum(running, dtype=jnp.int32), 1).astype(jnp.float32)

    def rate(expected: Float[Array, " M"], pass_seconds: Array) -> Array:
        """Expected tokens of a row in the time of one step at full depth."""
        gained = jnp.sum(jnp.where(drafted, expected[bucket], 0.0)) / rows
        return (1.0 + gained) * seconds[0] / pass_seconds

    # Compare one draft with a full pass, and draft only if credit is left and the better one beats a plain step.
    rates = jnp.stack([rate(control.first, seconds[min(1, len(seconds) - 1)]), rate(control.many, seconds[-1])])
    best = jnp.argmax(rates)
    worth_it = (control.credit >= 0) & jnp.any(drafted) & (rates[best] > _WORTH_IT)
    return jnp.where(worth_it, jnp.where(best == 0, min(1, most), most), 0).astype(jnp.int32)


def update(control: DraftControl, costs: PassCosts, num_layers: int, done: Round) -> DraftControl:
    """Updates the acceptance rates and the credit with the outcome of one pass."""
    one, most = step_seconds(costs, num_layers)[0], MOST_DRAFTS
    # Fade towards the prior. For full passes it is derived from `first`: each draft is as likely as the first.
    prior = _prior()._replace(many=_as_often(control.first), credit=control.credit)
    control = DraftControl(*(a + _FADING * (b - a) for a, b in zip(control, prior, strict=True)))
    # Learn from the rows with a match: `first` from all of them, `many` from those with several drafts.
    counted = done.matched >= _SHORTEST_MATCH
    untried, several = counted & (done.drafted == 0), counted & (done.drafted > 1)
    first = _toward(control.first, done.matched, jnp.minimum(done.accepted, 1), counted, _LEARNING_RATE)
    many = _toward(control.many, done.matched, done.accepted, several, _LEARNING_RATE)
    # Rows without drafts say nothing about `many`. Scale it with `first`, keeping the ratio learned so far.
    inferred = jnp.minimum(control.many * _as_often(first) / _as_often(control.first), float(most))
    many = _toward(many, done.matched, inferred[_bucket(done.matched)], untried, 1.0)
    # Gain the time that the new tokens would have taken at full depth, plus the allowed loss; pay for the pass.
    credit = control.credit + (1.0 + _MAY_LOSE) * done.tokens - done.seconds / one
    return DraftControl(first, many, jnp.minimum(credit, _MOST_CREDIT))


def _prior() -> DraftControl:
    return DraftControl(
        jnp.asarray(_FIRST_ACCEPTED, jnp.float32), jnp.asarray(_MANY_ACCEPTED, jnp.float32), credit=jnp.float32(0.0)
    )


def _as_often(first: Float[Array, " M"]) -> Float[Array, " M"]:
    """Expected accepted drafts of a full pass if each is accepted as often as the first, given those before it."""
    return sum((first**n for n in range(2, MOST_DRAFTS + 1)), start=first)


def _bucket(matched: Int[Array, " B"]) -> Int[Array, " B"]:
    return jnp.sum(matched[:, None] >= jnp.asarray(_MATCH_EDGES, jnp.int32)[None], axis=1, dtype=jnp.int32)


def _toward(
    known: Float[Array, " M"], matched: Int[Array, " B"], seen: Array, counted: Bool[Array, " B"], speed: float
) -> Float[Array, " M"]:
    """Moves the estimate of each length of match towards the mean of `seen` over the counted rows of that length."""
    member = (_bucket(matched)[:, None] == jnp.arange(known.shape[0], dtype=jnp.int32)[None]) & counted[:, None]
    number = jnp.sum(member.astype(jnp.float32), axis=0)
    mean = jnp.sum(jnp.where(member, seen[:, None].astype(jnp.float32), 0.0), axis=0) / jnp.maximum(number, 1.0)
    return jnp.where(number > 0, known + speed * (mean - known), known)

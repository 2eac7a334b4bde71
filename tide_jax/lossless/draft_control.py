"""Whether to draft, from where and how far: the choice that makes most tokens in the time that passes cost.

Verifying several tokens costs more than running one, on a CPU much more. So what a pass of one, two or all slots of the
queue costs is measured (`tide_jax.lossless.pass_costs`), how many drafts are accepted is learned as tokens are made,
with drafts or without (the token that is made tells whether the first draft would have held), and "no drafts" is a
choice like the others. Losses are bounded as well: drafts are only made while all that was spent so far is
within one percent, and a step or two, of what full depth would have spent.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tide_jax.model.cache import QUEUE_LENGTH

_SHORTEST_MATCH = 2
_MATCH_EDGES = (3, 5, 8)
"""Matches of 2, 3 to 4, 5 to 7, and 8 or more tokens are learned about apart."""
_FIRST_ACCEPTED = (0.4, 0.5, 0.7, 0.85)
_MANY_ACCEPTED = (0.5, 1.0, 2.2, 4.5)
"""What is expected of a draft before anything is known, by the length of its match."""
_LEARNING_RATE = 0.15
_FADING = 0.005  # so that what once failed is tried again
_WORTH_IT = 1.02  # a draft's gain over none has to exceed what the costs' measurement may err by
_MAY_LOSE = 0.01
_CREDIT_AT_FIRST, _MOST_CREDIT = 1.5, 8.0


class PassCosts(NamedTuple):
    """Seconds of a pass, by its slots a row: one, two, or all of the queue (`tide_jax.exits.recompute.pass_widths`).

    Attributes:
      layer: of one layer.
      head: of the output head.
      leaving: of the exit head and the second look of one token.
    """

    layer: Float[Array, " W"]
    head: Float[Array, " W"]
    leaving: Float[Array, ""]


class DraftControl(NamedTuple):
    """What has been learned, a pytree that generations hand on to each other.

    Attributes:
      first: chance that the first draft is accepted, by length of match.
      many: drafts accepted of as many as the queue holds, by length of match.
      exit_rate: tokens made with early-exit drafts in the time of one step at full depth.
      credit: steps at full depth that may still be lost.
    """

    first: Float[Array, " M"]
    many: Float[Array, " M"]
    exit_rate: Float[Array, ""]
    credit: Float[Array, ""]

    @classmethod
    def start(cls) -> DraftControl:
        """Before anything is known."""
        prior = _prior()
        return prior._replace(credit=jnp.float32(_CREDIT_AT_FIRST))


class Plan(NamedTuple):
    """The choice for one pass.

    Attributes:
      drafts: n-gram drafts of each row to verify, int32 scalar: 0, 1 or as many as the queue holds beside one.
      exits: whether tokens may leave early, and so draft the next.
    """

    drafts: Int[Array, ""]
    exits: Bool[Array, ""]


class Round(NamedTuple):
    """What happened between two verifications.

    Attributes:
      matched: length of match of each row's n-gram drafts, made or not; 0 where there were none to make, and where
        tokens left early.
      drafted: n-gram drafts of each row, int32.
      accepted: how many of them were accepted; where none was made, 1 if the first would have been. To see that costs
        nothing.
      exits: whether tokens left early.
      tokens: tokens a row has gained, on average over the rows that run.
      seconds: what its passes cost.
    """

    matched: Int[Array, " B"]
    drafted: Int[Array, " B"]
    accepted: Int[Array, " B"]
    exits: Bool[Array, ""]
    tokens: Float[Array, ""]
    seconds: Float[Array, ""]


def step_seconds(costs: PassCosts, num_layers: int) -> Float[Array, " W"]:
    """Seconds of a pass at full depth, by its width."""
    return costs.layer * num_layers + costs.head


def plan(
    control: DraftControl,
    costs: PassCosts,
    num_layers: int,
    matched: Int[Array, " B"],
    running: Bool[Array, " B"],
    *,
    most: int,
    waiting: Bool[Array, ""],
) -> Plan:
    """Chooses for the next pass.

    Args:
      matched: length of match of each row's n-gram drafts.
      running: rows that have not ended.
      most: drafts that the queue holds beside the newest token.
      waiting: tokens wait to be verified; then early-exit drafts go on, and no others begin.
    """
    seconds = step_seconds(costs, num_layers)
    drafted = running & (matched >= _SHORTEST_MATCH)
    bucket = _bucket(matched)
    rows = jnp.maximum(jnp.sum(running, dtype=jnp.int32), 1).astype(jnp.float32)

    def rate(expected: Float[Array, " M"], pass_seconds: Array) -> Array:
        gained = jnp.sum(jnp.where(drafted, expected[bucket], 0.0)) / rows
        return (1.0 + gained) * seconds[0] / pass_seconds

    rates = jnp.stack([rate(control.first, seconds[min(1, len(seconds) - 1)]), rate(control.many, seconds[-1])])
    afford = (control.credit >= 0) & ~waiting & jnp.any(drafted)
    best = jnp.argmax(rates)
    ngram = afford & (rates[best] > jnp.maximum(control.exit_rate, _WORTH_IT))
    drafts = jnp.where(ngram, jnp.where(best == 0, min(1, most), most), 0).astype(jnp.int32)
    exits = (control.credit >= 0) & (control.exit_rate > 1.0) & ~ngram
    return Plan(drafts, exits | waiting)


def learned(control: DraftControl, costs: PassCosts, num_layers: int, done: Round) -> DraftControl:
    """What is known after a round."""
    one = step_seconds(costs, num_layers)[0]
    # What is not seen is taken to be as likely as what is: that further drafts hold as often as the first.
    prior = _prior()._replace(many=_as_often(control.first))
    control = DraftControl(*(a + _FADING * (b - a) for a, b in zip(control, prior, strict=True)))._replace(
        credit=control.credit
    )
    counted = done.matched >= _SHORTEST_MATCH
    untried, several = counted & (done.drafted == 0), counted & (done.drafted > 1)
    rate = done.tokens * one / jnp.maximum(done.seconds, 1e-9)
    credit = control.credit + (1.0 + _MAY_LOSE) * done.tokens - done.seconds / one
    first = _toward(control.first, done.matched, jnp.minimum(done.accepted, 1), counted, _LEARNING_RATE)
    many = _toward(control.many, done.matched, done.accepted, several, _LEARNING_RATE)
    # Several drafts hold more or less often as the first does, by as much as they have shown.
    inferred = jnp.minimum(control.many * _as_often(first) / _as_often(control.first), QUEUE_LENGTH - 1.0)
    return DraftControl(
        first=first,
        many=_toward(many, done.matched, inferred[_bucket(done.matched)], untried, 1.0),
        exit_rate=jnp.where(
            done.exits, control.exit_rate + _LEARNING_RATE * (rate - control.exit_rate), control.exit_rate
        ),
        credit=jnp.minimum(credit, _MOST_CREDIT),
    )


def _prior() -> DraftControl:
    # Exits are given a try: that they save depth is what routers are for.
    return DraftControl(
        jnp.asarray(_FIRST_ACCEPTED, jnp.float32),
        jnp.asarray(_MANY_ACCEPTED, jnp.float32),
        exit_rate=jnp.float32(1.05),
        credit=jnp.float32(0.0),
    )


def _as_often(first: Float[Array, " M"]) -> Float[Array, " M"]:
    """Drafts of a full queue that hold if each does as often as the first."""
    return sum((first**n for n in range(2, QUEUE_LENGTH)), start=first)


def _bucket(matched: Int[Array, " B"]) -> Int[Array, " B"]:
    return jnp.sum(matched[:, None] >= jnp.asarray(_MATCH_EDGES, jnp.int32)[None], axis=1, dtype=jnp.int32)


def _toward(
    known: Float[Array, " M"], matched: Int[Array, " B"], seen: Array, counted: Bool[Array, " B"], speed: float
) -> Float[Array, " M"]:
    """Moves each length of match toward the mean of what the rows with such a match have shown."""
    member = (_bucket(matched)[:, None] == jnp.arange(known.shape[0], dtype=jnp.int32)[None]) & counted[:, None]
    number = jnp.sum(member.astype(jnp.float32), axis=0)
    mean = jnp.sum(jnp.where(member, seen[:, None].astype(jnp.float32), 0.0), axis=0) / jnp.maximum(number, 1.0)
    return jnp.where(number > 0, known + speed * (mean - known), known)

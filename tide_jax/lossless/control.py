"""How many drafts to verify: the number that makes most tokens in the time that a pass costs, none included.

Verifying several tokens may cost more than running one. So the cost of a pass of one, two or all slots is measured
(`tide_jax.lossless.costs`). How many drafts hold is learned while tokens are made, with drafts or without: the token
that is made tells whether the first draft would have held. Losses are bounded: drafts are made only while all that was
spent so far is within one percent, and a step or two, of what full depth would have spent.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MOST_DRAFTS = 7
"""Drafts of a full pass that is learned about; one for each slot but the newest token's."""
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
    """Seconds of a pass, by its slots a row: one, two, or the most (`tide_jax.exits.queue.pass_widths`).

    Attributes:
      layer: of one layer.
      head: of the output head.
    """

    layer: Float[Array, " W"]
    head: Float[Array, " W"]


class DraftControl(NamedTuple):
    """What has been learned, a pytree that generations hand on to each other.

    Attributes:
      first: chance that the first draft holds, by length of match.
      many: drafts that hold of a full pass, by length of match.
      credit: steps at full depth that may still be lost.
    """

    first: Float[Array, " M"]
    many: Float[Array, " M"]
    credit: Float[Array, ""]

    @classmethod
    def start(cls) -> DraftControl:
        """Before anything is known."""
        return _prior()._replace(credit=jnp.float32(_CREDIT_AT_FIRST))


class Round(NamedTuple):
    """What one pass came to.

    Attributes:
      matched: length of match of each row's drafts, made or not; 0 where there were none to make.
      drafted: drafts of each row, int32.
      accepted: how many of them held; where none was made, 1 if the first would have. To see that costs nothing.
      tokens: tokens a row has gained, on average over the rows that run.
      seconds: what the pass cost.
    """

    matched: Int[Array, " B"]
    drafted: Int[Array, " B"]
    accepted: Int[Array, " B"]
    tokens: Float[Array, ""]
    seconds: Float[Array, ""]


def step_seconds(costs: PassCosts, num_layers: int) -> Float[Array, " W"]:
    """Seconds of a pass at full depth, by its width."""
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
    """Drafts of each row to verify in the next pass: 0, 1 or `most`.

    Args:
      matched: length of match of each row's drafts.
      running: rows that have not ended.
      most: drafts that a full pass holds beside the newest token.
    """
    seconds = step_seconds(costs, num_layers)
    drafted, bucket = running & (matched >= _SHORTEST_MATCH), _bucket(matched)
    rows = jnp.maximum(jnp.sum(running, dtype=jnp.int32), 1).astype(jnp.float32)

    def rate(expected: Float[Array, " M"], pass_seconds: Array) -> Array:
        """Tokens made in the time of one step at full depth."""
        gained = jnp.sum(jnp.where(drafted, expected[bucket], 0.0)) / rows
        return (1.0 + gained) * seconds[0] / pass_seconds

    rates = jnp.stack([rate(control.first, seconds[min(1, len(seconds) - 1)]), rate(control.many, seconds[-1])])
    best = jnp.argmax(rates)
    worth_it = (control.credit >= 0) & jnp.any(drafted) & (rates[best] > _WORTH_IT)
    return jnp.where(worth_it, jnp.where(best == 0, min(1, most), most), 0).astype(jnp.int32)


def update(control: DraftControl, costs: PassCosts, num_layers: int, done: Round) -> DraftControl:
    """What is known after a pass."""
    one, most = step_seconds(costs, num_layers)[0], MOST_DRAFTS
    # What is not seen is taken to be as likely as what is: further drafts hold as often as the first.
    prior = _prior()._replace(many=_as_often(control.first), credit=control.credit)
    control = DraftControl(*(a + _FADING * (b - a) for a, b in zip(control, prior, strict=True)))
    counted = done.matched >= _SHORTEST_MATCH
    untried, several = counted & (done.drafted == 0), counted & (done.drafted > 1)
    first = _toward(control.first, done.matched, jnp.minimum(done.accepted, 1), counted, _LEARNING_RATE)
    many = _toward(control.many, done.matched, done.accepted, several, _LEARNING_RATE)
    # Several drafts hold more or less often as the first does, by as much as they have shown.
    inferred = jnp.minimum(control.many * _as_often(first) / _as_often(control.first), float(most))
    many = _toward(many, done.matched, inferred[_bucket(done.matched)], untried, 1.0)
    credit = control.credit + (1.0 + _MAY_LOSE) * done.tokens - done.seconds / one
    return DraftControl(first, many, jnp.minimum(credit, _MOST_CREDIT))


def _prior() -> DraftControl:
    return DraftControl(
        jnp.asarray(_FIRST_ACCEPTED, jnp.float32), jnp.asarray(_MANY_ACCEPTED, jnp.float32), credit=jnp.float32(0.0)
    )


def _as_often(first: Float[Array, " M"]) -> Float[Array, " M"]:
    """Drafts of a full pass that hold if each does as often as the first."""
    return sum((first**n for n in range(2, MOST_DRAFTS + 1)), start=first)


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

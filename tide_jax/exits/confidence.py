"""The second look: how likely it is that a token's exit gives the full model's answer.

A router sees only the hidden state. A better signal is the exit's own prediction: its largest logit compared with the
others (CALM, Schuster et al. 2022, arXiv:2207.07061, section 3.5). Over the whole vocabulary that costs as much as
several layers, over a few hundred frequent tokens (the candidates) little. So the decision has two stages. The router
screens all tokens. For those that pass, the exit head runs, the logits of the candidates are computed, and a small
network scores three features of these logits together with the router's score. The exit head's output is also the
exit's answer, so a token that exits pays for it once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.common import NormSettings, NormWeights
from pallas_kernels.exit_project import IMPLEMENTATIONS, AffineHead, exit_project
from pallas_kernels.exit_step import router_scores
from tide_jax.exits.router import Routers
from tide_jax.model.decoder import Decoder, HeadRows
from tide_jax.model.ops import likeliest
from tide_jax.model.sharding import on_mesh


class ExitAnswers(NamedTuple):
    """Scores and output states of tokens at one exit point.

    Attributes:
      scores: probability that exiting here is right, float32; the threshold applies to it. 0 for tokens that the
        router screened out.
      states: final-normed exit states, the input of the output head.
    """

    scores: Float[Array, "B T"]
    states: Float[Array, "B T D"]


def score_answers(
    model: Decoder,
    routers: Routers,
    exit_point: int,
    x: Float[Array, "B T D"],
    first: Float[Array, "B T"],
    *,
    passed: Bool[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> ExitAnswers:
    """Final scores and exit states of tokens with residual stream `x` and router score `first`.

    Args:
      exit_point: index of the exit point.
      passed: tokens that passed the router's screen; results of the others are undefined. Default: all.
      implementation: of the exit projection, see `pallas_kernels`.
    """
    passed = jnp.ones(first.shape, bool) if passed is None else passed
    states = _exit_states(model, routers, exit_point, x, passed, implementation)
    if routers.confidence is None or routers.candidates is None:
        return ExitAnswers(first, states)
    confidence = routers.confidence[exit_point]
    scores = jax.nn.sigmoid(confidence.logit(features(model, routers.candidates.rows, states, first)))
    return ExitAnswers(jnp.where(first > confidence.screens[0], scores, 0.0), states)


def _exit_states(
    model: Decoder,
    routers: Routers,
    exit_point: int,
    x: Float[Array, "B T D"],
    passed: Bool[Array, "B T"],
    implementation: str | None,
) -> Float[Array, "B T D"]:
    """Final-normed exit states of tokens that passed the screen."""
    if on_mesh():  # the modules gather the exit head's channels before the norm; the kernel doesn't
        return model.final_norm(routers.exit_state(exit_point, x, eps=model.config.norm_eps))
    config, norm, rows = model.config, model.final_norm, x.reshape(-1, x.shape[-1])
    learned = (getattr(norm, name, None) for name in ("scale", "bias"))
    states = exit_project(
        rows,
        None if routers.heads is None else AffineHead(*routers.heads[exit_point]),
        NormWeights(*(None if parameter is None else parameter[...] for parameter in learned)),
        passed.reshape(-1),
        jnp.zeros_like(rows),
        settings=NormSettings(config.norm_eps, config.norm if config.final_norm else "none", config.norm_unit_offset),
        implementation=IMPLEMENTATIONS.own(implementation),
    )
    return states.reshape(x.shape)


def exit_scores(model: Decoder, routers: Routers, exit_point: int, x: Float[Array, "N D"]) -> ExitAnswers:
    """Final scores ``[1, N]`` and exit states ``[1, N, D]`` of tokens, running router and second look."""
    first = router_scores(x, routers.routers[exit_point], eps=model.config.norm_eps)
    return score_answers(model, routers, exit_point, x[None], first[None])


def features(
    model: Decoder, candidates: HeadRows, states: Float[Array, "B T D"], first: Float[Array, "B T"]
) -> Float[Array, "B T 4"]:
    """Input of the second look's network.

    The four features: the router's log odds, the log probability of the best candidate, its lead over the second best
    in logits, and the log of the softmax normaliser.
    """
    logits = model.logits(states, candidates)
    # The largest logit, and the largest of the others.
    best = jnp.max(logits, axis=-1)
    at = likeliest(logits)
    others = jnp.where(jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None, :] == at[:, :, None], -jnp.inf, logits)
    second, total = jnp.max(others, axis=-1), jax.nn.logsumexp(logits, axis=-1)
    odds = jnp.clip(first, 1e-6, 1 - 1e-6)
    return jnp.stack([jnp.log(odds) - jnp.log1p(-odds), best - total, best - second, total], axis=-1)

"""The second look: how sure the model would be of its answer if a token left now.

A router sees the hidden state alone. What best tells whether an exit is right is the answer itself: the largest logit
against the others (CALM, Schuster et al. 2022, arXiv:2207.07061, section 3.5). Over the whole vocabulary that costs as
much as several layers, over a few thousand frequent tokens little. So the router screens, and for the tokens it lets
pass the exit head runs, logits of the candidates are taken, and a small network decides from three figures of theirs
and the router's score. The head's output is the exit's own: tokens that leave pay for it once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.exit_step.reference import router_scores
from tide_jax.decoder import Decoder, HeadRows
from tide_jax.router import Routers


class ExitAnswers(NamedTuple):
    """What tokens would answer if they left at a checkpoint.

    Attributes:
      scores: probability that leaving is right, as the threshold sees it, float32; 0 for those screened out.
      states: final-normed states, what the output head reads.
    """

    scores: Float[Array, "B T"]
    states: Float[Array, "B T D"]


def second_look(
    model: Decoder, routers: Routers, checkpoint: int, x: Float[Array, "B T D"], first: Float[Array, "B T"]
) -> ExitAnswers:
    """Exit states and final scores of tokens with state `x` and router score `first`."""
    states = model.final_norm(routers.exit_state(checkpoint, x, eps=model.config.norm_eps))
    if routers.confidence is None or routers.candidates is None:
        return ExitAnswers(first, states)
    confidence = routers.confidence[checkpoint]
    scores = jax.nn.sigmoid(confidence.logit(features(model, routers.candidates.rows, states, first)))
    return ExitAnswers(jnp.where(first > confidence.screens[0], scores, 0.0), states)


def exit_scores(model: Decoder, routers: Routers, checkpoint: int, x: Float[Array, "N D"]) -> ExitAnswers:
    """Final scores ``[1, N]`` and exit states ``[1, N, D]`` of rows, router included."""
    first = router_scores(x, *routers.routers[checkpoint], eps=model.config.norm_eps)
    return second_look(model, routers, checkpoint, x[None], first[None])


def features(
    model: Decoder, candidates: HeadRows, states: Float[Array, "B T D"], first: Float[Array, "B T"]
) -> Float[Array, "B T 4"]:
    """The router's log odds, the log probability of the best candidate, its lead over the second, and the log of the
    normaliser."""
    logits = model.logits(states, candidates)
    best = jnp.max(logits, axis=-1)
    at = jnp.argmax(logits, axis=-1)
    others = jnp.where(jnp.arange(logits.shape[-1])[None, None, :] == at[:, :, None], -jnp.inf, logits)
    second, total = jnp.max(others, axis=-1), jax.nn.logsumexp(logits, axis=-1)
    odds = jnp.clip(first, 1e-6, 1 - 1e-6)
    return jnp.stack([jnp.log(odds) - jnp.log1p(-odds), best - total, best - second, total], axis=-1)

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
from jaxtyping import Array, Bool, Float

from pallas_kernels.exit_project import IMPLEMENTATIONS, AffineHead, FinalNorm, exit_project
from pallas_kernels.exit_step.reference import router_scores
from tide_jax.exits.router import Routers
from tide_jax.model.decoder import Decoder, HeadRows
from tide_jax.model.ops import likeliest
from tide_jax.model.sharding import on_mesh


class ExitAnswers(NamedTuple):
    """What tokens would answer if they left at a checkpoint.

    Attributes:
      scores: probability that leaving is right, as the threshold sees it, float32; 0 for those screened out.
      states: final-normed states, what the output head reads.
    """

    scores: Float[Array, "B T"]
    states: Float[Array, "B T D"]


def second_look(
    model: Decoder,
    routers: Routers,
    checkpoint: int,
    x: Float[Array, "B T D"],
    first: Float[Array, "B T"],
    *,
    passed: Bool[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> ExitAnswers:
    """Exit states and final scores of tokens with state `x` and router score `first`.

    Args:
      passed: tokens that the router let pass; what the answers are for the others does not matter. All when omitted.
      implementation: of the exit projection, see `pallas_kernels`.
    """
    passed = jnp.ones(first.shape, bool) if passed is None else passed
    states = _exit_states(model, routers, checkpoint, x, passed, implementation)
    if routers.confidence is None or routers.candidates is None:
        return ExitAnswers(first, states)
    confidence = routers.confidence[checkpoint]
    scores = jax.nn.sigmoid(confidence.logit(features(model, routers.candidates.rows, states, first)))
    return ExitAnswers(jnp.where(first > confidence.screens[0], scores, 0.0), states)


def _exit_states(
    model: Decoder,
    routers: Routers,
    checkpoint: int,
    x: Float[Array, "B T D"],
    passed: Bool[Array, "B T"],
    implementation: str | None,
) -> Float[Array, "B T D"]:
    """Final-normed exit states of the tokens that passed."""
    if on_mesh():  # the modules say how a head's channels are put together again before the norm
        return model.final_norm(routers.exit_state(checkpoint, x, eps=model.config.norm_eps))
    config, norm, rows = model.config, model.final_norm, x.reshape(-1, x.shape[-1])
    learned = (getattr(norm, name, None) for name in ("scale", "bias"))
    states = exit_project(
        rows,
        None if routers.heads is None else AffineHead(*routers.heads[checkpoint]),
        FinalNorm(*(None if parameter is None else parameter[...] for parameter in learned)),
        passed.reshape(-1),
        jnp.zeros_like(rows),
        eps=config.norm_eps,
        norm=config.norm if config.final_norm else "none",
        unit_offset=config.norm_unit_offset,
        implementation=IMPLEMENTATIONS.own(implementation),
    )
    return states.reshape(x.shape)


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
    at = likeliest(logits)
    others = jnp.where(jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None, :] == at[:, :, None], -jnp.inf, logits)
    second, total = jnp.max(others, axis=-1), jax.nn.logsumexp(logits, axis=-1)
    odds = jnp.clip(first, 1e-6, 1 - 1e-6)
    return jnp.stack([jnp.log(odds) - jnp.log1p(-odds), best - total, best - second, total], axis=-1)

"""The exit decision: which tokens exit after a group, and with what output state. `tide_jax.exits.walk` calls it.

The per-token decision by a learned router follows TIDE (2026).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.exit_step import ExitRows, Gate, exit_step
from tide_jax.exits.confidence import score_answers
from tide_jax.exits.exits import Exits
from tide_jax.model.decoder import Decoder


class TokenState(NamedTuple):
    """State of the S slots in a walk over the layers.

    The last T slots are the new tokens, which may exit. With a queue, the S - T slots before them wait for layers.

    Attributes:
      x: residual stream of the slots, with what it carries. "propagate" freezes it at the exit state once a token
        exits.
      states: final-normed exit states, zero until the token exits.
      code: exit state projected by `Translators.code`, the input of the translators; None without translators.
      active: tokens that have not exited.
      exit_layers: index of the last layer each token ran; -1 before the first layer.
    """

    x: Float[Array, "B S C"]
    states: Float[Array, "B T D"]
    code: Float[Array, "B T R"] | None
    active: Bool[Array, "B T"]
    exit_layers: Int[Array, "B T"]

    @property
    def newest(self) -> Float[Array, "B T D"]:
        """Residual stream of the new tokens, without what it carries."""
        return self.x[:, self.x.shape[1] - self.active.shape[1] :, : self.states.shape[2]]

    @classmethod
    def start(
        cls, model: Decoder, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], code_size: int | None = None
    ) -> TokenState:
        """Embedded tokens before the first layer; those at position -1 are padding and not active."""
        x = model.embed_tokens(tokens, positions)
        return cls(
            x=x,
            states=jnp.zeros_like(model.residual(x)),
            code=None if code_size is None else jnp.zeros((*positions.shape, code_size), x.dtype),
            active=positions >= 0,
            exit_layers=jnp.full(positions.shape, -1, jnp.int32),
        )


def decide(
    model: Decoder, exits: Exits, exit_point: int, state: TokenState, may_exit: Bool[Array, "B T"]
) -> TokenState:
    """Lets tokens exit at an exit point: records the layer they ran and computes their output states.

    Args:
      exit_point: index of the exit point, which all active tokens have just run.
    """
    # Stage 1: score the active tokens with the router. With a second look, its screen is the threshold.
    shape, x = state.active.shape, state.newest
    looks, threshold = exits.routers.confidence, exits.thresholds[exit_point]
    screen = threshold if looks is None else looks[exit_point].screen(threshold)
    step = exit_step(
        x.reshape(-1, x.shape[-1]),
        exits.routers.routers[exit_point],
        Gate(screen, exits.routers.exit_points[exit_point], exits.min_layers),
        ExitRows(*(a.reshape(-1) for a in (state.active, may_exit, state.exit_layers))),
        eps=model.config.norm_eps,
        implementation=exits.implementation,
    )
    passed, first = step.exits.reshape(shape), step.scores.reshape(shape)
    state = state._replace(exit_layers=step.exit_layers.reshape(shape))

    def exit_some(state: TokenState) -> TokenState:
        # Stage 2: score the tokens that passed; those above the threshold keep their output state and stop.
        answers = score_answers(
            model, exits.routers, exit_point, x, first, passed=passed, implementation=exits.implementation
        )
        exiting = passed & (answers.scores > threshold)
        leaving = exiting[:, :, None]
        state = state._replace(states=jnp.where(leaving, answers.states, state.states))
        state = state._replace(active=state.active & ~exiting)
        if state.code is None or exits.routers.translators is None:
            return state
        code = exits.routers.translators.code(exit_point, x, eps=model.config.norm_eps)
        return state._replace(code=jnp.where(leaving, code, state.code))

    # Skip stage 2 if no token passed.
    return lax.cond(step.any_exits, exit_some, lambda state: state, state)


def exit_input(model: Decoder, exits: Exits | None, layer: int, state: TokenState) -> Float[Array, "B S C"]:
    """Input of `layer` for tokens that already exited: their exit state, translated to the layer."""
    translators = None if exits is None else exits.routers.translators
    if exits is None or translators is None or state.code is None:
        return state.x
    number = jnp.searchsorted(jnp.asarray(exits.routers.exit_points, jnp.int32), state.exit_layers)
    own = translators.translate(layer, model.residual(state.x), state.code, number, eps=model.config.norm_eps)
    carried = state.x[..., own.shape[-1] :]
    return jnp.concatenate([own, carried], axis=-1) if carried.shape[-1] else own


def finish_group(
    model: Decoder,
    groups: tuple[range, ...],
    group: int,
    state: TokenState,
    exits: Exits | None,
    may_exit: Bool[Array, "B T"] | None,
) -> TokenState:
    """Ends a group for the active tokens: the exit decision after it, or the final norm after the last group."""
    last = group == len(groups) - 1
    if exits is not None and may_exit is not None and not last:
        return decide(model, exits, group, state, may_exit)
    ran = jnp.int32(groups[group].stop - 1)
    state = state._replace(exit_layers=jnp.where(state.active, ran, state.exit_layers))
    if not last:
        return state
    out = model.final_norm(state.newest)
    if exits is not None:
        out = jnp.where(state.active[:, :, None], out, state.states)
    return state._replace(states=out, active=jnp.zeros_like(state.active))

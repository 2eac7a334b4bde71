"""One optimiser step, shared by all fits by gradient descent."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import jax
import optax

Parameters = TypeVar("Parameters")


def apply_gradients(
    optimiser: optax.GradientTransformation, gradients: Any, state: optax.OptState, parameters: Parameters
) -> tuple[Parameters, optax.OptState]:
    """Applies gradients; returns new parameters of the same structure and the optimiser's new state."""
    # optax relies on implicit promotion, so a caller's strict mode must not apply to it.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, state = optimiser.update(gradients, state, cast(Any, parameters))
        return cast(Parameters, optax.apply_updates(cast(Any, parameters), updates)), state

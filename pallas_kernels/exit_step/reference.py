"""Plain-JAX exit step: the definition every other implementation is tested against."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


class ExitStep(NamedTuple):
    """Result of an exit step.

    Attributes:
      scores: router scores in [0, 1], float32 [N].
      exits: rows that leave now, bool [N].
    """

    scores: Float[Array, " N"]
    exits: Bool[Array, " N"]


def rms_normalise(x: Float[Array, "N D"], eps: float) -> Float[Array, "N D"]:
    """RMSNorm without a gain, in float32 (a gain would fold into the next matrix)."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def router_scores(
    x: Float[Array, "N D"],
    down: Float[Array, "D H"],
    down_bias: Float[Array, " H"],
    up: Float[Array, " H"],
    up_bias: Float[Array, ""],
    *,
    eps: float,
) -> Float[Array, " N"]:
    """``sigmoid(up . silu(down^T norm(x) + down_bias) + up_bias)``, all in float32."""
    hidden = jnp.dot(rms_normalise(x, eps), down.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    hidden = jax.nn.silu(hidden + down_bias.astype(jnp.float32)[None, :])
    logit = jnp.dot(hidden, up.astype(jnp.float32), precision=lax.Precision.HIGHEST) + up_bias.astype(jnp.float32)
    return jax.nn.sigmoid(logit)


def exit_step(
    x: Float[Array, "N D"],
    down: Float[Array, "D H"],
    down_bias: Float[Array, " H"],
    up: Float[Array, " H"],
    up_bias: Float[Array, ""],
    threshold: Float[Array, ""],
    candidates: Bool[Array, " N"],
    *,
    eps: float,
) -> ExitStep:
    """Candidates whose router score exceeds the threshold exit."""
    scores = router_scores(x, down, down_bias, up, up_bias, eps=eps)
    return ExitStep(scores, candidates & (scores > threshold))

"""Plain-JAX exit step: the definition that all other implementations are tested against."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

NormKind = Literal["rms", "layer"]


class ExitRows(NamedTuple):
    """State of the rows before an exit step.

    Attributes:
      active: rows that have not exited.
      may_exit: rows that are allowed to exit early.
      exit_layers: index, from 0, of the last layer that each row ran, int32.
    """

    active: Bool[Array, " N"]
    may_exit: Bool[Array, " N"]
    exit_layers: Int[Array, " N"]


class ExitStep(NamedTuple):
    """Result of an exit step.

    Attributes:
      scores: router scores in [0, 1], float32.
      exits: rows that exit now.
      active: rows that continue.
      exit_layers: the last layer that each row ran, int32; this layer for all rows that were active.
      any_exits, any_active: whether there are such rows.
    """

    scores: Float[Array, " N"]
    exits: Bool[Array, " N"]
    active: Bool[Array, " N"]
    exit_layers: Int[Array, " N"]
    any_exits: Bool[Array, ""]
    any_active: Bool[Array, ""]


def rms_normalise(x: Float[Array, "N D"], eps: float) -> Float[Array, "N D"]:
    """RMSNorm without a gain, in float32 (the gain is folded into the next matrix)."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def normalise(x: Float[Array, "N D"], norm: NormKind, eps: float) -> Float[Array, "N D"]:
    """RMSNorm or LayerNorm without gain and bias, in float32."""
    if norm == "layer":
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    return rms_normalise(x, eps)


def router_scores(
    x: Float[Array, "N D"],
    down: Float[Array, "D H"],
    down_bias: Float[Array, " H"],
    up: Float[Array, " H"],
    up_bias: Float[Array, ""],
    *,
    eps: float,
    norm: NormKind = "rms",
) -> Float[Array, " N"]:
    """``sigmoid(up . silu(down^T norm(x) + down_bias) + up_bias)``, all in float32."""
    hidden = jnp.dot(normalise(x, norm, eps), down.astype(jnp.float32), precision=lax.Precision.HIGHEST)
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
    rows: ExitRows,
    *,
    layer: int,
    min_layers: Int[Array, ""],
    eps: float,
    norm: NormKind = "rms",
) -> ExitStep:
    """Active rows exit if they may, have run `min_layers` layers and score above the threshold."""
    scores = router_scores(x, down, down_bias, up, up_bias, eps=eps, norm=norm)
    return decide(scores, threshold, rows, layer=layer, min_layers=min_layers)


def decide(
    scores: Float[Array, " N"], threshold: Float[Array, ""], rows: ExitRows, *, layer: int, min_layers: Int[Array, ""]
) -> ExitStep:
    """The exit decisions that follow from the scores."""
    candidates = rows.active & rows.may_exit & (jnp.int32(layer + 1) >= min_layers)
    exits = candidates & (scores > threshold)
    active = rows.active & ~exits
    exit_layers = jnp.where(rows.active, jnp.int32(layer), rows.exit_layers)
    return ExitStep(scores, exits, active, exit_layers, jnp.any(exits), jnp.any(active))

"""Plain-JAX exit step: the definition that all other implementations are tested against."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.common import NormKind, normalise


class Router(NamedTuple):
    """Router of one exit point. It scores a row x: ``sigmoid(up . silu(down^T norm(x) + down_bias) + up_bias)``."""

    down: Float[Array, "D H"]
    down_bias: Float[Array, " H"]
    up: Float[Array, " H"]
    up_bias: Float[Array, ""]


class Gate(NamedTuple):
    """What an active row that may exit must pass to exit.

    Attributes:
      threshold: the score must be above this, float32 scalar.
      layer: index, from 0, of the layer that active rows have just run.
      min_layers: the number of layers that every row runs, int32 scalar.
    """

    threshold: Float[Array, ""]
    layer: int | Int[Array, ""]
    min_layers: Int[Array, ""]


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


def router_scores(x: Float[Array, "N D"], router: Router, *, eps: float, norm: NormKind = "rms") -> Float[Array, " N"]:
    """``sigmoid(up . silu(down^T norm(x) + down_bias) + up_bias)``, all in float32."""
    down, down_bias, up, up_bias = (a.astype(jnp.float32) for a in router)
    hidden = jax.nn.silu(jnp.dot(normalise(x, norm, eps), down, precision=lax.Precision.HIGHEST) + down_bias[None, :])
    return jax.nn.sigmoid(jnp.dot(hidden, up, precision=lax.Precision.HIGHEST) + up_bias)


def exit_step(
    x: Float[Array, "N D"],
    router: Router,
    gate: Gate,
    rows: ExitRows,
    *,
    eps: float,
    norm: NormKind = "rms",
) -> ExitStep:
    """Active rows exit if they may, have run `Gate.min_layers` layers and score above the threshold."""
    return decide(router_scores(x, router, eps=eps, norm=norm), gate, rows)


def decide(scores: Float[Array, " N"], gate: Gate, rows: ExitRows) -> ExitStep:
    """The exit decisions that follow from the scores."""
    candidates = rows.active & rows.may_exit & (jnp.int32(gate.layer + 1) >= gate.min_layers)
    exits = candidates & (scores > gate.threshold)
    active = rows.active & ~exits
    exit_layers = jnp.where(rows.active, jnp.int32(gate.layer), rows.exit_layers)
    return ExitStep(scores, exits, active, exit_layers, jnp.any(exits), jnp.any(active))

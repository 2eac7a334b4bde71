"""The exit decision: which rows exit the decoder at this exit point."""

from __future__ import annotations

import functools

from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.common import NormKind
from pallas_kernels.exit_step.plan import Problem
from pallas_kernels.exit_step.reference import ExitRows, ExitStep, Gate, Router, router_scores
from pallas_kernels.selection import Choices

__all__ = ["IMPLEMENTATIONS", "ExitRows", "ExitStep", "Gate", "Router", "exit_step", "router_scores"]

IMPLEMENTATIONS = Choices(
    "exit_step",
    ("reference", "pallas_triton", "pallas_interpret", "triton", "mosaic_gpu"),
    ("pallas_triton", "triton", "mosaic_gpu"),
)
"""Plain JAX; a Pallas kernel; the same kernel run by XLA, for tests; one in Triton's own language; one for Hopper."""


def exit_step(
    x: Float[Array, "N D"],
    router: Router,
    gate: Gate,
    rows: ExitRows,
    *,
    eps: float,
    norm: NormKind = "rms",
    implementation: str | None = None,
) -> ExitStep:
    """Scores rows with a router and decides which of them exit after this layer.

    Args:
      x: hidden states, any float dtype; kernels take float32, float16 and bfloat16.
      router: the weights that score a row, any float dtype.
      gate: what a row must pass to exit.
      rows: which rows are active, which may exit, and the last layer that each ran.
      eps: added to the mean square (or variance) before the root.
      norm: "rms" or "layer", without gain and bias: those are folded into the router's `down` and `down_bias`.
      implementation: a name from `IMPLEMENTATIONS`; None chooses by platform, see `Choices.choose`.

    Raises:
      ValueError: the named implementation can't run here; the message has the reason.
    """
    refusal = functools.partial(_refusal, Problem.of(x, router, norm))
    function = IMPLEMENTATIONS.function(IMPLEMENTATIONS.choose(implementation, refusal, x.shape[0]))
    return function(x, router, gate, rows, eps=eps, norm=norm)


def _refusal(problem: Problem, name: str) -> str | None:
    return problem.mosaic_refusal(gpu.current().architecture) if name == "mosaic_gpu" else problem.refusal()

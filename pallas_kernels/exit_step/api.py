"""Entry point of the exit step: picks an implementation, or raises with the reason it can't run."""

from __future__ import annotations

import functools
from collections.abc import Callable

from jaxtyping import Array, Float, Int

from pallas_kernels import gpu
from pallas_kernels.exit_step import reference
from pallas_kernels.exit_step.reference import ExitRows, ExitStep, NormKind
from pallas_kernels.exit_step.shapes import Problem
from pallas_kernels.selection import Choices

IMPLEMENTATIONS = Choices(
    "exit_step",
    ("reference", "pallas_triton", "pallas_interpret", "triton", "mosaic_gpu"),
    ("pallas_triton", "triton", "mosaic_gpu"),
)
"""Plain JAX; a Pallas kernel; the same kernel run by XLA, for tests; one in Triton's own language; one for Hopper."""


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
    implementation: str | None = None,
) -> ExitStep:
    """Scores rows with a router and decides which of them exit after this layer.

    Args:
      x: hidden states, any float dtype; kernels take float32, float16 and bfloat16.
      down, down_bias, up, up_bias: the router's weights, any float dtype.
      threshold: a row exits if its score is above this, float32 scalar.
      rows: which rows are active, which may exit, and the last layer that each ran.
      layer: index, from 0, of the layer that active rows have just run.
      min_layers: number of layers that every row runs, int32 scalar.
      eps: added to the mean square (or variance) before the root.
      norm: "rms" or "layer", without gain and bias: those are folded into `down` and `down_bias`.
      implementation: a name from `IMPLEMENTATIONS`. None chooses the reference, except on a GPU with proven kernels
        (`Choices.proven`): there it chooses the first one that can be imported and takes these shapes, or else the
        reference, with a warning in the log.

    Raises:
      ValueError: the named implementation can't run here; the message has the reason.
    """
    name = IMPLEMENTATIONS.choose(implementation, functools.partial(_misfit, Problem.of(x, down, norm)))
    return _function(name)(
        x, down, down_bias, up, up_bias, threshold, rows, layer=layer, min_layers=min_layers, eps=eps, norm=norm
    )


def _misfit(problem: Problem, name: str) -> str | None:
    return problem.mosaic_misfit(gpu.current().architecture) if name == "mosaic_gpu" else problem.misfit()


def _function(name: str) -> Callable[..., ExitStep]:
    """Imports only the module that the implementation needs."""
    if name == "reference":
        return reference.exit_step
    if name == "mosaic_gpu":
        from pallas_kernels.exit_step import mosaic_gpu

        return mosaic_gpu.exit_step
    if name == "triton":
        from pallas_kernels.exit_step import triton

        return triton.exit_step
    from pallas_kernels.exit_step import pallas_triton

    return functools.partial(pallas_triton.exit_step, interpret=name == "pallas_interpret")

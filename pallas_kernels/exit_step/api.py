"""Entry point of the exit step: picks an implementation, or raises with the reason it can't run."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from pallas_kernels.exit_step import reference
from pallas_kernels.exit_step.reference import ExitStep

IMPLEMENTATIONS = {"reference": reference.exit_step}
"""Implementation by name. ``None`` picks the fastest that runs on the platform."""


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
    implementation: str | None = None,
) -> ExitStep:
    """Scores rows with a router and decides which candidates exit.

    Args:
      x: hidden states, any float dtype.
      down, down_bias, up, up_bias: the router's weights.
      threshold: a row exits when its score exceeds it, float32 scalar.
      candidates: rows that may exit.
      eps: added to the mean square before the root.
      implementation: a name from `IMPLEMENTATIONS`, or None to choose.

    Raises:
      ValueError: `implementation` is not available, with those that are.
    """
    name = implementation or "reference"
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"exit_step has no implementation {name!r}; choose one of {', '.join(sorted(IMPLEMENTATIONS))}"
        )
    return IMPLEMENTATIONS[name](x, down, down_bias, up, up_bias, threshold, candidates, eps=eps)

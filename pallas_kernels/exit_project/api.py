"""Entry point of the exit projection: picks an implementation, or raises with the reason it can't run."""

from __future__ import annotations

import functools
from collections.abc import Callable

from jaxtyping import Array, Bool, Float

from pallas_kernels.exit_project import reference
from pallas_kernels.exit_project.reference import AffineHead, FinalNorm, FinalNormKind
from pallas_kernels.exit_project.shapes import misfit
from pallas_kernels.selection import Choices

IMPLEMENTATIONS = Choices(
    "exit_project", ("reference", "pallas_triton", "pallas_interpret", "triton"), ("pallas_triton", "triton")
)
"""Plain JAX; a Pallas kernel, and the same run by XLA on any platform, for tests; its twin in Triton's own language."""


def exit_project(
    x: Float[Array, "N D"],
    head: AffineHead | None,
    final_norm: FinalNorm,
    exits: Bool[Array, " N"],
    out: Float[Array, "N D"],
    *,
    eps: float,
    norm: FinalNormKind = "rms",
    unit_offset: bool = False,
    implementation: str | None = None,
) -> Float[Array, "N D"]:
    """Writes the final-normed exit states of the rows that exit into `out`; the other rows stay as they are.

    Args:
      x: hidden states, any float dtype; the kernel takes float32, float16 and bfloat16.
      head: affine exit head; None for the identity.
      final_norm: parameters of the norm before the output head, any float dtype.
      exits: rows to write.
      out: the buffer; donate it where its old values are not needed.
      eps: added to mean squares (or the variance) before the root.
      norm: kind of the final norm; "none" where the model has none.
      unit_offset: whether the gain is ``1 + scale``.
      implementation: a name from `IMPLEMENTATIONS`; None takes the reference and, once a GPU has found the
        kernels right (`Choices.proven`), on a GPU the first that can be imported and takes these shapes; without one,
        the reference, with a warning in the log.

    Returns:
      Rows of out's dtype.

    Raises:
      ValueError: the implementation that was named can't run here, with the reason.
    """
    name = IMPLEMENTATIONS.choose(implementation, lambda _: misfit(x, out))
    return _function(name)(x, head, final_norm, exits, out, eps=eps, norm=norm, unit_offset=unit_offset)


def _function(name: str) -> Callable[..., Float[Array, "N D"]]:
    """Imports what an implementation needs, and only that."""
    if name == "reference":
        return reference.exit_project
    if name == "triton":
        from pallas_kernels.exit_project import triton

        return triton.exit_project
    from pallas_kernels.exit_project import pallas_triton

    return functools.partial(pallas_triton.exit_project, interpret=name == "pallas_interpret")

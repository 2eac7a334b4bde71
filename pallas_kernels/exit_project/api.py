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
"""Plain JAX; a Pallas kernel; the same kernel run by XLA anywhere, for tests; a kernel in Triton's own language."""


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
    """Writes the exit states of exiting rows into `out`, after the final norm; other rows stay unchanged.

    Args:
      x: hidden states, any float dtype; the kernel takes float32, float16 and bfloat16.
      head: affine exit head; None for the identity.
      final_norm: parameters of the norm before the output head, any float dtype.
      exits: rows to write.
      out: the buffer; donate it if its old values are not needed.
      eps: added to the mean square (or the variance) before the root.
      norm: kind of the final norm; "none" if the model has none.
      unit_offset: whether the gain is ``1 + scale``.
      implementation: a name from `IMPLEMENTATIONS`. None chooses the reference, except on a GPU with proven kernels
        (`Choices.proven`): there it chooses the first one that can be imported and takes these shapes, or else the
        reference, with a warning in the log.

    Returns:
      Rows in out's dtype.

    Raises:
      ValueError: the named implementation can't run here; the message has the reason.
    """
    name = IMPLEMENTATIONS.choose(implementation, lambda _: misfit(x, out))
    return _function(name)(x, head, final_norm, exits, out, eps=eps, norm=norm, unit_offset=unit_offset)


def _function(name: str) -> Callable[..., Float[Array, "N D"]]:
    """Imports only the module that the implementation needs."""
    if name == "reference":
        return reference.exit_project
    if name == "triton":
        from pallas_kernels.exit_project import triton

        return triton.exit_project
    from pallas_kernels.exit_project import pallas_triton

    return functools.partial(pallas_triton.exit_project, interpret=name == "pallas_interpret")

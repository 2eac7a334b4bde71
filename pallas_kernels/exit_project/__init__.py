"""Exit head and final norm of exiting rows, written into the buffer of output states."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from pallas_kernels.common import DTYPES, MAX_ELEMENTS, NormSettings, NormWeights
from pallas_kernels.exit_project.reference import AffineHead
from pallas_kernels.selection import Choices

__all__ = ["IMPLEMENTATIONS", "AffineHead", "exit_project"]

IMPLEMENTATIONS = Choices(
    "exit_project", ("reference", "pallas_triton", "pallas_interpret", "triton"), ("pallas_triton", "triton")
)
"""Plain JAX; a Pallas kernel; the same kernel run by XLA anywhere, for tests; a kernel in Triton's own language."""
MAX_SIZE = 1 << 14
"""Largest number of channels for which one program's registers hold a row."""


def exit_project(
    x: Float[Array, "N D"],
    head: AffineHead | None,
    final_norm: NormWeights,
    exits: Bool[Array, " N"],
    out: Float[Array, "N D"],
    *,
    settings: NormSettings,
    implementation: str | None = None,
) -> Float[Array, "N D"]:
    """Writes the exit states of exiting rows into `out`, after the final norm; other rows stay unchanged.

    Args:
      x: hidden states, any float dtype; the kernel takes float32, float16 and bfloat16.
      head: affine exit head; None for the identity.
      final_norm: parameters of the norm before the output head.
      exits: rows to write.
      out: the buffer; donate it if its old values are not needed.
      settings: of the final norm; the head's norm has the same `eps`.
      implementation: a name from `IMPLEMENTATIONS`; None chooses by platform, see `Choices.choose`.

    Returns:
      Rows in out's dtype.

    Raises:
      ValueError: the named implementation can't run here; the message has the reason.
    """
    name = IMPLEMENTATIONS.choose(implementation, lambda _: _refusal(x, out), x.shape[0])
    return IMPLEMENTATIONS.function(name)(x, head, final_norm, exits, out, settings=settings)


def _refusal(x: Float[Array, "N D"], out: Float[Array, "N D"]) -> str | None:
    """Reason why the kernel can't take these rows; None if it can."""
    if x.shape[0] == 0:
        return "exit_project: no rows"
    if x.dtype not in DTYPES or out.dtype not in DTYPES:
        return f"exit_project: the kernel takes float32, float16 and bfloat16, not {x.dtype} and {out.dtype}"
    if x.size > MAX_ELEMENTS:
        return f"exit_project: the kernel takes up to 2^31 numbers, not {x.shape[0]} rows of {x.shape[1]}"
    if x.shape[1] > MAX_SIZE:
        return f"exit_project: the kernel takes rows up to {MAX_SIZE} wide, not {x.shape[1]}"
    return None

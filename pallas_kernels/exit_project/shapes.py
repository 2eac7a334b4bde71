"""Sizes that the kernel of the exit projection can take."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.exit_step.shapes import DTYPES

MAX_SIZE = 1 << 14
"""Channels up to which a row stays in the registers of one program."""


def misfit(x: Float[Array, "N D"], out: Float[Array, "N D"]) -> str | None:
    """Why the kernel can't take these rows; None where it can."""
    if x.shape[0] == 0:
        return "exit_project: no rows"
    if x.dtype not in DTYPES or out.dtype not in DTYPES:
        return f"exit_project: the kernel takes float32, float16 and bfloat16, not {x.dtype} and {out.dtype}"
    if x.shape[1] > MAX_SIZE:
        return f"exit_project: the kernel takes rows up to {MAX_SIZE} wide, not {x.shape[1]}"
    return None

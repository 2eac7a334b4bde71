"""Sizes that the exit projection kernel supports."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.exit_step.shapes import DTYPES

MAX_SIZE = 1 << 14
"""Largest number of channels for which one program's registers hold a row."""


def misfit(x: Float[Array, "N D"], out: Float[Array, "N D"]) -> str | None:
    """Reason why the kernel can't take these rows; None if it can."""
    if x.shape[0] == 0:
        return "exit_project: no rows"
    if x.dtype not in DTYPES or out.dtype not in DTYPES:
        return f"exit_project: the kernel takes float32, float16 and bfloat16, not {x.dtype} and {out.dtype}"
    if x.shape[1] > MAX_SIZE:
        return f"exit_project: the kernel takes rows up to {MAX_SIZE} wide, not {x.shape[1]}"
    return None

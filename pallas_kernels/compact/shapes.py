"""Sizes that the compaction kernels support."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.common import DTYPES, MAX_ELEMENTS

MAX_ROWS = 1 << 16


def misfit(whole: Float[Array, "B N D"], size: int, *others: Float[Array, "..."]) -> str | None:
    """Reason why the kernels can't move `size` of these rows, or arrays like `others`; None if they can."""
    batch, rows, columns = whole.shape
    if not 0 < size <= rows or batch == 0 or columns == 0:
        return f"compact: kernels move 1 to {rows} of {rows} rows, not {size}, and at least one channel"
    for array in (whole, *others):
        if array.dtype not in DTYPES:
            return f"compact: kernels take float32, float16 and bfloat16 rows, not {array.dtype}"
    if rows > MAX_ROWS or whole.size > MAX_ELEMENTS:
        return f"compact: kernels take up to {MAX_ROWS} rows and 2^31 numbers, not {rows} rows and {whole.size} numbers"
    return None

"""Sizes that the cache fill kernel supports."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.exit_step.shapes import DTYPES, MAX_ELEMENTS, power_of_two
from pallas_kernels.kv_fill.reference import KVRows, Projection, Rotary

MAX_ROW = 1 << 14
"""Most key numbers per token, heads and channels rounded up to powers of two, that one program's registers hold."""


def misfit(x: Float[Array, "B T D"], projection: Projection, rotary: Rotary | None, out: KVRows) -> str | None:
    """Reason why the kernel can't take these arguments; None if it can."""
    heads, parts, channels, _ = projection.kernel.shape
    tokens = x.shape[0] * x.shape[1]
    if parts != 2 or out.keys.shape != (x.shape[0], heads, x.shape[1], channels) or out.values.shape != out.keys.shape:
        return f"kv_fill: the kernel takes keys and values of one shape for each head, not {projection.kernel.shape}"
    for array in (x, *out):
        if array.dtype not in DTYPES:
            return f"kv_fill: the kernel takes float32, float16 and bfloat16, not {array.dtype}"
    if rotary is not None and not 0 < 2 * rotary.cos.shape[-1] <= channels:
        return f"kv_fill: {2 * rotary.cos.shape[-1]} rotary channels do not fit keys of {channels}"
    if tokens == 0 or tokens * 2 * heads * channels > MAX_ELEMENTS:
        return f"kv_fill: the kernel takes at least one token, and up to 2^31 numbers, not {tokens} tokens"
    if power_of_two(heads) * power_of_two(channels) > MAX_ROW:
        return f"kv_fill: the kernel takes keys of up to {MAX_ROW} numbers, not {heads} heads of {channels}"
    return None

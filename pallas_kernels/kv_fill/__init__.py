"""Computes the keys and values that a layer would store for tokens that skip it."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from pallas_kernels.common import DTYPES, MAX_ELEMENTS, power_of_two
from pallas_kernels.kv_fill.reference import KVRows, KVWeights, Rotary, Settings
from pallas_kernels.selection import Choices

__all__ = ["IMPLEMENTATIONS", "KVRows", "KVWeights", "Rotary", "Settings", "kv_fill"]

IMPLEMENTATIONS = Choices(
    "kv_fill",
    ("reference", "pallas_triton", "pallas_interpret", "triton"),
    ("pallas_triton", "triton"),
    least_rows=64,  # compiled for an H100, the reference is 5 kernels, and the kernel with its buffers 7
)
"""Plain JAX; a Pallas kernel; the same kernel run by XLA anywhere, for tests; a kernel in Triton's own language."""
MAX_ROW = 1 << 14
"""Most key numbers per token, heads and channels rounded up to powers of two, that one program's registers hold."""


def kv_fill(
    x: Float[Array, "B T D"],
    weights: KVWeights,
    rotary: Rotary | None,
    fill: Bool[Array, "B T"],
    out: KVRows,
    *,
    settings: Settings,
    implementation: str | None = None,
) -> KVRows:
    """Projects a layer's inputs to the keys and values that the layer would have stored.

    This is state propagation (CALM, Schuster et al. 2022, arXiv:2207.07061, section 3.3). It supports grouped-query
    attention with an optional key norm (before the rotation) and full or partial rotary embedding.

    Args:
      x: the layer's inputs, any float dtype; the kernel takes float32, float16 and bfloat16.
      weights: the layer's weights: the projection in x's dtype, norms in any float dtype.
      rotary: tables for the tokens' true positions; None without rotary embedding.
      fill: tokens whose keys and values are written.
      out: receives their keys and values; those of other tokens stay unchanged. Donate it if its old values are not
        needed.
      settings: the layer's static settings.
      implementation: a name from `IMPLEMENTATIONS`; None chooses by platform, see `Choices.choose`.

    Returns:
      Keys and values in out's dtypes.

    Raises:
      ValueError: the named implementation can't run here; the message has the reason.
    """
    name = IMPLEMENTATIONS.choose(implementation, lambda _: _refusal(x, weights, rotary, out), fill.size)
    return IMPLEMENTATIONS.function(name)(x, weights, rotary, fill, out, settings=settings)


def _refusal(x: Float[Array, "B T D"], weights: KVWeights, rotary: Rotary | None, out: KVRows) -> str | None:
    """Reason why the kernel can't take these arguments; None if it can."""
    heads, parts, channels, _ = weights.projection.shape
    tokens = x.shape[0] * x.shape[1]
    if parts != 2 or out.keys.shape != (x.shape[0], heads, x.shape[1], channels) or out.values.shape != out.keys.shape:
        return f"kv_fill: the kernel takes keys and values of one shape for each head, not {weights.projection.shape}"
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

"""Keys and values that attention reads, and which of them each query sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jax import lax
from jaxtyping import Array, Bool, Float, Int

BLOCK = 256
"""Keys that are read at once. Caches of at most this size are read whole."""
EVEN_SLOTS = 128
"""Long caches, and parts of them, have a multiple of this many slots.

For other sizes, XLA on a GPU makes padded copies at every step and layer.
"""


class KeyValue(NamedTuple):
    """Keys and values of one layer, heads before tokens: ``[B, KV, tokens, channels]`` each, keys already rotated."""

    keys: Float[Array, "B KV S hk"]
    values: Float[Array, "B KV S hv"]

    def slots(self, start: Int[Array, ""] | int, size: int) -> KeyValue:
        """Keys and values of `size` tokens from `start` on."""

        def cut(a: Array) -> Array:
            return lax.dynamic_slice_in_dim(a, start, size, axis=2)

        return KeyValue(cut(self.keys), cut(self.values))


class CachedRows(NamedTuple):
    """One layer's part of a cache.

    Attributes:
      keys, values: the layer's keys and values.
      filled: number of slots written so far, int32 scalar; later slots are never read.
    """

    keys: Float[Array, "B KV S hk"]
    values: Float[Array, "B KV S hv"]
    filled: Int[Array, ""]


class Span(NamedTuple):
    """Which keys of a run the new tokens' queries see, and with what bias.

    Attributes:
      mask: [B, T, S], True where the query sees the key.
      bias: [B, H, T or 1, S], added to the scores, or None.
    """

    mask: Bool[Array, "B T S"]
    bias: Float[Array, "B H #T S"] | None

    def slots(self, start: Int[Array, ""] | int, size: int) -> Span:
        """Mask and bias of `size` keys from `start` on."""

        def cut(a: Array) -> Array:
            return lax.dynamic_slice_in_dim(a, start, size, axis=-1)

        return Span(cut(self.mask), None if self.bias is None else cut(self.bias))

    def queries(self, start: Int[Array, ""] | int, size: int) -> Span:
        """Mask and bias of `size` new tokens from `start` on."""
        mask, bias = lax.dynamic_slice_in_dim(self.mask, start, size, axis=1), self.bias
        if bias is not None and bias.shape[2] > 1:
            bias = lax.dynamic_slice_in_dim(bias, start, size, axis=2)
        return Span(mask, bias)


Adapt = Callable[[KeyValue, Span], tuple[KeyValue, Span]]
"""Transforms stored keys and values, and their mask and bias, before attention reads them."""

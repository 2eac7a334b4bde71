"""What several operations share: the sizes that kernels take, and norms in plain JAX."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

DTYPES = (jnp.float32, jnp.float16, jnp.bfloat16)
"""Dtypes of the rows that kernels take."""
MAX_ELEMENTS = (1 << 31) - 1
"""Largest array that 32-bit offsets can address."""
NormKind = Literal["rms", "layer"]


class NormWeights(NamedTuple):
    """Learned parameters of a norm, any float dtype; None for those that the norm lacks."""

    scale: Float[Array, " D"] | None = None
    bias: Float[Array, " D"] | None = None


class NormSettings(NamedTuple):
    """Static settings of a norm.

    Attributes:
      eps: added to the mean square (or variance) of a row before the root.
      kind: "rms", "layer", or "none" for no norm at all.
      unit_offset: whether the gain is ``1 + scale``.
    """

    eps: float
    kind: NormKind | Literal["none"] = "rms"
    unit_offset: bool = False


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least the positive `number`."""
    return 1 << (number - 1).bit_length()


def row_warps(numbers: int) -> int:
    """Warps of a program that holds this many numbers: about 32 per thread. Not measured on a GPU yet."""
    return max(1, min(16, numbers // 1024))


def rms_normalise(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """RMSNorm without a gain, in float32."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def normalise(x: Float[Array, "... D"], kind: NormKind, eps: float) -> Float[Array, "... D"]:
    """RMSNorm or LayerNorm without gain and bias, in float32."""
    if kind == "layer":
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    return rms_normalise(x, eps)


def apply_norm(x: Float[Array, "... D"], weights: NormWeights, settings: NormSettings) -> Float[Array, "... D"]:
    """A norm with its gain and bias, in float32; with kind "none", x itself in its own dtype."""
    if settings.kind == "none":
        return x
    lead = tuple(range(x.ndim - 1))
    y = normalise(x, settings.kind, settings.eps)
    if weights.scale is not None:
        scale = weights.scale.astype(jnp.float32)
        y = y * jnp.expand_dims(1.0 + scale if settings.unit_offset else scale, lead)
    return y if weights.bias is None else y + jnp.expand_dims(weights.bias.astype(jnp.float32), lead)

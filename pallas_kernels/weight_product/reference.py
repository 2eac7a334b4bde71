"""The weight product in plain JAX."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

Product = tuple[Float[Array, "N K"] | Int8[Array, "N K"], Float[Array, " N"] | None]
"""Weights, and the factor of each output, which 8-bit weights need."""


def weight_product(
    x: Float[Array, "R K"], weights: Float[Array, "N K"] | Int8[Array, "N K"], scale: Float[Array, " N"] | None
) -> Float[Array, "R N"]:
    """``out[r, n] = scale[n] * sum_k x[r, k] weights[n, k]`` in x's dtype; float32 products do not use TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    out = jnp.einsum("rk,nk->rn", x, weights.astype(x.dtype), precision=precision)
    return out if scale is None else (out * scale[None, :]).astype(x.dtype)

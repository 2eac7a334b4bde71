"""Plain-JAX exit projection: the definition that all other implementations are tested against."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.common import NormSettings, NormWeights, apply_norm, rms_normalise


class AffineHead(NamedTuple):
    """An affine exit head: ``n + n @ factors[0] (@ factors[1]) + bias`` with ``n = rmsnorm(x)``.

    Attributes:
      factors: one matrix ``[D, D]``, or a low-rank pair ``[D, R], [R, D]``.
      bias: any float dtype.
    """

    factors: tuple[Float[Array, "..."], ...]
    bias: Float[Array, " D"]


def head_product(x: Float[Array, "N D"], head: AffineHead, eps: float) -> Float[Array, "N D"]:
    """The head's product with the normalised rows, without bias, in x's dtype; float32 products do not use TF32."""
    product = rms_normalise(x, eps).astype(x.dtype)
    for factor in head.factors:
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        product = jnp.dot(product, factor.astype(x.dtype), precision=precision)
    return product


def exit_project(
    x: Float[Array, "N D"],
    head: AffineHead | None,
    final_norm: NormWeights,
    exits: Bool[Array, " N"],
    out: Float[Array, "N D"],
    *,
    settings: NormSettings,
) -> Float[Array, "N D"]:
    """`out` with exiting rows replaced by their exit states after the final norm."""
    if head is not None:
        rows = rms_normalise(x, settings.eps) + head_product(x, head, settings.eps).astype(jnp.float32)
        x = (rows + head.bias.astype(jnp.float32)[None, :]).astype(x.dtype)
    return jnp.where(exits[:, None], apply_norm(x, final_norm, settings).astype(out.dtype), out)

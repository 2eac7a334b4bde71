"""Plain-JAX exit projection: the definition that all other implementations are tested against."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.exit_step.reference import normalise, rms_normalise

FinalNormKind = Literal["rms", "layer", "none"]


class AffineHead(NamedTuple):
    """An affine exit head: ``n + n @ factors[0] (@ factors[1]) + bias`` with ``n = rmsnorm(x)``.

    Attributes:
      factors: one matrix ``[D, D]``, or a low-rank pair ``[D, R], [R, D]``.
      bias: any float dtype.
    """

    factors: tuple[Float[Array, "..."], ...]
    bias: Float[Array, " D"]


class FinalNorm(NamedTuple):
    """Learned parameters of the norm before the output head; None for those that the norm lacks."""

    scale: Float[Array, " D"] | None = None
    bias: Float[Array, " D"] | None = None


def mapped_rows(x: Float[Array, "N D"], head: AffineHead, eps: float) -> Float[Array, "N D"]:
    """The head's product with the normalised rows, without bias, in x's dtype; float32 products do not use TF32."""
    mapped = rms_normalise(x, eps).astype(x.dtype)
    for factor in head.factors:
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        mapped = jnp.dot(mapped, factor.astype(x.dtype), precision=precision)
    return mapped


def exit_project(
    x: Float[Array, "N D"],
    head: AffineHead | None,
    final_norm: FinalNorm,
    exits: Bool[Array, " N"],
    out: Float[Array, "N D"],
    *,
    eps: float,
    norm: FinalNormKind = "rms",
    unit_offset: bool = False,
) -> Float[Array, "N D"]:
    """`out` with exiting rows replaced by their exit states after the final norm."""
    if head is not None:
        rows = rms_normalise(x, eps) + mapped_rows(x, head, eps).astype(jnp.float32)
        x = (rows + head.bias.astype(jnp.float32)[None, :]).astype(x.dtype)
    return jnp.where(exits[:, None], _final(x, final_norm, eps, norm, unit_offset).astype(out.dtype), out)


def _final(
    x: Float[Array, "N D"], final_norm: FinalNorm, eps: float, norm: FinalNormKind, unit_offset: bool
) -> Float[Array, "N D"]:
    if norm == "none":
        return x
    y = normalise(x, norm, eps)
    if final_norm.scale is not None:
        scale = final_norm.scale.astype(jnp.float32)[None, :]
        y = y * (1.0 + scale if unit_offset else scale)
    return y if final_norm.bias is None else y + final_norm.bias.astype(jnp.float32)[None, :]

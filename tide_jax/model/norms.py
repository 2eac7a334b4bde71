"""RMSNorm and LayerNorm, computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from tide_jax.model.architecture import DecoderConfig, NormKind, QKNorm
from tide_jax.model.ops import Dense


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) or LayerNorm (Ba et al. 2016, arXiv:1607.06450).

    Args:
      shape: shape of the learned scale and bias: the trailing axes of the input.
      axes: number of trailing axes that share one mean; all of `shape` if omitted.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        kind: NormKind,
        eps: float,
        axes: int | None = None,
        scale: bool = True,
        bias: bool = False,
        unit_offset: bool = False,
        dtype: jnp.dtype,
    ) -> None:
        self.kind, self.eps, self.unit_offset = kind, eps, unit_offset
        self.axes = tuple(range(-(axes or len(shape)), 0))
        self.scale = nnx.Param(jnp.full(shape, 0.0 if unit_offset else 1.0, dtype)) if scale else None
        self.bias = nnx.Param(jnp.zeros(shape, dtype)) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - jnp.mean(y, axis=self.axes, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=self.axes, keepdims=True) + self.eps)
        if self.scale is not None:
            scale = _add_axes(self.scale[...], x.ndim)
            y = y * (1.0 + scale if self.unit_offset else scale)
        if self.bias is not None:
            y = y + _add_axes(self.bias[...], x.ndim)
        return y.astype(x.dtype)


class GatedNorm(nnx.Module):
    """A norm whose output a gate multiplies: the sigmoid of a low-rank function of that output."""

    def __init__(self, norm: Norm, size: int, rank: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.norm = norm
        self.gate_in = Dense((size,), (rank,), bias=False, dtype=dtype, rngs=rngs)
        self.gate_out = Dense((rank,), (size,), bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = self.norm(x)
        gate = jax.nn.sigmoid(self.gate_out(jax.nn.silu(self.gate_in(y))).astype(jnp.float32))
        return (y.astype(jnp.float32) * gate).astype(y.dtype)


def _add_axes(a: Array, ndim: int) -> Array:
    """`a` in float32, with leading axes of size 1 up to `ndim` axes."""
    return a.astype(jnp.float32).reshape((1,) * (ndim - a.ndim) + a.shape)


def block_norm(config: DecoderConfig, size: int | tuple[int, ...], *, dtype: jnp.dtype) -> Norm:
    """A norm of the kind that the architecture uses around its sublayers."""
    return Norm(
        (size,) if isinstance(size, int) else size,
        kind=config.norm,
        eps=config.norm_eps,
        scale=config.norm_scale,
        bias=config.norm_bias,
        unit_offset=config.norm_unit_offset,
        dtype=dtype,
    )


def head_norm(norm: QKNorm | None, heads: int, head_dim: int, *, dtype: jnp.dtype) -> Norm | None:
    """The norm of queries or keys ``[..., heads, hd]``; None if the architecture has none."""
    if norm is None:
        return None
    own = norm.all_heads or norm.per_head
    return Norm(
        (heads, head_dim) if own else (head_dim,),
        kind=norm.kind,
        eps=norm.eps,
        axes=2 if norm.all_heads else 1,
        scale=norm.scale,
        bias=norm.bias,
        unit_offset=norm.unit_offset,
        dtype=dtype,
    )

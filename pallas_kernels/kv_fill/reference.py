"""Plain-JAX cache fill: the definition that all other implementations are tested against."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.exit_step.reference import normalise, rms_normalise

InputNormKind = Literal["rms", "layer", "none"]


class InputNorm(NamedTuple):
    """Learned parameters of the norm before the projection; None for those that the norm lacks."""

    scale: Float[Array, " D"] | None = None
    bias: Float[Array, " D"] | None = None


class Projection(NamedTuple):
    """Projection from normed states to keys (index 0) and values (index 1) of KV heads.

    Attributes:
      kernel: one row per output.
      bias: None if there is none.
      key_norm: gain of an RMSNorm over the channels of each key; None if there is none.
    """

    kernel: Float[Array, "KV 2 hd D"]
    bias: Float[Array, "KV 2 hd"] | None = None
    key_norm: Float[Array, " hd"] | None = None


class Rotary(NamedTuple):
    """Rotary tables for the tokens' positions, float32; the first 2 R channels of a key are rotated."""

    cos: Float[Array, "B T R"]
    sin: Float[Array, "B T R"]


class KVRows(NamedTuple):
    """One layer's rotated keys and values, heads before tokens as in the cache."""

    keys: Float[Array, "B KV T hd"]
    values: Float[Array, "B KV T hd"]


class Settings(NamedTuple):
    """Static settings of a layer.

    Attributes:
      eps: added to the mean square (or variance) of a state before the root.
      norm: kind of the norm before the projection.
      unit_offset: whether its gain is ``1 + scale``.
      key_eps, key_unit_offset: the same for the key norm.
      interleaved: whether rotary channels pair with their neighbours, instead of the first half with the second.
    """

    eps: float
    norm: InputNormKind = "rms"
    unit_offset: bool = False
    key_eps: float = 0.0
    key_unit_offset: bool = False
    interleaved: bool = False


def projected(
    x: Float[Array, "B T D"], norm: InputNorm, projection: Projection, settings: Settings
) -> Float[Array, "B T KV 2 hd"]:
    """Normed states times the kernel, without bias, in x's dtype; float32 products do not use TF32."""
    if settings.norm != "none":
        y = normalise(x, settings.norm, settings.eps)
        if norm.scale is not None:
            y = y * _gain(norm.scale, settings.unit_offset)[None, None]
        x = (y if norm.bias is None else y + norm.bias.astype(jnp.float32)[None, None]).astype(x.dtype)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    rows = projection.kernel.reshape(-1, x.shape[-1])
    return jnp.einsum("btd,fd->btf", x, rows, precision=precision).reshape(*x.shape[:2], *projection.kernel.shape[:3])


def kv_fill(
    x: Float[Array, "B T D"],
    norm: InputNorm,
    projection: Projection,
    rotary: Rotary | None,
    fill: Bool[Array, "B T"],
    out: KVRows,
    *,
    settings: Settings,
) -> KVRows:
    """`out` with the keys and values of the tokens in `fill` replaced by the layer's projections of `x`."""
    both = projected(x, norm, projection, settings)
    if projection.bias is not None:
        both = both + projection.bias[None, None].astype(both.dtype)
    keys, values = both[..., 0, :], both[..., 1, :]
    if projection.key_norm is not None:
        gain = _gain(projection.key_norm, settings.key_unit_offset)
        keys = (rms_normalise(keys, settings.key_eps) * gain[None, None, None]).astype(keys.dtype)
    keys = keys if rotary is None else _rotated(keys, rotary, settings.interleaved)
    return KVRows(*(_put(new, fill, old) for new, old in zip((keys, values), out, strict=True)))


def _gain(scale: Float[Array, "..."], unit_offset: bool) -> Float[Array, "..."]:
    scale = scale.astype(jnp.float32)
    return 1.0 + scale if unit_offset else scale


def _rotated(keys: Float[Array, "B T KV hd"], rotary: Rotary, interleaved: bool) -> Float[Array, "B T KV hd"]:
    half = rotary.cos.shape[-1]
    turning = keys[..., : 2 * half].astype(jnp.float32)
    first, second = (turning[..., ::2], turning[..., 1::2]) if interleaved else jnp.split(turning, 2, axis=-1)
    cos, sin = rotary.cos[:, :, None], rotary.sin[:, :, None]
    turned = first * cos - second * sin, second * cos + first * sin
    rotated = jnp.stack(turned, axis=-1).reshape(turning.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([rotated.astype(keys.dtype), keys[..., 2 * half :]], axis=-1)


def _put(new: Float[Array, "B T KV hd"], fill: Bool[Array, "B T"], out: Array) -> Float[Array, "B KV T hd"]:
    return jnp.where(fill[:, None, :, None], new.swapaxes(1, 2).astype(out.dtype), out)

"""Plain-JAX cache fill: the definition that all other implementations are tested against."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.common import NormSettings, NormWeights, apply_norm


class KVWeights(NamedTuple):
    """What a layer applies to its input to get the keys (index 0) and values (index 1) of its KV heads.

    Attributes:
      norm: parameters of the norm before the projection.
      projection: one row per output.
      bias: of the projection; None if there is none.
      key_norm: gain of an RMSNorm over the channels of each key; None if there is none.
    """

    norm: NormWeights
    projection: Float[Array, "KV 2 hd D"]
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
      norm: of the norm before the projection.
      key_eps: added to the mean square of a key before the root, in the key norm.
      key_unit_offset: whether the key norm's gain is ``1 + key_norm``.
      interleaved: whether rotary channels pair with their neighbours, instead of the first half with the second.
    """

    norm: NormSettings
    key_eps: float = 0.0
    key_unit_offset: bool = False
    interleaved: bool = False


def project(x: Float[Array, "B T D"], weights: KVWeights, norm: NormSettings) -> Float[Array, "B T KV 2 hd"]:
    """Normed states times the projection, without its bias, in x's dtype; float32 products do not use TF32."""
    y = apply_norm(x, weights.norm, norm).astype(x.dtype)
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    rows = weights.projection.reshape(-1, x.shape[-1])
    return jnp.einsum("btd,fd->btf", y, rows, precision=precision).reshape(*x.shape[:2], *weights.projection.shape[:3])


def kv_fill(
    x: Float[Array, "B T D"],
    weights: KVWeights,
    rotary: Rotary | None,
    fill: Bool[Array, "B T"],
    out: KVRows,
    *,
    settings: Settings,
) -> KVRows:
    """`out` with the keys and values of the tokens in `fill` replaced by the layer's projections of `x`."""
    both = project(x, weights, settings.norm)
    if weights.bias is not None:
        both = both + weights.bias[None, None].astype(both.dtype)
    keys, values = both[..., 0, :], both[..., 1, :]
    if weights.key_norm is not None:
        key_norm = NormSettings(settings.key_eps, unit_offset=settings.key_unit_offset)
        keys = apply_norm(keys, NormWeights(weights.key_norm), key_norm).astype(keys.dtype)
    keys = keys if rotary is None else _rotate(keys, rotary, settings.interleaved)
    return KVRows(*(_write(new, fill, old) for new, old in zip((keys, values), out, strict=True)))


def _rotate(keys: Float[Array, "B T KV hd"], rotary: Rotary, interleaved: bool) -> Float[Array, "B T KV hd"]:
    half = rotary.cos.shape[-1]
    leading = keys[..., : 2 * half].astype(jnp.float32)
    first, second = (leading[..., ::2], leading[..., 1::2]) if interleaved else jnp.split(leading, 2, axis=-1)
    cos, sin = rotary.cos[:, :, None], rotary.sin[:, :, None]
    pair = first * cos - second * sin, second * cos + first * sin
    leading = jnp.stack(pair, axis=-1).reshape(leading.shape) if interleaved else jnp.concatenate(pair, axis=-1)
    return jnp.concatenate([leading.astype(keys.dtype), keys[..., 2 * half :]], axis=-1)


def _write(new: Float[Array, "B T KV hd"], fill: Bool[Array, "B T"], out: Array) -> Float[Array, "B KV T hd"]:
    return jnp.where(fill[:, None, :, None], new.swapaxes(1, 2).astype(out.dtype), out)

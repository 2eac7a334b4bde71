"""Gated convolutions over a few tokens (LFM2, Liquid AI 2025)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tide_jax.model.ops import Dense, normal
from tide_jax.model.recurrent.mixer import Mixer
from tide_jax.model.recurrent.types import ShortConvType


class ShortConv(Mixer):
    """``out(c * conv(b * u))``, where b, c and u are projections of the input."""

    def __init__(self, size: int, kind: ShortConvType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.sizes = kind.sizes(size)
        self.inputs = Dense((size,), (3, size), bias=kind.bias, stacked=True, dtype=dtype, rngs=rngs)
        self.filters = nnx.Param(normal(rngs, (size, kind.width), kind.width, dtype))
        self.filter_bias = nnx.Param(jnp.zeros((size,), dtype)) if kind.bias else None
        self.out = Dense((size,), (size,), bias=kind.bias, dtype=dtype, rngs=rngs)

    def _project(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        projected = self.inputs(x)
        return projected[:, :, 0] * projected[:, :, 2], projected[:, :, 1]

    def _updates(self, inputs: Array, window: Array) -> tuple[Array, None]:
        return self._convolve(inputs, window), None

    def _output(self, read: Array | None, mixed: Array, gate: Array) -> Float[Array, "B T D"]:
        return self.out(gate * mixed)

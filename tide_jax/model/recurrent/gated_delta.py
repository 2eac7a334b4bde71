"""Gated delta nets (Yang et al. 2024, arXiv:2412.06464)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tide_jax.model.ops import Dense, together
from tide_jax.model.recurrent.delta import DeltaMixer, flat
from tide_jax.model.recurrent.linear import Updates
from tide_jax.model.recurrent.types import GatedDeltaType


class GatedDelta(DeltaMixer):
    """Queries, keys and values are convolved; keys replace what they read before; a gate multiplies the normed output.

    Inputs to the state: queries, keys, values, and for each value head its rate and its fade, as projected.
    """

    def __init__(self, size: int, kind: GatedDeltaType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.kind, self.sizes = kind, kind.sizes(size)
        keys, values = (kind.key_heads, kind.key_dim), (kind.value_heads, kind.value_dim)
        self._add_parts(size, keys, values, norm_eps=kind.norm_eps, dtype=dtype, rngs=rngs)
        self.gates = Dense((size,), (2, kind.value_heads), bias=False, dtype=dtype, rngs=rngs)
        self.output_gate = Dense((size,), values, bias=False, dtype=dtype, rngs=rngs)
        self.fade = nnx.Param(jnp.zeros((kind.value_heads,), dtype))
        self.fade_bias = nnx.Param(jnp.zeros((kind.value_heads,), dtype))

    def _project(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T I"], Float[Array, "B T H dv"]]:
        *parts, gate = together(x, [self.q, self.k, self.v, self.gates, self.output_gate])
        return flat(parts), gate

    def _updates(self, inputs: Array, window: Array) -> tuple[Array, Updates]:
        mixed, (q, k, v) = self._mix(inputs, window)
        rate, fade = jnp.split(inputs[..., self.sizes.channels :], 2, axis=-1)
        shifted = fade.astype(jnp.float32) + self.fade_bias[...].astype(jnp.float32)[None, None]
        updates = Updates(
            queries=self._of_value_heads(q),
            keys=self._of_value_heads(k),
            values=v,
            fade=-jnp.exp(self.fade[...].astype(jnp.float32))[None, None] * jax.nn.softplus(shifted),
            rate=jax.nn.sigmoid(rate).astype(jnp.float32) * self.kind.largest_rate,
        )
        return mixed, updates

    def _of_value_heads(self, a: Float[Array, "B T h dk"]) -> Float[Array, "B T H dk"]:
        """A copy of each key head for each of its value heads."""
        return jnp.repeat(a, self.kind.value_heads // self.kind.key_heads, axis=2)

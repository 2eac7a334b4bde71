"""Gated delta nets (Yang et al. 2024, arXiv:2412.06464)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from tide_jax.model.norms import Norm
from tide_jax.model.ops import Dense, normal, together
from tide_jax.model.recurrent.linear import Updates
from tide_jax.model.recurrent.mixer import Mixer
from tide_jax.model.recurrent.types import GatedDeltaType

_EPS = 1e-6  # of the queries' and keys' length


class GatedDelta(Mixer):
    """Queries, keys and values are convolved; keys replace what they read before; a gate multiplies the normed output.

    Inputs to the state: queries, keys, values, and for each value head its rate and its fade, as projected.
    """

    def __init__(self, size: int, kind: GatedDeltaType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.kind, self.sizes = kind, kind.sizes(size)
        keys, values = (kind.key_heads, kind.key_dim), (kind.value_heads, kind.value_dim)
        self.q = Dense((size,), keys, bias=False, dtype=dtype, rngs=rngs)
        self.k = Dense((size,), keys, bias=False, dtype=dtype, rngs=rngs)
        self.v = Dense((size,), values, bias=False, dtype=dtype, rngs=rngs)
        self.gates = Dense((size,), (2, kind.value_heads), bias=False, dtype=dtype, rngs=rngs)
        self.output_gate = Dense((size,), values, bias=False, dtype=dtype, rngs=rngs)
        self.filters = nnx.Param(normal(rngs, (self.sizes.channels, kind.width), kind.width, dtype))
        self.filter_bias = None
        self.fade = nnx.Param(jnp.zeros((kind.value_heads,), dtype))
        self.fade_bias = nnx.Param(jnp.zeros((kind.value_heads,), dtype))
        self.norm = Norm((kind.value_dim,), kind="rms", eps=kind.norm_eps, dtype=dtype)
        self.out = Dense((kind.value_heads * kind.value_dim,), (size,), bias=False, dtype=dtype, rngs=rngs)
        self.delta = True

    def _project(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T I"], Float[Array, "B T H dv"]]:
        *parts, gate = together(x, [self.q, self.k, self.v, self.gates, self.output_gate])
        return jnp.concatenate([part.reshape(*x.shape[:2], -1) for part in parts], axis=-1), gate

    def _updates(self, inputs: Array, window: Array) -> tuple[Array, Updates]:
        kind, channels = self.kind, self.filters.shape[0]
        mixed = jax.nn.silu(self._convolve(inputs[..., :channels], window))
        keys, heads = kind.key_heads * kind.key_dim, kind.value_heads
        q, k, v = jnp.split(mixed.astype(jnp.float32), [keys, 2 * keys], axis=-1)
        q, k = (self._of_value_heads(_unit(a.reshape(*a.shape[:2], kind.key_heads, kind.key_dim))) for a in (q, k))
        rate, fade = inputs[..., channels : channels + heads], inputs[..., channels + heads :].astype(jnp.float32)
        shifted = jax.nn.softplus(fade + self.fade_bias[...].astype(jnp.float32)[None, None])
        updates = Updates(
            queries=q * kind.key_dim**-0.5,
            keys=k,
            values=v.reshape(*v.shape[:2], heads, kind.value_dim),
            fade=-jnp.exp(self.fade[...].astype(jnp.float32))[None, None] * shifted,
            rate=jax.nn.sigmoid(rate).astype(jnp.float32),
        )
        return mixed, updates

    def _of_value_heads(self, a: Float[Array, "B T h dk"]) -> Float[Array, "B T H dk"]:
        """A copy of each key head for each of its value heads."""
        return jnp.repeat(a, self.kind.value_heads // self.kind.key_heads, axis=2)

    def _output(self, read: Array | None, mixed: Array, gate: Array) -> Float[Array, "B T D"]:
        assert read is not None
        normed = self.norm(read.astype(gate.dtype)).astype(jnp.float32)
        gated = (normed * jax.nn.silu(gate.astype(jnp.float32))).astype(gate.dtype)
        return self.out(gated.reshape(*gate.shape[:2], -1))


def _unit(a: Float[Array, "B T h dk"]) -> Float[Array, "B T h dk"]:
    return a * lax.rsqrt(jnp.sum(jnp.square(a), axis=-1, keepdims=True) + _EPS)

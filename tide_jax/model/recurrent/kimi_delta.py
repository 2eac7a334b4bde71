"""Kimi delta attention (Kimi Team 2025, arXiv:2510.26692, section 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tide_jax.model.ops import Dense, together
from tide_jax.model.recurrent.delta import DeltaMixer, flat
from tide_jax.model.recurrent.linear import Updates
from tide_jax.model.recurrent.types import KimiDeltaType


class KimiDelta(DeltaMixer):
    """A delta net whose key channels fade apart.

    Inputs to the state: queries, keys, values, each head's rate, and each channel's fade, as projected.
    """

    gate_activation = staticmethod(jax.nn.sigmoid)

    def __init__(self, size: int, kind: KimiDeltaType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.kind, self.sizes = kind, kind.sizes(size)
        heads = (kind.heads, kind.head_dim)
        self._add_parts(size, heads, heads, norm_eps=kind.norm_eps, dtype=dtype, rngs=rngs)

        def dense(inputs: int, *outputs: int) -> Dense:
            return Dense((inputs,), outputs, bias=False, dtype=dtype, rngs=rngs)

        self.rate = dense(size, kind.heads)
        self.fades_down = None if kind.fade_rank is None else dense(size, kind.fade_rank)
        self.fades = dense(kind.fade_rank or size, *heads)
        self.gate_down = None if kind.gate_rank is None else dense(size, kind.gate_rank)
        self.output_gate = dense(kind.gate_rank or size, *heads)
        self.fade = nnx.Param(jnp.zeros((kind.heads,), dtype))
        self.fade_bias = nnx.Param(jnp.zeros(heads, dtype))

    def _project(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T I"], Float[Array, "B T H dv"]]:
        first = [self.q, self.k, self.v, self.rate, self.fades_down or self.fades, self.gate_down or self.output_gate]
        *parts, fades, gate = together(x, first)
        fades = fades if self.fades_down is None else self.fades(fades)
        return flat([*parts, fades]), gate if self.gate_down is None else self.output_gate(gate)

    def _updates(self, inputs: Array, window: Array) -> tuple[Array, Updates]:
        mixed, (q, k, v) = self._mix(inputs, window)
        rate, fades = jnp.split(inputs[..., self.sizes.channels :], [self.kind.heads], axis=-1)
        rate = jax.nn.sigmoid(rate).astype(jnp.float32)
        return mixed, Updates(queries=q, keys=k, values=v, fade=self._fade(fades.reshape(q.shape)), rate=rate)

    def _fade(self, fades: Float[Array, "B T H dk"]) -> Float[Array, "B T H dk"]:
        """What each key channel fades by, from its projection; float32."""
        shifted = fades.astype(jnp.float32) + self.fade_bias[...].astype(jnp.float32)[None, None]
        scale = jnp.exp(self.fade[...].astype(jnp.float32))[None, None, :, None]
        if self.kind.fade_limit is None:
            return -scale * jax.nn.softplus(shifted)
        return -self.kind.fade_limit * jax.nn.sigmoid(scale * shifted)

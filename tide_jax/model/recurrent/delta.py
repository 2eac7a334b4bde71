"""What delta nets share: convolved queries, keys and values of unit length, and a norm with a gate after reading."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from tide_jax.model.norms import Norm
from tide_jax.model.ops import Dense, normal
from tide_jax.model.recurrent.mixer import Mixer

_EPS = 1e-6  # of the queries' and keys' length
Heads = tuple[int, int]
"""Number of heads and their channels."""


class DeltaMixer(Mixer):
    """A delta net. Subclasses implement `_project` and `_updates`.

    Inputs to the state: queries, keys and values, then what the subclass adds.

    Attributes:
      gate_activation: of the gate that multiplies the normed output.
    """

    gate_activation: Callable[[Array], Array] = staticmethod(jax.nn.silu)
    delta = True

    def _add_parts(
        self, size: int, keys: Heads, values: Heads, *, norm_eps: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        """Adds projections and filters of queries, keys and values, the norm, and the output projection."""

        def filters(heads: Heads) -> nnx.Param:
            return nnx.Param(normal(rngs, (heads[0] * heads[1], self.sizes.width), self.sizes.width, dtype))

        self.q = Dense((size,), keys, bias=False, dtype=dtype, rngs=rngs)
        self.k = Dense((size,), keys, bias=False, dtype=dtype, rngs=rngs)
        self.v = Dense((size,), values, bias=False, dtype=dtype, rngs=rngs)
        self.q_filters, self.k_filters, self.v_filters = filters(keys), filters(keys), filters(values)
        self.filter_bias = None
        self.norm = Norm(values[1:], kind="rms", eps=norm_eps, dtype=dtype)
        self.out = Dense((values[0] * values[1],), (size,), bias=False, dtype=dtype, rngs=rngs)

    def _all_filters(self) -> Float[Array, "C K"]:
        return jnp.concatenate([self.q_filters[...], self.k_filters[...], self.v_filters[...]])

    def _mix(
        self, inputs: Float[Array, "B T I"], window: Float[Array, "B W C"]
    ) -> tuple[Float[Array, "B T C"], tuple[Array, Array, Array]]:
        """Convolved channels, and the queries, keys ``[B, T, h, dk]`` and values ``[B, T, H, dv]`` in them, float32."""
        mixed = jax.nn.silu(self._convolve(inputs[..., : self.sizes.channels], window))
        (heads, width), values = self.q.outputs, self.v.outputs
        q, k, v = jnp.split(mixed.astype(jnp.float32), [heads * width, 2 * heads * width], axis=-1)
        q, k = (_unit(a.reshape(*a.shape[:2], heads, width)) for a in (q, k))
        return mixed, (q * width**-0.5, k, v.reshape(*v.shape[:2], *values))

    def _output(self, read: Array | None, mixed: Array, gate: Array) -> Float[Array, "B T D"]:
        assert read is not None
        normed = self.norm(read.astype(gate.dtype)).astype(jnp.float32)
        gated = (normed * self.gate_activation(gate.astype(jnp.float32))).astype(gate.dtype)
        return self.out(gated.reshape(*gate.shape[:2], -1))


def flat(parts: list[Float[Array, "B T ..."]]) -> Float[Array, "B T I"]:
    """Joins the numbers of each token."""
    return jnp.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=-1)


def _unit(a: Float[Array, "B T h dk"]) -> Float[Array, "B T h dk"]:
    return a * lax.rsqrt(jnp.sum(jnp.square(a), axis=-1, keepdims=True) + _EPS)

"""Real-gated linear recurrent units (Griffin, De et al. 2024, arXiv:2402.19427, section 2.4)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from tide_jax.model.activations import ACTIVATIONS
from tide_jax.model.ops import Dense, einsum, normal, together
from tide_jax.model.recurrent.mixer import Mixer
from tide_jax.model.recurrent.order import zero_others
from tide_jax.model.recurrent.types import RgLruType

_SHARPNESS = 8.0  # the constant c of equation 4


class DiagonalUpdates(NamedTuple):
    """What tokens do to each channel's state, float32; a token of zeros does nothing.

    Attributes:
      written: what is added, before it is scaled.
      fade: logarithm of the factor of the state.
      counts: 1 for a token.
    """

    written: Float[Array, "B T N"]
    fade: Float[Array, "B T N"]
    counts: Float[Array, "B T 1"]

    def only(self, real: Bool[Array, "B T"]) -> DiagonalUpdates:
        """The updates of real tokens; the others do nothing."""
        return zero_others(self, real)


class RgLru(Mixer):
    """Each channel fades by itself; gates made from the channel's block decide how fast, and how much is written.

    Inputs to the state: the inner stream. The last number of a block's state is 1 once there was a token.
    """

    def __init__(self, size: int, kind: RgLruType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.kind, self.sizes = kind, kind.sizes(size)
        inner, block = self.sizes.channels, (kind.blocks, kind.block_dim)
        self.stream = Dense((size,), (inner,), bias=True, dtype=dtype, rngs=rngs)
        self.output_gate = Dense((size,), (inner,), bias=True, dtype=dtype, rngs=rngs)
        self.filters = nnx.Param(normal(rngs, (inner, kind.width), kind.width, dtype))
        self.filter_bias = nnx.Param(jnp.zeros((inner,), dtype))
        self.gates = nnx.Param(normal(rngs, (2, *block, kind.block_dim), kind.block_dim, dtype))
        self.gate_bias = nnx.Param(jnp.zeros((2, *block), dtype))
        self.fade = nnx.Param(jnp.zeros((inner,), dtype))
        self.out = Dense((inner,), (size,), bias=True, dtype=dtype, rngs=rngs)

    def _project(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T N"], Float[Array, "B T N"]]:
        stream, gate = together(x, [self.stream, self.output_gate])
        return stream, ACTIVATIONS[self.kind.activation](gate)

    def _updates(self, inputs: Array, window: Array) -> tuple[Array, DiagonalUpdates]:
        mixed = self._convolve(inputs, window)
        blocks = mixed.reshape(*mixed.shape[:2], self.kind.blocks, self.kind.block_dim)
        gates = einsum("btnd,gnde->gbtne", blocks, self.gates[...]).astype(jnp.float32)
        gates = jax.nn.sigmoid(gates + self.gate_bias[...].astype(jnp.float32)[:, None, None])
        write, fade = gates.reshape(2, *mixed.shape)
        rates = _SHARPNESS * jax.nn.softplus(self.fade[...].astype(jnp.float32))
        counts = jnp.ones((*mixed.shape[:2], 1), jnp.float32)
        return mixed, DiagonalUpdates(mixed.astype(jnp.float32) * write, -rates[None, None] * fade, counts)

    def _run(self, matrix: Array, updates: DiagonalUpdates) -> tuple[Array, Array]:
        batch, tokens, _ = updates.counts.shape
        state, seen = matrix[:, :, 0, :-1].reshape(batch, -1), matrix[:, :, 0, -1:]
        # What is written is scaled such that the state keeps its variance; a row's first token finds no state.
        first = (seen[:, :1] == 0) & (jnp.arange(tokens, dtype=jnp.int32) == 0)[None, :, None]
        scale = jnp.where(first, 1.0, jnp.sqrt(-jnp.expm1(2 * updates.fade)))
        states = _states(state, jnp.exp(updates.fade), updates.written * scale)
        read = states.reshape(batch, tokens, self.kind.blocks, self.kind.block_dim)
        seen = jnp.maximum(seen, jnp.max(updates.counts, axis=1)[:, None])
        return read, jnp.concatenate([read[:, -1], seen], axis=-1)[:, :, None]

    def _output(self, read: Array | None, mixed: Array, gate: Array) -> Float[Array, "B T D"]:
        assert read is not None
        return self.out(read.reshape(gate.shape).astype(gate.dtype) * gate)


def _states(
    state: Float[Array, "B N"], factors: Float[Array, "B T N"], written: Float[Array, "B T N"]
) -> Float[Array, "B T N"]:
    """The state after each token, ``state * factor + written``, in a logarithmic number of steps."""
    written = written.at[:, 0].add(factors[:, 0] * state)

    def join(early: tuple[Array, Array], late: tuple[Array, Array]) -> tuple[Array, Array]:
        return early[0] * late[0], early[1] * late[0] + late[1]

    return lax.associative_scan(join, (factors, written), axis=1)[1]

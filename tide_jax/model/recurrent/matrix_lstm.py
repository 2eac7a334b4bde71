"""The mLSTM, linear attention with exponential gates (Beck et al. 2024, arXiv:2405.04517, section 2.3).

    C = exp(f) C + exp(i) key value                 f = log sigmoid(forget gate), i = input gate
    n = exp(f) n + exp(i) key
    out = query C / max(|query n|, 1)

The exponents are kept small by the largest one so far, m = max(f + m, i): the state is C / exp(m) and n / exp(m)
(appendix A.2 there). So a token's fade is f + (m before) - m, and its rate is exp(i - m), both at most 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from tide_jax.model.norms import Norm
from tide_jax.model.ops import Dense, together
from tide_jax.model.recurrent.delta import flat
from tide_jax.model.recurrent.linear import Updates, run_linear
from tide_jax.model.recurrent.mixer import Mixer
from tide_jax.model.recurrent.types import MatrixLSTMType

_NEVER = -1e30  # exponent of a token that writes nothing


class GatedUpdates(NamedTuple):
    """What tokens do to a state, float32; a token with a `fade` of zero and a very low `gate` does nothing.

    Attributes:
      queries: what reads the state after the token's own write.
      keys, values: what is written.
      fade: logarithm of the factor of the state.
      gate: logarithm of the factor of what is written.
    """

    queries: Float[Array, "B T H dk"]
    keys: Float[Array, "B T H dk"]
    values: Float[Array, "B T H dv"]
    fade: Float[Array, "B T H"]
    gate: Float[Array, "B T H"]

    def only(self, real: Bool[Array, "B T"]) -> GatedUpdates:
        """The updates of real tokens; the others do nothing."""
        fade = jnp.where(real[:, :, None], self.fade, 0.0)
        return self._replace(fade=fade, gate=jnp.where(real[:, :, None], self.gate, _NEVER))


class MatrixLSTM(Mixer):
    """Queries read values by key; the result is divided by its normaliser, normed by head, and gated.

    Inputs to the state: queries, keys, values, and for each head its input gate and its forget gate, as projected.
    The state's last value channels are the normaliser and, in every row, the largest exponent.
    """

    def __init__(self, size: int, kind: MatrixLSTMType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.kind, self.sizes = kind, kind.sizes(size)
        keys, values = (kind.heads, kind.key_dim), (kind.heads, kind.value_dim)
        self.q = Dense((size,), keys, bias=False, dtype=dtype, rngs=rngs)
        self.k = Dense((size,), keys, bias=False, dtype=dtype, rngs=rngs)
        self.v = Dense((size,), values, bias=False, dtype=dtype, rngs=rngs)
        self.gates = Dense((size,), (2, kind.heads), bias=True, dtype=dtype, rngs=rngs)
        self.output_gate = Dense((size,), values, bias=False, dtype=dtype, rngs=rngs)
        self.norm = Norm(values, axes=1, kind="layer", eps=kind.norm_eps, dtype=dtype)
        self.out = Dense(values, (size,), bias=False, dtype=dtype, rngs=rngs)

    def _project(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T I"], Float[Array, "B T H dv"]]:
        *parts, gate = together(x, [self.q, self.k, self.v, self.gates, self.output_gate])
        return flat(parts), gate

    def _updates(self, inputs: Array, window: Array) -> tuple[Array, GatedUpdates]:
        kind, (batch, tokens) = self.kind, inputs.shape[:2]
        keys, values = kind.heads * kind.key_dim, kind.heads * kind.value_dim
        q, k, v, gates = jnp.split(inputs.astype(jnp.float32), [keys, 2 * keys, 2 * keys + values], axis=-1)
        gates = kind.gate_softcap * jnp.tanh(gates / kind.gate_softcap)
        updates = GatedUpdates(
            queries=q.reshape(batch, tokens, kind.heads, -1) * kind.key_dim**-0.5,
            keys=k.reshape(batch, tokens, kind.heads, -1),
            values=v.reshape(batch, tokens, kind.heads, -1),
            fade=jax.nn.log_sigmoid(gates[..., kind.heads :]),
            gate=gates[..., : kind.heads],
        )
        return inputs[..., :0], updates

    def _run(self, matrix: Array, updates: GatedUpdates) -> tuple[Float[Array, "B T H dv+2"], Array]:
        first = matrix[:, None, :, 0, -1]
        largest = _largest_exponents(first, updates.fade, updates.gate)
        before = jnp.concatenate([first, largest[:, :-1]], axis=1)
        linear = Updates(
            queries=updates.queries,
            keys=updates.keys,
            # The normaliser is what a value of one becomes.
            values=jnp.pad(updates.values, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1.0),
            fade=updates.fade + before - largest,
            rate=jnp.exp(updates.gate - largest),
        )
        read, state = run_linear(matrix[..., :-1], linear, delta=False)
        last = jnp.broadcast_to(largest[:, -1, :, None, None], (*state.shape[:-1], 1))
        return jnp.concatenate([read, largest[..., None]], axis=-1), jnp.concatenate([state, last], axis=-1)

    def _output(self, read: Array | None, mixed: Array, gate: Array) -> Float[Array, "B T D"]:
        assert read is not None
        values, normaliser, largest = read[..., :-2], read[..., -2:-1], read[..., -1:]
        divisor = jnp.maximum(jnp.abs(normaliser), jnp.exp(-largest)) + self.kind.eps
        normed = self.norm((values / divisor).astype(gate.dtype))
        return self.out(jax.nn.sigmoid(gate) * normed)


def _largest_exponents(
    first: Float[Array, "B 1 H"], fade: Float[Array, "B T H"], gate: Float[Array, "B T H"]
) -> Float[Array, "B T H"]:
    """The exponent ``max(fade + exponent before, gate)`` after each token, from `first` on."""

    def join(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return a[0] + b[0], jnp.maximum(a[1] + b[0], b[1])

    faded, written = lax.associative_scan(join, (fade, gate), axis=1)
    return jnp.maximum(first + faded, written)

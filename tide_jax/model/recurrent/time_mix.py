"""RWKV-4 (Peng et al. 2023, arXiv:2305.13048, section 3.1): both sublayers mix a token with the one before it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.feed_forward import MLP
from tide_jax.model.ops import Dense
from tide_jax.model.recurrent.mixer import Mixer
from tide_jax.model.recurrent.order import TokenOrder
from tide_jax.model.recurrent.types import TimeMixType

_AT_ONCE = 8  # tokens in a turn of the loop
_NEVER = -1e38  # exponent of the empty state


class WeightedUpdates(NamedTuple):
    """What tokens add to each channel's weighted mean, float32.

    Attributes:
      keys: logarithm of the value's weight.
      values: what is averaged.
      real: whether the token counts.
    """

    keys: Float[Array, "B T N"]
    values: Float[Array, "B T N"]
    real: Bool[Array, "B T"]

    def only(self, real: Bool[Array, "B T"]) -> WeightedUpdates:
        """The updates of real tokens; the others do nothing."""
        return self._replace(real=real)


class TimeMix(Mixer):
    """Each channel averages the values so far, with weights that fade; a gate multiplies the mean.

    Inputs to the state: the layer's input. The state has for each channel the sum of weighted values, the sum of
    weights, both divided by the exponential of the largest exponent, and that exponent.
    """

    def __init__(self, size: int, kind: TimeMixType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.size, self.sizes = size, kind.sizes(size)
        self.shares = nnx.Param(jnp.full((3, size), 0.5, dtype))
        self.k = Dense((size,), (kind.inner,), bias=False, dtype=dtype, rngs=rngs)
        self.v = Dense((size,), (kind.inner,), bias=False, dtype=dtype, rngs=rngs)
        self.gate = Dense((size,), (kind.inner,), bias=False, dtype=dtype, rngs=rngs)
        self.fade = nnx.Param(jnp.zeros((kind.inner,), dtype))
        self.bonus = nnx.Param(jnp.zeros((kind.inner,), dtype))
        self.out = Dense((kind.inner,), (size,), bias=False, dtype=dtype, rngs=rngs)

    def _project(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, "B T 0"]]:
        return x, x[..., :0]

    def _updates(self, inputs: Array, window: Array) -> tuple[Float[Array, "B T N"], WeightedUpdates]:
        x = inputs[..., : self.size]
        k, v, gate = mix_with_previous(x, window[..., : self.size], self.shares)
        keys, values = (a.astype(jnp.float32) for a in (self.k(k), self.v(v)))
        return self.gate(gate), WeightedUpdates(keys, values, jnp.ones(x.shape[:2], bool))

    def _run(self, matrix: Array, updates: WeightedUpdates) -> tuple[Float[Array, "B T N 1"], Array]:
        fade = -jnp.exp(self.fade[...].astype(jnp.float32))[None]
        bonus = self.bonus[...].astype(jnp.float32)[None]

        def token(state: tuple[Array, Array, Array], one: WeightedUpdates) -> tuple[tuple[Array, Array, Array], Array]:
            # The token itself counts with a bonus, and does not fade what was before it.
            total, weight, _ = _add(state, one.keys + bonus, one.values)
            total_before, weight_before, exponent = state
            after = _add((total_before, weight_before, exponent + fade), one.keys, one.values)
            kept = jax.tree.map(lambda new, old: jnp.where(one.real[:, None], new, old), after, state)
            return kept, total / weight

        total, weight, exponent = (matrix[:, :, i, 0] for i in range(3))
        first = (total, weight, jnp.where(weight > 0, exponent, _NEVER))  # all zeros before the first token
        by_token = WeightedUpdates(*(jnp.swapaxes(a, 0, 1) for a in updates))
        state, out = lax.scan(token, first, by_token, unroll=min(_AT_ONCE, by_token.keys.shape[0]))
        return jnp.swapaxes(out, 0, 1)[..., None], jnp.stack(state, axis=-1)[..., None]

    def _output(self, read: Array | None, mixed: Array, gate: Array) -> Float[Array, "B T D"]:
        assert read is not None
        return self.out(jax.nn.sigmoid(mixed) * read[..., 0].astype(mixed.dtype))


class ChannelMix(nnx.Module):
    """A feed-forward block with a gate; both mix a token with the one before it."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.block = MLP(config, dtype=dtype, rngs=rngs)
        self.shares = nnx.Param(jnp.full((2, config.hidden_size), 0.5, dtype))
        self.gate = Dense((config.hidden_size,), (config.hidden_size,), bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], order: TokenOrder, window: Float[Array, "B 1 D"]
    ) -> Float[Array, "B T D"]:
        """The block's output for new tokens.

        Args:
          order: of the real tokens; other slots get meaningless outputs.
          window: input of the token before.
        """
        hidden, gate = mix_with_previous(order.forth(x), window, self.shares)
        return order.back(jax.nn.sigmoid(self.gate(gate)) * self.block(hidden))


def mix_with_previous(
    x: Float[Array, "B T D"], window: Float[Array, "B 1 D"], shares: nnx.Param
) -> list[Float[Array, "B T D"]]:
    """For each of several `shares`, that share of a token and the rest of the token before it."""
    before = jnp.concatenate([window.astype(x.dtype), x[:, :-1]], axis=1)
    return [x * share[None, None] + before * (1 - share[None, None]) for share in shares[...]]


def _add(state: tuple[Array, Array, Array], key: Array, value: Array) -> tuple[Array, Array, Array]:
    """Sums of weighted values and of weights, and the largest exponent, with one more value."""
    total, weight, exponent = state
    largest = jnp.maximum(exponent, key)
    old, new = jnp.exp(exponent - largest), jnp.exp(key - largest)
    return old * total + new * value, old * weight + new, largest

"""Differential attention: subtracting one softmax from another cancels the noise they share."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tide_jax.model.architecture import AttentionType, DecoderConfig
from tide_jax.model.attention.grouped import Attention, Spans
from tide_jax.model.attention.span import KeyValue, Span
from tide_jax.model.norms import Norm


class DifferentialAttention(Attention):
    """Attention with two halves of heads that read values of double width; subtracts the second half from the first.

    The Differential Transformer (Ye et al. 2024, arXiv:2410.05258, section 2.1). Each pair's difference is normed and
    multiplied by one minus the initial weight.
    """

    def __init__(self, config: DecoderConfig, kind: AttentionType, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        assert kind.differential is not None
        super().__init__(config, kind, dtype=dtype, rngs=rngs)
        self.initial = kind.differential
        self.weights = nnx.Param(jnp.zeros((2, 2, config.head_dim), dtype))
        self.pair_norm = Norm((2 * config.head_dim,), kind="rms", eps=config.norm_eps, scale=False, dtype=dtype)

    def _mix(self, q: Float[Array, "B T H hd"], spans: Spans) -> Float[Array, "B T H hd"]:
        first, second = jnp.split(super()._mix(q, spans), 2, axis=2)
        weights = self.weights[...].astype(jnp.float32)
        # The paper's lambda: exp(q1 . k1) - exp(q2 . k2) + initial value.
        grown = jnp.exp(jnp.sum(weights[:, 0] * weights[:, 1], axis=-1))
        share = (grown[0] - grown[1] + self.initial).astype(q.dtype)
        difference = self.pair_norm(first - share * second)
        return (difference * jnp.asarray(1.0 - self.initial, q.dtype)).reshape(q.shape)

    def _read(self, rows: KeyValue, span: Span) -> tuple[KeyValue, Span]:
        return KeyValue(rows.keys, _pair_halves(rows.values)), span


def _pair_halves(values: Float[Array, "B KV S hd"]) -> Float[Array, "B KV S 2hd"]:
    """Concatenates both halves of the value heads channel-wise, once for each half of the query heads."""
    pairs = jnp.concatenate(jnp.split(values, 2, axis=1), axis=-1)
    return jnp.concatenate([pairs, pairs], axis=1)

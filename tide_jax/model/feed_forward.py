"""The dense feed-forward block."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tide_jax.model.activations import ACTIVATIONS, LEARNED, XIELU, gated_activation
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.norms import block_norm
from tide_jax.model.ops import Dense, scaled


class MLP(nnx.Module):
    """``down(act(gate x) * up x)`` in gated architectures, otherwise ``down(act(up x))``.

    Args:
      size: hidden width; the configuration's `intermediate_size` if omitted.
    """

    def __init__(self, config: DecoderConfig, *, size: int | None = None, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        d, f, bias = config.hidden_size, size or config.intermediate_size, config.mlp_bias
        self.activation, self.limit, self.gated = (
            config.activation,
            config.activation_limit,
            config.mlp_gated,
        )
        self.gate_scale = config.mlp_gate_scale
        if self.gated:
            self.gate_up = Dense((d,), (2, f), bias=bias, stacked=True, dtype=dtype, rngs=rngs)
        else:
            self.up = Dense((d,), (f,), bias=bias, dtype=dtype, rngs=rngs)
        self.act = XIELU(dtype=dtype) if self.activation == LEARNED else None
        self.sub_norm = block_norm(config, f, dtype=dtype) if config.sub_norm else None
        self.down = Dense((f,), (d,), bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        hidden = self._hidden(x)
        return self.down(hidden if self.sub_norm is None else self.sub_norm(hidden))

    def _hidden(self, x: Array) -> Float[Array, "B T F"]:
        if self.gated:
            gate_up = self.gate_up(x)
            gate = scaled(gate_up[..., 0, :], self.gate_scale)
            return gated_activation(self.activation, gate, gate_up[..., 1, :], self.limit)
        return (ACTIVATIONS[self.activation] if self.act is None else self.act)(self.up(x))

"""Mixture-of-experts feed-forward block (Mixtral, Jiang et al. 2024, arXiv:2401.04088, section 2.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from tide_jax.activations import ACTIVATIONS
from tide_jax.config import DecoderConfig
from tide_jax.ops import Dense, matmul_precision, normal


class Experts(nnx.Module):
    """Stacked kernels of all experts: ``gate_up [E, D, 2, F]`` and ``down [E, F, D]``."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        assert config.moe is not None
        e, d, f = config.moe.num_experts, config.hidden_size, config.intermediate_size
        self.gate_up = nnx.Param(normal(rngs, (e, d, 2, f), d, dtype))
        self.down = nnx.Param(normal(rngs, (e, f, d), f, dtype))


class MoE(nnx.Module):
    """Each token goes through its `experts_per_token` best experts, weighted by renormalised router probability."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        assert config.moe is not None
        self.activation = config.activation
        self.experts_per_token = config.moe.experts_per_token
        self.router = Dense((config.hidden_size,), (config.moe.num_experts,), bias=False, dtype=dtype, rngs=rngs)
        self.experts = Experts(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        tokens = x.reshape(-1, x.shape[-1])
        n, k = tokens.shape[0], self.experts_per_token
        probabilities = jax.nn.softmax(self.router(tokens).astype(jnp.float32), axis=-1)
        weights, chosen = lax.top_k(probabilities, k)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)

        # Sort the (token, expert) pairs by expert, so that each expert multiplies one contiguous run of rows.
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=probabilities.shape[-1]).astype(jnp.int32)
        mixed = self._run_experts(tokens[order // k], sizes)
        mixed = mixed[jnp.argsort(order)].reshape(n, k, -1).astype(jnp.float32)
        return jnp.sum(mixed * weights[:, :, None], axis=1).astype(x.dtype).reshape(x.shape)

    def _run_experts(self, rows: Float[Array, "M D"], sizes: Array) -> Float[Array, "M D"]:
        gate_up, down = self.experts.gate_up[...], self.experts.down[...]
        precision = matmul_precision(rows.dtype)
        flat = gate_up.reshape(*gate_up.shape[:2], -1)
        hidden = lax.ragged_dot(rows, flat, sizes, precision=precision)
        gate, up = jnp.split(hidden, 2, axis=-1)
        return lax.ragged_dot(ACTIVATIONS[self.activation](gate) * up, down, sizes, precision=precision)

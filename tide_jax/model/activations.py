"""Activation functions, under the names that Hugging Face configurations use."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _relu_squared(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "relu2": _relu_squared,
    "tanh": jnp.tanh,
}
SWIGLU_OAI, LEARNED = "swiglu_oai", "xielu"
KNOWN_ACTIVATIONS = (*ACTIVATIONS, SWIGLU_OAI, LEARNED)


def gated_activation(name: str, gate: Array, up: Array, limit: float | None = None) -> Array:
    """A gated activation (Shazeer 2020, arXiv:2002.05202): ``act(gate) * up``.

    Args:
      name: the activation; "swiglu_oai" is gpt-oss's ``gate * sigmoid(1.702 gate) * (up + 1)``.
      limit: first clamps the gate from above and `up` from both sides.
    """
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return _quick_gelu(gate) * (up + 1) if name == SWIGLU_OAI else ACTIVATIONS[name](gate) * up


class XIELU(nnx.Module):
    """xIELU, an activation with two learned slopes (Huang and Schlag 2024, arXiv:2411.13010, section 3)."""

    def __init__(self, *, dtype: jnp.dtype) -> None:
        self.alpha_p = nnx.Param(jnp.zeros((1,), dtype))
        self.alpha_n = nnx.Param(jnp.zeros((1,), dtype))
        self.beta = nnx.Param(jnp.full((1,), 0.5, dtype))
        self.eps = nnx.Param(jnp.full((1,), -1e-6, dtype))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        alpha_p, alpha_n, beta, eps = (
            parameter[...].astype(jnp.float32).reshape((1,) * x.ndim)
            for parameter in (self.alpha_p, self.alpha_n, self.beta, self.eps)
        )
        y = x.astype(jnp.float32)
        above = jax.nn.softplus(alpha_p) * y * y + beta * y
        below = (jnp.expm1(jnp.minimum(y, eps)) - y) * (beta + jax.nn.softplus(alpha_n)) + beta * y
        return jnp.where(y > 0, above, below).astype(x.dtype)

"""Matrix products with the project's precision rule, and the Dense module built on them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float


def matmul_precision(dtype: jnp.dtype) -> lax.Precision | None:
    """float32 means float32: without this, GPUs multiply float32 matrices in TF32 (10-bit mantissas)."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def einsum(spec: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """`jnp.einsum` of two operands under the precision rule."""
    return jnp.einsum(spec, a, b, precision=matmul_precision(a.dtype))


def matmul(x: Float[Array, "... D"], kernel: Float[Array, "D F"]) -> Float[Array, "... F"]:
    """`jnp.dot` under the precision rule."""
    return jnp.dot(x, kernel, precision=matmul_precision(x.dtype))


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: jnp.dtype) -> Array:
    """Random weights with standard deviation ``1 / sqrt(fan_in)``."""
    return (jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(fan_in)).astype(dtype)


class Dense(nnx.Module):
    """Linear map from the trailing axes `inputs` to axes `outputs`; the kernel has shape ``inputs + outputs``."""

    def __init__(
        self, inputs: tuple[int, ...], outputs: tuple[int, ...], *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.kernel = nnx.Param(normal(rngs, inputs + outputs, math.prod(inputs), dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        lead = x.shape[: x.ndim - len(self.inputs)]
        flat = self.kernel[...].reshape(math.prod(self.inputs), math.prod(self.outputs))
        y = matmul(x.reshape(*lead, flat.shape[0]), flat).reshape(*lead, *self.outputs)
        if self.bias is not None:
            y = y + self.bias[...].reshape((1,) * len(lead) + self.outputs)
        return y

"""The parts before and after the layers: the embedding table and the output head."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int8

from tide_jax.model.activations import ACTIVATIONS
from tide_jax.model.architecture import DecoderConfig, HeadTransform
from tide_jax.model.norms import block_norm
from tide_jax.model.ops import Dense, normal
from tide_jax.model.rounding import apply_scale


class Embedding(nnx.Module):
    """A table of vectors, ``kernel [rows, D]``.

    Args:
      head: the table is also the output projection, and may be 8-bit integers with a `scale` for each row.
    """

    def __init__(self, rows: int, size: int, *, head: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(normal(rngs, (rows, size), size, dtype), summed=(1,) if head else None)
        self.scale: nnx.Param | None = None
        self._dtype = jnp.dtype(dtype)

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of the vectors."""
        return self._dtype if self.scale is not None else self.kernel[...].dtype

    def __call__(self, index: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        if self.scale is None:
            return jnp.take(self.kernel[...], index, axis=0, mode="clip")
        rows = _integer_rows(self.kernel[...], index)
        scale = jnp.take(self.scale[...], index, axis=0, mode="clip")[..., None]
        return apply_scale(rows.astype(jnp.float32), scale, self.dtype)


def _integer_rows(table: Int8[Array, "V D"], index: Int[Array, "B T"]) -> Int8[Array, "B T D"]:
    if index.size != 1:
        return jnp.take(table, index, axis=0, mode="clip")
    # To look up one row, XLA for a TPU takes a slice, for which it copies the whole table; it reads two rows in place.
    twice = jnp.concatenate([index, index], axis=-1)
    return jnp.take(table, twice, axis=0, mode="clip")[..., :1, :]


class Head(nnx.Module):
    """Output projection, ``kernel [V, E]``: one row per token, which CPUs and GPUs read fastest at small batch."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        shape = (config.vocab_size, config.head_size)
        kernel = None if config.tie_embeddings else normal(rngs, shape, config.head_size, dtype)
        self.kernel = None if kernel is None else nnx.Param(kernel, summed=(1,))
        self.scale: nnx.Param | None = None
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,), dtype)) if config.head_bias else None


class HeadRows(NamedTuple):
    """Rows of the output projection, for the logits of K tokens."""

    kernel: Float[Array, "K E"] | Int8[Array, "K E"]
    bias: Float[Array, " K"] | None
    scale: Float[Array, " K"] | None = None


class HeadLayer(nnx.Module):
    """Dense layer, activation and norm before the output projection."""

    def __init__(self, config: DecoderConfig, transform: HeadTransform, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        sizes = (config.hidden_size,), (config.head_size,)
        self.dense = Dense(*sizes, bias=transform.bias, dtype=dtype, rngs=rngs)
        self.activation = transform.activation
        self.norm = block_norm(config, config.head_size, dtype=dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        return self.norm(ACTIVATIONS[self.activation](self.dense(x)))

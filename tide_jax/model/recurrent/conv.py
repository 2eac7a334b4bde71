"""Causal convolutions over a few tokens, each channel with its own filter; the memory is a window of inputs."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def causal_conv(
    window: Float[Array, "B W C"],
    rows: Float[Array, "B T C"],
    filters: Float[Array, "C K"],
    bias: Float[Array, " C"] | None,
) -> Float[Array, "B T C"]:
    """Each channel's weighted sum of a token and the ones before it, in the dtype of `rows`.

    Args:
      window: inputs of the ``W = K - 1`` tokens before, zeros ahead of the first one.
      rows: inputs of new tokens.
      filters: weights of each channel, that of the newest token last.
    """
    size, tokens = filters.shape[1], rows.shape[1]
    whole = jnp.concatenate([window.astype(jnp.float32), rows.astype(jnp.float32)], axis=1)
    weights = filters.astype(jnp.float32)
    out = whole[:, :tokens] * weights[None, None, :, 0]
    for k in range(1, size):
        out = out + whole[:, k : k + tokens] * weights[None, None, :, k]
    if bias is not None:
        out = out + bias.astype(jnp.float32)[None, None, :]
    return out.astype(rows.dtype)


def move_window(
    window: Float[Array, "B W C"], rows: Float[Array, "B T C"], count: Int[Array, " B"]
) -> Float[Array, "B W C"]:
    """The window after the first `count` tokens of each row."""
    whole = jnp.concatenate([window, rows.astype(window.dtype)], axis=1)
    index = count[:, None] + jnp.arange(window.shape[1], dtype=jnp.int32)[None]
    return jnp.take_along_axis(whole, index[:, :, None], axis=1)

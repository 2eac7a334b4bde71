"""What fades leave inside a chunk of tokens: of keys, of the state before it, and of keys that later tokens meet.

All exponents are sums of fades between two tokens, so they are never positive. Differences of sums from the start would
lose small fades behind large ones, and quotients of exponentials would overflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from tide_jax.model.ops import einsum


class Faded(NamedTuple):
    """Keys and products of a chunk, after fading.

    Attributes:
      products: for each of the given rows, the product of token i's row with what is left of token j's key at i; zero
        where j is later than i.
      since: factor of the state before the chunk, at each token; one channel if channels fade alike.
      left: what is left of the keys at the last token.
    """

    products: Sequence[Float[Array, "B H c c"]]
    since: Float[Array, "B H c dk"] | Float[Array, "B H c 1"]
    left: Float[Array, "B H c dk"]


def fade_heads(
    rows: Sequence[Float[Array, "B H c dk"]], keys: Float[Array, "B H c dk"], fade: Float[Array, "B H c"]
) -> Faded:
    """For heads whose channels fade alike."""
    after = jnp.tril(jnp.broadcast_to(fade[..., :, None], (*fade.shape, fade.shape[-1])), -1)
    lower = jnp.tril(jnp.ones_like(after))
    # between[i, j]: what is left at token i of what token j wrote.
    between = jnp.exp(einsum("bhik,bhkj->bhij", lower, after)) * lower
    products = [einsum("bhck,bhdk->bhcd", each, keys) * between for each in rows]
    since = jnp.exp(jnp.cumsum(fade, axis=2))[..., None]
    return Faded(products, since, keys * between[..., -1, :, None])


def fade_channels(
    rows: Sequence[Float[Array, "B H c dk"]], keys: Float[Array, "B H c dk"], fade: Float[Array, "B H c dk"]
) -> Faded:
    """For key channels that fade on their own; c is a power of two.

    The chunk is halved again and again. A token of a second half meets a key of the first half through the boundary:
    the key fades up to there, and the row fades from there. So each pair of tokens is one entry of one matrix product.
    """
    stacked, size = jnp.stack(list(rows)), keys.shape[2]
    products = jnp.sum(stacked * keys[None], axis=-1)[..., None, None]  # of each token with itself
    until, after = fade, jnp.zeros_like(fade)  # sums in a block: from its start to a token, behind a token to its end
    half = 1
    while half < size:
        start, end = _halves(until, half), _halves(after, half)
        later = _halves(stacked, half)[..., 1, :, :] * jnp.exp(start[..., 1, :, :])[None]
        earlier = _halves(keys, half)[..., 0, :, :] * jnp.exp(end[..., 0, :, :])
        across = einsum("rbhnik,bhnjk->rbhnij", later, earlier)
        products = _join(products.reshape(*across.shape[:4], 2, half, half), across)
        whole = start[..., -1:, :]
        until = jnp.stack([start[..., 0, :, :], start[..., 1, :, :] + whole[..., 0, :, :]], axis=3).reshape(fade.shape)
        after = jnp.stack([end[..., 0, :, :] + whole[..., 1, :, :], end[..., 1, :, :]], axis=3).reshape(fade.shape)
        half *= 2
    return Faded([each[:, :, 0] for each in products], jnp.exp(until), keys * jnp.exp(after))


def _halves(a: Float[Array, "..."], half: int) -> Float[Array, "... n 2 half dk"]:
    """Tokens [..., c, dk] as halves of blocks."""
    return a.reshape(*a.shape[: a.ndim - 2], -1, 2, half, a.shape[-1])


def _join(blocks: Float[Array, "R B H n 2 c c"], across: Float[Array, "R B H n c c"]) -> Float[Array, "R B H n d d"]:
    """Products inside two halves, and of the second half with the first, as one lower triangle."""
    above = jnp.concatenate([blocks[:, :, :, :, 0], jnp.zeros_like(across)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([across, blocks[:, :, :, :, 1]], axis=-1)], axis=-2)

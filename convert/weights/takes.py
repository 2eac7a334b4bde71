"""Arrangements of source tensors: each picks the part that fills a slot of a parameter, as a view.

torch's Linear weights are [out, in] and fuse axes; ours are [in..., out...] with heads on axes of their own. Only views
may be returned: an export writes a checkpoint back through them.
"""

from __future__ import annotations

import numpy as np

from convert.rules import Take
from tide_jax.architecture import DecoderConfig


def transposed(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """[out, in] to [in, out]; of experts, [E, out, in] to [E, in, out]."""
    return a.swapaxes(-1, -2)


def heads_out(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """[heads * hd, D] to [D, heads, hd]."""
    return a.T.reshape(a.shape[1], -1, c.head_dim)


def heads_in(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """[D, heads * hd] to [heads, hd, D]."""
    return a.T.reshape(c.num_heads, -1, a.shape[0])


def heads_bias(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """[heads * hd] to [heads, hd]."""
    return a.reshape(-1, c.head_dim)


def heads_norm(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """A norm's weight over all heads [heads * hd] to [heads, hd]; one for a single head as it is."""
    return a.reshape(-1, c.head_dim) if a.shape != (c.head_dim,) else a


def conv1d_in(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """GPT-2's Conv1D is [in, out] already: [heads * hd, D] to [heads, hd, D]."""
    return a.reshape(c.num_heads, -1, a.shape[1])


def halves(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """Gate and up projection, one after the other: [2 F, D] to [D, 2, F], [2 F] to [2, F]."""
    return a.T.reshape(*a.shape[1:], 2, -1)


def blocks(parts: int, pick: int | slice) -> Take:
    """Of projections with equally many heads, fused one after the other in a Conv1D [..., parts * H * hd].

    Gives [..., H, hd] of one part, [..., H, parts picked, hd] of several.
    """

    def take(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
        picked = a.reshape(*a.shape[:-1], parts, c.num_heads, c.head_dim)[..., pick, :, :]
        return picked if isinstance(pick, int) else picked.swapaxes(-3, -2)

    return take


def interleaved(pick: int | slice) -> Take:
    """Of queries, keys and values fused head by head in a Linear [H * (q, k, v) * hd, ...]: [..., H, (picked), hd]."""

    def take(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
        return a.T.reshape(*a.shape[1:], c.num_heads, 3, c.head_dim)[..., pick, :]

    return take


def fused_q(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """The queries of a Linear [(H + 2 KV) * hd, ...] that holds queries, keys and values: [..., H, hd]."""
    return a.T.reshape(*a.shape[1:], -1, c.head_dim)[..., : c.num_heads, :]


def fused_kv(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """The keys and values of a Linear [(H + 2 KV) * hd, ...]: [..., KV, 2, hd]."""
    both = a.T.reshape(*a.shape[1:], -1, c.head_dim)[..., c.num_heads :, :]
    return both.reshape(*both.shape[:-2], 2, -1, c.head_dim).swapaxes(-3, -2)


def latent_keys(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """The keys of latent attention's up-projection [H * (nope + value), R]: [R, H, nope]."""
    assert c.latent is not None
    return a.T.reshape(a.shape[1], c.num_heads, -1)[..., : c.latent.nope_dim]


def latent_values(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
    """The values of latent attention's up-projection [H * (nope + value), R]: [R, H, value]."""
    assert c.latent is not None
    return a.T.reshape(a.shape[1], c.num_heads, -1)[..., c.latent.nope_dim :]


def rows_from(start: int) -> Take:
    """A table without its first rows."""

    def take(a: np.ndarray, c: DecoderConfig) -> np.ndarray:
        return a[start:]

    return take

"""Attention on recorded numbers: a candidate's output, and the scale implied by a recorded output."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from convert.probe.heads import repeat_heads
from tide_jax.model.architecture import AttentionType, RopeConfig
from tide_jax.model.attention.grouped import attention_context
from tide_jax.model.rotary import rope_tables

_INFORMATIVE_WEIGHTS = (0.02, 0.98)  # range of a key's attention weight that is informative about the scores


def rotate(x: np.ndarray, rope: RopeConfig | None, length: int) -> np.ndarray:
    """Rotates queries or keys [T, N, hd] by their positions, the first ones of a row of `length`."""
    if rope is None:
        return x
    cos, sin = (table[: len(x)] for table in _rotary_tables(dataclasses.replace(rope, interleaved=False), length))
    size = 2 * cos.shape[-1]
    pairs = slice(size // 2), slice(size // 2, size)
    if rope.interleaved:
        pairs = slice(0, size, 2), slice(1, size, 2)
    result = x.copy()
    result[..., pairs[0]] = x[..., pairs[0]] * cos - x[..., pairs[1]] * sin
    result[..., pairs[1]] = x[..., pairs[1]] * cos + x[..., pairs[0]] * sin
    return result


@functools.lru_cache(maxsize=256)
def _rotary_tables(rope: RopeConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, [T, 1, R] each."""
    tables = rope_tables(rope, jnp.arange(length, dtype=jnp.int32)[None], jnp.int32(length))
    return np.asarray(tables[0])[0, :, None], np.asarray(tables[1])[0, :, None]


@functools.lru_cache(maxsize=256)
def _mask_and_bias(kind: AttentionType, length: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Mask of keys that each query sees [T, T], and the bias added to scores [H, T, T]."""
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    span = attention_context(dataclasses.replace(kind, rope=None), positions, jnp.int32(length), None).new
    return np.asarray(span.mask)[0], None if span.bias is None else np.asarray(span.bias)[0]


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, kind: AttentionType, softcap: float | None, sinks: np.ndarray | None
) -> np.ndarray:
    """Attention output [T, H, hv] for rotated queries [T, H, hd], rotated keys [T, KV, hd] and values."""
    keys, values = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    scores = np.matmul(q.swapaxes(0, 1), keys.transpose(1, 2, 0)) * np.float32(kind.scale)  # [H, T, S]
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    mask, bias = _mask_and_bias(_mask_flags(kind), len(q))
    scores = np.where(mask[None], scores if bias is None else scores + bias, -np.inf)
    if sinks is not None:
        scores = np.concatenate([scores, np.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))], axis=-1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True))[..., : len(k)]
    return np.matmul(weights, values.swapaxes(0, 1)).swapaxes(0, 1)


def _mask_flags(kind: AttentionType) -> AttentionType:
    """Resets flags that don't affect masks and biases, to share cache entries of `_mask_and_bias`."""
    return dataclasses.replace(kind, rope=None, qk_norm=None, scale=kind.scale if kind.alibi_bfloat16 else 1.0)


def fit_scale(q: np.ndarray, k: np.ndarray, v: np.ndarray, output: np.ndarray, kind: AttentionType) -> float | None:
    """Fits the scale of query-key products from the second token, whose output mixes the first two tokens' values.

    Args:
      q, k, v: rotated queries and keys, and values, as for `attend`.
      output: attention output, [T, H, hv].
    """
    keys, values = repeat_heads(k[:2], q.shape[1]), repeat_heads(v[:2], q.shape[1])
    # Solve for the two attention weights of each head; this needs independent values.
    gram = np.einsum("shd,rhd->hsr", values, values)
    if np.linalg.cond(gram).max() > 1e6:
        return None
    shares = np.linalg.solve(gram, np.einsum("shd,hd->hs", values, output[1])[..., None])[..., 0]
    # Keep heads whose weights are well inside (0, 1), so that their logarithm is accurate.
    first_share = shares[:, 0] / shares.sum(1)
    usable = (shares > 0).all(1) & (first_share > _INFORMATIVE_WEIGHTS[0]) & (first_share < _INFORMATIVE_WEIGHTS[1])
    if not usable.any():
        return None
    # The log ratio of the weights is the scaled difference of the two scores: fit the scale.
    scores = np.log(shares[usable, 0] / shares[usable, 1])
    if kind.alibi and not kind.alibi_bfloat16:
        scores = scores + np.asarray(kind.alibi)[usable]  # the first token is one position further away
    raw = np.einsum("hd,shd->hs", q[1], keys)
    raw = (raw[:, 0] - raw[:, 1])[usable]
    return float(raw @ scores / max(float(raw @ raw), 1e-30))

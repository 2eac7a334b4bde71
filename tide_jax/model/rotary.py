"""Rotary position embeddings (RoFormer, Su et al. 2021, arXiv:2104.09864) and their long-context variants."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tide_jax.model.architecture import RopeConfig


def rope_tables(
    rope: RopeConfig, positions: Int[Array, "B T"], seq_len: Int[Array, ""]
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """Cosines and sines for each position, float32, ``R = rotary_dim // 2``.

    Args:
      positions: position of each token in its own row, counted from 0.
      seq_len: tokens seen so far in the longest row; the frequencies of "dynamic" and "longrope" depend on it.
    """
    inverse = _inverse_frequencies(rope, seq_len)
    angles = positions.astype(jnp.float32)[:, :, None] * inverse[None, None, :]
    factor = jnp.float32(rope.attention_factor)
    return jnp.cos(angles) * factor, jnp.sin(-angles if rope.reverse else angles) * factor


def rotate(
    x: Float[Array, "B T N hd"], cos: Float[Array, "B T R"], sin: Float[Array, "B T R"], *, interleaved: bool = False
) -> Float[Array, "B T N hd"]:
    """Rotates the leading ``2 R`` channels of each head, in float32.

    Pairs the first half of the channels with the second half, or neighbours if `interleaved`.
    """
    rotary = x[..., : 2 * cos.shape[-1]].astype(jnp.float32)
    x1, x2 = (rotary[..., ::2], rotary[..., 1::2]) if interleaved else jnp.split(rotary, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]
    rotated = jnp.stack(turned, axis=-1).reshape(rotary.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    rotated = rotated.astype(x.dtype)
    if rotary.shape[-1] == x.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x[..., rotary.shape[-1] :]], axis=-1)


def _inverse_frequencies(rope: RopeConfig, seq_len: Int[Array, ""]) -> Float[Array, " R"]:
    if rope.kind == "dynamic":
        return _dynamic(rope, seq_len)
    if rope.kind == "longrope":
        short, long = (_longrope(rope, factors) for factors in (rope.short_factor, rope.long_factor))
        return jnp.where(seq_len > rope.original_max_positions, jnp.asarray(long), jnp.asarray(short))
    return jnp.asarray(_STATIC[rope.kind](rope))


def _exponents(rope: RopeConfig) -> np.ndarray:
    return np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)


def _default(rope: RopeConfig) -> np.ndarray:
    return np.float32(1.0) / np.float32(rope.theta) ** _exponents(rope)


def _linear(rope: RopeConfig) -> np.ndarray:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595)."""
    return _default(rope) / np.float32(rope.factor)


def _llama3(rope: RopeConfig) -> np.ndarray:
    """Llama 3.1: divides low frequencies by `factor`, keeps high ones, and blends smoothly in between."""
    inverse = _default(rope)
    wavelength = 2 * math.pi / inverse
    low = rope.original_max_positions / rope.low_freq_factor
    high = rope.original_max_positions / rope.high_freq_factor
    smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    middle = (1 - smooth) * inverse / rope.factor + smooth * inverse
    stretched = np.where(wavelength > low, inverse / rope.factor, np.where(wavelength < high, inverse, middle))
    return stretched.astype(np.float32)


def _yarn(rope: RopeConfig) -> np.ndarray:
    """YaRN (Peng et al. 2023, arXiv:2309.00071, section 3.2): interpolates low frequencies, keeps high ones."""
    dim = rope.rotary_dim

    def correction(rotations: float) -> float:
        return dim * math.log(rope.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    # Keep frequencies with more than beta_fast turns in the original context, interpolate those with fewer than
    # beta_slow, and blend in between.
    low, high = correction(rope.beta_fast), correction(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    keep = np.float32(1) - ramp
    inverse = _default(rope)
    return (inverse / np.float32(rope.factor) * (1 - keep) + inverse * keep).astype(np.float32)


def _longrope(rope: RopeConfig, factors: tuple[float, ...]) -> np.ndarray:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): each frequency has its own divisor, found by search."""
    return np.float32(1.0) / (np.asarray(factors, np.float32) * np.float32(rope.theta) ** _exponents(rope))


def _dynamic(rope: RopeConfig, seq_len: Int[Array, ""]) -> Float[Array, " R"]:
    """Dynamic NTK scaling: the base grows with the sequence length once it exceeds the trained context."""
    trained = jnp.float32(rope.max_positions)
    length = jnp.maximum(seq_len.astype(jnp.float32), trained)
    growth = jnp.float32(rope.factor) * length / trained - jnp.float32(rope.factor - 1)
    power = jnp.float32(rope.rotary_dim / (rope.rotary_dim - 2))
    theta = jnp.float32(rope.theta) * growth**power
    return jnp.float32(1.0) / theta ** jnp.asarray(_exponents(rope))


def _proportional(rope: RopeConfig) -> np.ndarray:
    """Gemma 4's partial rotation: spreads frequencies over all channels and sets the lowest to 0."""
    return np.where(np.arange(rope.rotary_dim // 2) < rope.turning, _linear(rope), np.float32(0))


_STATIC = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "proportional": _proportional,
}

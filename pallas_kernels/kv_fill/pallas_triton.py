"""Cache fill as a Pallas kernel for the Triton backend.

XLA computes the norm and the product: it has the better matrix kernels, and it reads the same weights for one token as
for many. The kernel does everything after the product in registers: bias, key norm, rotation, and the transposition
from tokens to heads. The outputs alias the buffers, so tokens that are not filled are not touched.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.common import power_of_two, row_warps
from pallas_kernels.kv_fill.reference import KVRows, KVWeights, Rotary, Settings, project


def kv_fill(
    x: Float[Array, "B T D"],
    weights: KVWeights,
    rotary: Rotary | None,
    fill: Bool[Array, "B T"],
    out: KVRows,
    *,
    settings: Settings,
    interpret: bool = False,
) -> KVRows:
    """Same result as the reference within rounding; `interpret` runs the kernel with XLA, on any platform."""
    heads, _, channels, _ = weights.projection.shape
    half = 0 if rotary is None else rotary.cos.shape[-1]
    layout = _Layout(x.shape[1], heads, channels, half, settings)
    tables = None if rotary is None else Rotary(rotary.cos.reshape(-1), rotary.sin.reshape(-1))
    bias = None if weights.bias is None else weights.bias.reshape(-1)
    product = project(x, weights, settings.norm).reshape(-1)
    found = pl.pallas_call(
        functools.partial(_kernel, layout),
        grid=(x.shape[0] * x.shape[1],),
        out_shape=tuple(jax.ShapeDtypeStruct((a.size,), a.dtype) for a in out),
        input_output_aliases={0: 0, 1: 1},
        compiler_params=plt.CompilerParams(num_warps=row_warps(layout.height * power_of_two(channels)), num_stages=1),
        interpret=interpret,
        name="kv_fill",
    )(*(a.reshape(-1) for a in out), product, fill.reshape(-1), bias, weights.key_norm, tables)
    return KVRows(*(a.reshape(old.shape) for a, old in zip(found, out, strict=True)))


class _Channels(NamedTuple):
    """Some channels of every head: `at` are their indices in a head, `there` masks heads and channels that exist."""

    at: Int[Array, " C"]
    there: Bool[Array, "H C"]


class _Layout(NamedTuple):
    """Where a token's numbers lie in flat arrays.

    There are `tokens` per row and `heads` of `channels`, of which the first ``2 * half`` rotate.
    """

    tokens: int
    heads: int
    channels: int
    half: int
    settings: Settings

    @property
    def height(self) -> int:
        """Rows of a block: the number of heads, rounded up to a power of two."""
        return power_of_two(self.heads)

    def heads_at(self) -> Int[Array, "H 1"]:
        """Indices of the block's heads."""
        return jnp.arange(self.height, dtype=jnp.int32)[:, None]

    def select(self, start: int, count: int, step: int = 1) -> _Channels:
        """`count` channels from `start`, `step` apart."""
        numbers = jnp.arange(power_of_two(count), dtype=jnp.int32)
        there = (self.heads_at() < self.heads) & (numbers < count)[None, :]
        return _Channels(start + numbers * step, there)

    def parts(self) -> list[_Channels]:
        """A key's channels: the two parts that rotate into each other, and the rest."""
        step = 2 if self.settings.interleaved else 1
        second = 1 if self.settings.interleaved else self.half
        parts = [self.select(start, self.half, step) for start in (0, second) if self.half]
        rest = self.channels - 2 * self.half
        return [*parts, self.select(2 * self.half, rest)] if rest else parts


def _kernel(
    layout: _Layout,
    _: Any,
    __: Any,
    product_ref: Any,
    fill_ref: Any,
    bias_ref: Any,
    gain_ref: Any,
    tables: Rotary | None,
    keys_out: Any,
    values_out: Any,
) -> None:
    token = pl.program_id(0)

    def read(which: int, part: _Channels) -> Float[Array, "H C"]:
        """Keys (0) or values (1) plus bias, rounded as the model rounds them, in float32."""
        within = (layout.heads_at() * 2 + which) * layout.channels + part.at[None, :]
        y = _load(product_ref, token * (layout.heads * 2 * layout.channels) + within, part.there)
        if bias_ref is None:
            return y
        return _round(y + _load(bias_ref, within, part.there), product_ref)

    def write(ref: Any, part: _Channels, rows: Float[Array, "H C"]) -> None:
        row, column = token // layout.tokens, token % layout.tokens
        heads = (row * layout.heads + layout.heads_at()) * layout.tokens + column
        rows = _round(rows, product_ref)
        plt.store(ref.at[heads * layout.channels + part.at[None, :]], rows.astype(ref.dtype), mask=part.there)

    @pl.when(fill_ref[token])
    def _fill() -> None:
        values = layout.select(0, layout.channels)
        write(values_out, values, read(1, values))
        parts = layout.parts()
        keys = [read(0, part) for part in parts]
        if gain_ref is not None:
            keys = _apply_key_norm(layout, keys, parts, gain_ref)
            keys = [_round(key, product_ref) for key in keys]
        if tables is not None:
            keys = [*_rotate(layout, token, keys[0], keys[1], tables), *keys[2:]]
        for part, key in zip(parts, keys, strict=True):
            write(keys_out, part, key)


def _apply_key_norm(layout: _Layout, keys: list[Array], parts: list[_Channels], gain_ref: Any) -> list[Array]:
    """RMSNorm over all channels of a head."""
    squares = sum(jnp.sum(key * key, axis=1) for key in keys)
    factor = lax.rsqrt(squares / layout.channels + layout.settings.key_eps)[:, None]
    gains = [_load(gain_ref, jnp.broadcast_to(part.at[None, :], part.there.shape), part.there) for part in parts]
    offset = 1.0 if layout.settings.key_unit_offset else 0.0
    return [key * factor * (offset + gain) for key, gain in zip(keys, gains, strict=True)]


def _rotate(
    layout: _Layout, token: Array, first: Float[Array, "H C"], second: Float[Array, "H C"], tables: Rotary
) -> tuple[Array, Array]:
    at = jnp.arange(first.shape[1], dtype=jnp.int32)
    cos, sin = (_load(table, token * layout.half + at, at < layout.half)[None, :] for table in tables)
    return first * cos - second * sin, second * cos + first * sin


def _load(ref: Any, at: Int[Array, "..."], there: Bool[Array, "..."]) -> Float[Array, "..."]:
    return plt.load(ref.at[at], mask=there, other=0.0).astype(jnp.float32)


def _round(y: Array, ref: Any) -> Array:
    return y.astype(ref.dtype).astype(jnp.float32)

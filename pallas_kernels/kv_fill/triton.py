"""Cache fill in Triton's own language, called through jax_triton. Importing this needs triton."""

from __future__ import annotations

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Bool, Float

from pallas_kernels import jax_triton_call
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
) -> KVRows:
    """Same result as the reference within rounding.

    Tokens that are not filled are copied, because each release of jax_triton has a different interface for outputs that
    alias inputs.
    """
    heads, _, channels, _ = weights.projection.shape
    half = 0 if rotary is None else rotary.cos.shape[-1]
    rest, height = channels - 2 * half, power_of_two(heads)
    step, second = (2, 1) if settings.interleaved else (1, half)
    both = project(x, weights, settings.norm)
    # A missing parameter rest_mask needs a pointer; the kernel never reads it.
    tables = (both, both) if rotary is None else (rotary.cos, rotary.sin)
    parameters = tuple(both if a is None else a for a in (weights.bias, weights.key_norm))
    constants = {"T": x.shape[1], "KV": heads, "H": height, "HD": channels, "BLOCK": power_of_two(channels)}
    constants |= {"HALF": half, "TURN": power_of_two(max(half, 1)), "REST": rest, "LEFT": power_of_two(max(rest, 1))}
    constants |= {"STEP": step, "SECOND": second, "SIZE": float(channels), "EPS": settings.key_eps}
    constants |= {"OFFSET": float(settings.key_unit_offset)}
    constants |= {"BIAS": weights.bias is not None, "NORM": weights.key_norm is not None}
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in out]
    grid = (x.shape[0] * x.shape[1],)
    warps = row_warps(height * power_of_two(channels))
    inputs = (both, fill, *parameters, *tables, *out)
    return KVRows(*jax_triton_call.run(_kernel, inputs, shapes, grid=grid, warps=warps, constants=constants))


@triton.jit
def _kernel(
    both, fill, bias, gain, cos, sin, keys, values, keys_out, values_out,
    T: tl.constexpr, KV: tl.constexpr, H: tl.constexpr, HD: tl.constexpr, BLOCK: tl.constexpr,
    HALF: tl.constexpr, TURN: tl.constexpr, REST: tl.constexpr, LEFT: tl.constexpr,
    STEP: tl.constexpr, SECOND: tl.constexpr, SIZE: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, H)[:, None]
    target = (((token // T) * KV + heads) * T + token % T) * HD
    source, key = both + token * (2 * KV * HD), heads * (2 * HD)
    channels = tl.arange(0, BLOCK)[None, :]
    inside = (heads < KV) & (channels < HD)
    if tl.load(fill + token) == 0:
        tl.store(keys_out + target + channels, tl.load(keys + target + channels, mask=inside, other=0.0), mask=inside)
        tl.store(
            values_out + target + channels, tl.load(values + target + channels, mask=inside, other=0.0), mask=inside
        )
    else:
        value = _read(source, bias, key + HD + channels, inside, BIAS)
        tl.store(values_out + target + channels, value.to(values_out.dtype.element_ty), mask=inside)
        turn, left = tl.arange(0, TURN)[None, :], 2 * HALF + tl.arange(0, LEFT)[None, :]
        at_first, at_second = turn * STEP, SECOND + turn * STEP
        pair_mask, rest_mask = (heads < KV) & (turn < HALF), (heads < KV) & (left < HD)
        first = _read(source, bias, key + at_first, pair_mask, BIAS)
        second = _read(source, bias, key + at_second, pair_mask, BIAS)
        rest = _read(source, bias, key + left, rest_mask, BIAS)
        if NORM:
            squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1) + tl.sum(rest * rest, axis=1)
            factor = tl.rsqrt(squares / SIZE + EPS)[:, None]
            first = _apply_key_norm(first, factor, gain, at_first, turn < HALF, OFFSET, both)
            second = _apply_key_norm(second, factor, gain, at_second, turn < HALF, OFFSET, both)
            rest = _apply_key_norm(rest, factor, gain, left, left < HD, OFFSET, both)
        if HALF > 0:
            c = tl.load(cos + token * HALF + turn, mask=turn < HALF, other=0.0)
            s = tl.load(sin + token * HALF + turn, mask=turn < HALF, other=0.0)
            # One statement each: Triton takes no tuple of dtypes.
            kind: tl.constexpr = both.dtype.element_ty
            wide: tl.constexpr = keys_out.dtype.element_ty
            tl.store(keys_out + target + at_first, (first * c - second * s).to(kind).to(wide), mask=pair_mask)
            tl.store(keys_out + target + at_second, (second * c + first * s).to(kind).to(wide), mask=pair_mask)
        if REST > 0:
            tl.store(keys_out + target + left, rest.to(keys_out.dtype.element_ty), mask=rest_mask)


@triton.jit
def _read(source, bias, at, there, BIAS: tl.constexpr):
    """Keys or values plus bias, rounded as the model rounds them, in float32."""
    y = tl.load(source + at, mask=there, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + at, mask=there, other=0.0).to(tl.float32)
        y = y.to(source.dtype.element_ty).to(tl.float32)
    return y


@triton.jit
def _apply_key_norm(y, factor, gain, at, there, OFFSET: tl.constexpr, like):
    """Applies the key norm and its gain, and rounds as the model does."""
    y = y * factor * (OFFSET + tl.load(gain + at, mask=there, other=0.0).to(tl.float32))
    return y.to(like.dtype.element_ty).to(tl.float32)

"""Cache fill in Triton's own language, called through jax_triton. Importing this needs triton."""

from __future__ import annotations

import jax
import triton
import triton.language as tl
from jaxtyping import Array, Bool, Float

from pallas_kernels import jax_triton_call
from pallas_kernels.exit_step.shapes import power_of_two
from pallas_kernels.kv_fill.config import warps
from pallas_kernels.kv_fill.reference import InputNorm, KVRows, Projection, Rotary, Settings, projected


def kv_fill(
    x: Float[Array, "B T D"],
    norm: InputNorm,
    projection: Projection,
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
    heads, _, channels, _ = projection.kernel.shape
    half = 0 if rotary is None else rotary.cos.shape[-1]
    rest, height = channels - 2 * half, power_of_two(heads)
    step, second = (2, 1) if settings.interleaved else (1, half)
    both = projected(x, norm, projection, settings)
    # A missing parameter still needs a pointer; the kernel never reads it.
    tables = (both, both) if rotary is None else (rotary.cos, rotary.sin)
    learned = tuple(both if a is None else a for a in (projection.bias, projection.key_norm))
    constants = {"T": x.shape[1], "KV": heads, "H": height, "HD": channels, "BLOCK": power_of_two(channels)}
    constants |= {"HALF": half, "TURN": power_of_two(max(half, 1)), "REST": rest, "LEFT": power_of_two(max(rest, 1))}
    constants |= {"STEP": step, "SECOND": second, "SIZE": float(channels), "EPS": settings.key_eps}
    constants |= {"OFFSET": float(settings.key_unit_offset)}
    constants |= {"BIAS": projection.bias is not None, "NORM": projection.key_norm is not None}
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in out]
    grid = (x.shape[0] * x.shape[1],)
    number = warps(height * power_of_two(channels))
    inputs = (both, fill, *learned, *tables, *out)
    return KVRows(*jax_triton_call.run(_kernel, inputs, shapes, grid=grid, warps=number, constants=constants))


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
        turning, still = (heads < KV) & (turn < HALF), (heads < KV) & (left < HD)
        first = _read(source, bias, key + at_first, turning, BIAS)
        second = _read(source, bias, key + at_second, turning, BIAS)
        rest = _read(source, bias, key + left, still, BIAS)
        if NORM:
            squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1) + tl.sum(rest * rest, axis=1)
            factor = tl.rsqrt(squares / SIZE + EPS)[:, None]
            first = _scaled(first, factor, gain, at_first, turn < HALF, OFFSET, both)
            second = _scaled(second, factor, gain, at_second, turn < HALF, OFFSET, both)
            rest = _scaled(rest, factor, gain, left, left < HD, OFFSET, both)
        if HALF > 0:
            c = tl.load(cos + token * HALF + turn, mask=turn < HALF, other=0.0)
            s = tl.load(sin + token * HALF + turn, mask=turn < HALF, other=0.0)
            kind, wide = both.dtype.element_ty, keys_out.dtype.element_ty
            tl.store(keys_out + target + at_first, (first * c - second * s).to(kind).to(wide), mask=turning)
            tl.store(keys_out + target + at_second, (second * c + first * s).to(kind).to(wide), mask=turning)
        if REST > 0:
            tl.store(keys_out + target + left, rest.to(keys_out.dtype.element_ty), mask=still)


@triton.jit
def _read(source, bias, at, there, BIAS: tl.constexpr):
    """Keys or values plus bias, rounded as the model rounds them, in float32."""
    y = tl.load(source + at, mask=there, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + at, mask=there, other=0.0).to(tl.float32)
        y = y.to(source.dtype.element_ty).to(tl.float32)
    return y


@triton.jit
def _scaled(y, factor, gain, at, there, OFFSET: tl.constexpr, like):
    """Applies the key norm and its gain, and rounds as the model does."""
    y = y * factor * (OFFSET + tl.load(gain + at, mask=there, other=0.0).to(tl.float32))
    return y.to(like.dtype.element_ty).to(tl.float32)

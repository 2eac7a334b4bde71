"""Weights stored as small floats or as indices into a table: bitsandbytes, FP8, MXFP4, plain compressed-tensors.

NF4 and double quantisation: Dettmers et al. 2023 (arXiv:2305.14314); LLM.int8: Dettmers et al. 2022 (arXiv:2208.07339).
FP8 by blocks: DeepSeek-V3 (arXiv:2412.19437). MXFP4: the OCP Microscaling formats (arXiv:2310.10537).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from convert.sources.quantised.parts import (
    Packed,
    Settings,
    Stored,
    apply_scales,
    block_indices,
    check_parts,
    find_modules,
    matrix_shape,
    scale_dtype,
    unsupported_error,
)
from tide_jax.errors import TideError, shorten
from tide_jax.model.files.shards import DTYPES, TensorInfo

_SCALE_DTYPES = (*DTYPES, "F8_E8M0", "U8")
_DTYPE_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
# Sign, two exponent bits, one mantissa bit.
_E2M1_VALUES = np.array([s * v for s in (1, -1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)], np.float32)


def bitsandbytes(stored: Stored, settings: Settings) -> dict[str, Packed]:
    """4-bit weights with a table of 16 values, and 8-bit weights with a scale per output."""
    return _find_four_bit(stored) | _find_eight_bit(stored)


def _find_four_bit(stored: Stored) -> dict[str, Packed]:
    packed: dict[str, Packed] = {}
    for kind in ("nf4", "fp4"):
        state_part = f"quant_state.bitsandbytes__{kind}"
        nested = ("nested_absmax", "nested_quant_map")
        for weight, parts in find_modules(stored, state_part, ("absmax", "quant_map"), nested):
            if weight not in stored.tensors:
                raise TideError(f"{stored.description}: {parts[state_part]} comes without {weight}: download it again")
            state = _read_quant_state(stored, parts[state_part], weight)
            count, blocks = math.prod(state["shape"]), -(-math.prod(state["shape"]) // state["blocksize"])
            shapes = {"absmax": (blocks,), "quant_map": (16,), "nested_quant_map": (256,)}
            check_parts(stored, parts, {"absmax": ("U8",) if "nested_absmax" in parts else ("F32",)}, shapes)
            info = stored.tensors[weight]
            itemsize = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}.get(info.dtype, 0)
            if math.prod(info.shape) * itemsize != -(-count // 2):
                raise unsupported_error(
                    stored, f"{weight} {list(info.shape)} {info.dtype} does not hold {count} numbers of 4 bits"
                )
            packed[weight] = Packed(
                TensorInfo(tuple(state["shape"]), _DTYPE_NAMES.get(state["dtype"], "F32")),
                (weight, *parts.values()),
                functools.partial(_read_four_bit, stored, weight, parts, state),
            )
    return packed


def _read_quant_state(stored: Stored, name: str, weight: str) -> dict[str, Any]:
    """Reads the JSON that describes how a weight was packed."""
    try:
        state = json.loads(stored.read_stored(name).tobytes())
        state["shape"], state["blocksize"] = tuple(map(int, state["shape"])), int(state["blocksize"])
        state["dtype"] = str(state["dtype"])
        if "nested_blocksize" in state:
            state["nested_blocksize"], state["nested_offset"] = (
                int(state["nested_blocksize"]),
                float(state["nested_offset"]),
            )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TideError(
            f"{stored.description}: {name} does not say how {weight} is packed ({error}): download it again"
        ) from error
    return state


def _read_four_bit(stored: Stored, weight: str, parts: dict[str, str], state: dict[str, Any]) -> np.ndarray:
    maxima = stored.read_stored(parts["absmax"])
    if "nested_absmax" in parts:
        codes, table = maxima, stored.read_stored(parts["nested_quant_map"])
        outer = stored.read_stored(parts["nested_absmax"])
        maxima = table[codes] * outer[np.arange(len(codes)) // state["nested_blocksize"]] + state["nested_offset"]
    values = stored.read_stored(parts["quant_map"]).astype(np.float32)
    pairs = np.stack([np.repeat(values, 16), np.tile(values, 16)], axis=-1)  # a byte's high half comes first
    numbers = pairs[stored.read_stored(weight).reshape(-1).view(np.uint8)].reshape(-1)
    for start in range(0, numbers.size, step := state["blocksize"] * 2**16):
        block = numbers[start : start + step]
        block *= np.repeat(maxima[start // state["blocksize"] :][: 2**16], state["blocksize"])[: block.size]
    return numbers[: math.prod(state["shape"])].reshape(state["shape"])


def _find_eight_bit(stored: Stored) -> dict[str, Packed]:
    packed: dict[str, Packed] = {}
    for _, parts in find_modules(stored, "SCB", ("weight",), ("weight_format",)):
        out, inputs = matrix_shape(stored, parts["weight"])
        check_parts(stored, parts, {"weight": ("I8",), "SCB": ("F32",)}, {"SCB": (out,)})
        if "weight_format" in parts and (form := int(stored.read_stored(parts["weight_format"]).reshape(-1)[0])):
            raise unsupported_error(
                stored, f"{parts['weight']} is laid out for a kernel (weight_format {form}, expected 0)"
            )
        packed[parts["weight"]] = Packed(
            TensorInfo((out, inputs), "F32"),
            tuple(parts.values()),
            functools.partial(_read_eight_bit, stored, parts, out, inputs),
            functools.partial(_eight_bit_scales, stored, parts),
        )
    return packed


def _eight_bit_scales(stored: Stored, parts: dict[str, str]) -> np.ndarray:
    return stored.read_stored(parts["SCB"])[:, None] / np.float32(127)


def _read_eight_bit(stored: Stored, parts: dict[str, str], out: int, inputs: int) -> np.ndarray:
    scales = _eight_bit_scales(stored, parts)
    return apply_scales(stored.read_stored(parts["weight"]), scales, np.arange(out), np.zeros(inputs, np.int64))


def fp8(stored: Stored, settings: Settings) -> dict[str, Packed]:
    """8-bit floats with a scale for each block of weights, or one scale for all."""
    default = (1, 32) if settings.get("quant_method") == "mxfp8" else (128, 128)
    block = settings.get("weight_block_size") or default
    return _find_scaled(stored, "weight_scale_inv", ("F8_E4M3",), block)


def plain_numbers(stored: Stored, weights: Settings) -> dict[str, Packed]:
    """compressed-tensors' unpacked formats: an 8-bit float or integer for each weight."""
    strategy, group = weights.get("strategy"), weights.get("group_size")
    block = {"tensor": None, "channel": (1, None), "group": (1, group), "block": weights.get("block_structure")}
    if strategy not in block:
        raise unsupported_error(stored, f"scales by {shorten(strategy)} are not supported")
    return _find_scaled(stored, "weight_scale", ("F8_E4M3", "I8"), block[strategy])


def _find_scaled(
    stored: Stored, scale: str, dtypes: Sequence[str], block: Sequence[int | None] | None
) -> dict[str, Packed]:
    """Weights whose part `scale` has a scale for each block; `block` is the size (None: a whole axis)."""
    packed: dict[str, Packed] = {}
    for _, parts in find_modules(stored, scale, ("weight",), ("weight_zero_point",)):
        out, inputs = matrix_shape(stored, parts["weight"])
        grid = stored.tensors[parts[scale]].shape
        rows, columns = block if block and math.prod(grid) != 1 else (None, None)
        sizes = (rows or out, columns or inputs)
        expected = (-(-out // sizes[0]), -(-inputs // sizes[1]))
        shapes = {} if math.prod(grid) == math.prod(expected) == 1 else {scale: expected, "weight_zero_point": expected}
        check_parts(stored, parts, {"weight": dtypes, scale: _SCALE_DTYPES, "weight_zero_point": ("I8",)}, shapes)
        integers = stored.tensors[parts["weight"]].dtype == "I8"
        by_output = integers and expected in ((out, 1), (1, 1))
        packed[parts["weight"]] = Packed(
            TensorInfo((out, inputs), scale_dtype(stored, parts[scale])),
            tuple(parts.values()),
            functools.partial(_read_scaled, stored, parts, scale, expected, sizes),
            functools.partial(_block_scales, stored, parts[scale], expected) if by_output else None,
        )
    return packed


def _block_scales(stored: Stored, name: str, grid: tuple[int, int]) -> np.ndarray:
    scales = stored.read_stored(name)
    if scales.dtype == np.uint8:  # exponents, stored as bytes
        scales = scales.view(ml_dtypes.float8_e8m0fnu)
    return scales.reshape(grid)


def _read_scaled(
    stored: Stored, parts: dict[str, str], scale: str, grid: tuple[int, int], sizes: tuple[int, int]
) -> np.ndarray:
    scales = _block_scales(stored, parts[scale], grid)
    zeros = stored.read_stored(parts["weight_zero_point"]).reshape(grid) if "weight_zero_point" in parts else None
    numbers = stored.read_stored(parts["weight"])
    rows, columns = (block_indices(count, 1, size) for count, size in zip(numbers.shape, sizes, strict=True))
    return apply_scales(numbers, scales, rows, columns, zeros)


def mxfp4(stored: Stored, settings: Settings) -> dict[str, Packed]:
    """Experts [E, in, out] of 4-bit floats with an exponent per 32 inputs, which bfloat16 represents exactly."""
    packed: dict[str, Packed] = {}
    for name in stored.tensors:
        weight = name.removesuffix("_blocks")
        if weight == name:
            continue
        parts = {"blocks": name, "scales": f"{weight}_scales"}
        shape = stored.tensors[name].shape
        if parts["scales"] not in stored.tensors or len(shape) != 4 or shape[3] != 16:
            raise unsupported_error(stored, f"{name} {list(shape)} has no blocks of 16 bytes with {parts['scales']}")
        check_parts(stored, parts, {"blocks": ("U8",), "scales": ("U8", "F8_E8M0")}, {"scales": shape[:3]})
        experts, out, blocks, _ = shape
        packed[weight] = Packed(
            TensorInfo((experts, 32 * blocks, out), "BF16"),
            tuple(parts.values()),
            functools.partial(_read_mxfp4, stored, parts),
        )
    return packed


def _read_mxfp4(stored: Stored, parts: dict[str, str]) -> np.ndarray:
    # A byte's low half comes first.
    pairs = np.stack([np.tile(_E2M1_VALUES, 16), np.repeat(_E2M1_VALUES, 16)], axis=-1).astype(ml_dtypes.bfloat16)
    blocks = stored.read_stored(parts["blocks"])
    scales = stored.read_stored(parts["scales"]).view(ml_dtypes.float8_e8m0fnu).astype(ml_dtypes.bfloat16)
    experts = np.empty((*blocks.shape[:2], 32 * blocks.shape[2]), ml_dtypes.bfloat16)
    for expert, codes, exponents in zip(experts, blocks, scales, strict=True):
        expert[...] = (pairs[codes].reshape(*codes.shape[:2], 32) * exponents[..., None]).reshape(expert.shape)
    return experts.swapaxes(1, 2)

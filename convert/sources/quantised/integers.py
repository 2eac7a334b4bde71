"""Weights packed as small integers: GPTQ, AWQ and compressed-tensors' packed format.

GPTQ: Frantar et al. 2022 (arXiv:2210.17323), in the format of AutoGPTQ and GPTQModel. AWQ: Lin et al. 2023
(arXiv:2306.00978), in AutoAWQ's format. All store int32 words of unsigned integers, with a scale and a zero point for
each group of inputs.
"""

from __future__ import annotations

import functools

import numpy as np

from convert.sources.base import CONV1D_TYPES
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
    scales_by_output,
    unpack_words,
    unsupported_error,
)
from convert.sources.quantised.zeros import is_stored_less_one, read_zeros
from tide_jax.errors import shorten
from tide_jax.model.files.shards import DTYPES, TensorInfo

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BITS = (2, 4, 8)


def gptq(stored: Stored, settings: Settings) -> dict[str, Packed]:
    """Weights [out, in] packed along their inputs, in groups by position or by `g_idx`."""
    form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        raise unsupported_error(
            stored,
            f"GPTQ weights in the format {shorten(form)!r} of a kernel are not supported, only gptq and gptq_v2",
        )
    modules: dict[str, tuple[dict[str, str], int, int]] = {}
    for module, parts in find_modules(stored, "qweight", ("qzeros", "scales"), ("g_idx",)):
        rows, out = matrix_shape(stored, parts["qweight"])
        groups = matrix_shape(stored, parts["scales"])[0]
        indexed = stored.tensors[parts["g_idx"]].shape if "g_idx" in parts else None
        bits = rows * 32 // indexed[0] if indexed else settings.get("bits")
        if bits not in _BITS:
            raise unsupported_error(
                stored, f"{parts['qweight']} has weights of {bits} bits, only 2, 4 and 8 are supported"
            )
        inputs = rows * 32 // bits
        check_parts(
            stored,
            parts,
            {"qweight": ("I32",), "qzeros": ("I32",), "scales": tuple(DTYPES), "g_idx": ("I32",)},
            {"scales": (groups, out), "qzeros": (groups, -(-out * bits // 32)), "g_idx": (inputs,)},
        )
        modules[f"{module}.weight"] = parts, bits, out
    if not modules:
        return {}
    less_one = is_stored_less_one(stored, list(modules.values()), settings.get("sym") is True, form == "gptq")
    in_out, size = stored.config.get("model_type") in CONV1D_TYPES, settings.get("group_size")
    packed: dict[str, Packed] = {}
    for name, (parts, bits, out) in modules.items():
        inputs = stored.tensors[parts["qweight"]].shape[0] * 32 // bits
        packed[name] = Packed(
            TensorInfo((inputs, out) if in_out else (out, inputs), scale_dtype(stored, parts["scales"])),
            tuple(parts.values()),
            functools.partial(_read_gptq, stored, parts, bits, size, less_one, in_out),
            scales_by_output(stored, parts["scales"], 0, transposed=not in_out),
        )
    return packed


def _read_gptq(
    stored: Stored, parts: dict[str, str], bits: int, group_size: int | None, less_one: bool, in_out: bool
) -> np.ndarray:
    numbers = unpack_words(stored.read_stored(parts["qweight"]).T, bits)
    scales = stored.read_stored(parts["scales"]).T
    zeros = read_zeros(stored, parts["qzeros"], bits, len(scales), less_one).T
    if "g_idx" in parts:
        columns = stored.read_stored(parts["g_idx"])
        if columns.min() < 0 or columns.max() >= scales.shape[1]:
            raise unsupported_error(stored, f"{parts['g_idx']} names groups beyond the {scales.shape[1]} in the file")
    else:
        columns = _group_indices(stored, parts["scales"], numbers.shape[1], scales.shape[1], group_size)
    weight = apply_scales(numbers, scales, np.arange(len(scales)), columns, zeros)
    return weight.T if in_out else weight


def awq(stored: Stored, settings: Settings) -> dict[str, Packed]:
    """4-bit weights [out, in], packed along their outputs in an interleaved order."""
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version != "gemm":
        raise unsupported_error(
            stored, f"AWQ weights of the version {shorten(version)!r} are not supported, only 'gemm'"
        )
    if (bits := settings.get("bits") or settings.get("w_bit")) != 4:
        raise unsupported_error(stored, f"AWQ weights of {bits} bits are not supported, only 4")
    packed: dict[str, Packed] = {}
    for module, parts in find_modules(stored, "qweight", ("qzeros", "scales")):
        inputs, words = matrix_shape(stored, parts["qweight"])
        groups = matrix_shape(stored, parts["scales"])[0]
        check_parts(
            stored,
            parts,
            {"qweight": ("I32",), "qzeros": ("I32",), "scales": tuple(DTYPES)},
            {"scales": (groups, 8 * words), "qzeros": (groups, words)},
        )
        columns = _group_indices(stored, parts["scales"], inputs, groups, settings.get("group_size"))
        packed[f"{module}.weight"] = Packed(
            TensorInfo((8 * words, inputs), scale_dtype(stored, parts["scales"])),
            tuple(parts.values()),
            functools.partial(_read_awq, stored, parts, columns),
            scales_by_output(stored, parts["scales"], 0, transposed=True),
        )
    return packed


def _read_awq(stored: Stored, parts: dict[str, str], columns: np.ndarray) -> np.ndarray:
    numbers, zeros = (unpack_words(stored.read_stored(parts[p]), 4, _AWQ_ORDER).T for p in ("qweight", "qzeros"))
    scales = stored.read_stored(parts["scales"]).T
    return apply_scales(numbers, scales, np.arange(len(scales)), columns, zeros)


def packed_integers(stored: Stored, bits: int, group_size: int | None) -> dict[str, Packed]:
    """compressed-tensors' "pack-quantized": weights [out, in] packed along their inputs, signed by an offset."""
    if bits not in _BITS:
        raise unsupported_error(stored, f"packed weights of {bits} bits are not supported, only 2, 4 and 8")
    packed: dict[str, Packed] = {}
    for module, parts in find_modules(
        stored, "weight_packed", ("weight_scale", "weight_shape"), ("weight_zero_point", "weight_g_idx")
    ):
        if "weight_g_idx" in parts:
            raise unsupported_error(stored, f"{parts['weight_g_idx']}: groups by activation order are not supported")
        check_parts(stored, parts, {"weight_shape": ("I64", "I32")}, {"weight_shape": (2,)})
        out, inputs = map(int, stored.read_stored(parts["weight_shape"]))
        groups = matrix_shape(stored, parts["weight_scale"])[1]
        check_parts(
            stored,
            parts,
            {"weight_packed": ("I32",), "weight_scale": tuple(DTYPES), "weight_zero_point": ("I32", "I8")},
            {"weight_packed": (out, -(-inputs * bits // 32)), "weight_scale": (out, groups)},
        )
        columns = _group_indices(stored, parts["weight_scale"], inputs, groups, group_size)
        packed[f"{module}.weight"] = Packed(
            TensorInfo((out, inputs), scale_dtype(stored, parts["weight_scale"])),
            tuple(parts.values()),
            functools.partial(_read_packed, stored, parts, bits, (out, inputs), columns),
            scales_by_output(stored, parts["weight_scale"], 1),
        )
    return packed


def _read_packed(
    stored: Stored, parts: dict[str, str], bits: int, shape: tuple[int, int], columns: np.ndarray
) -> np.ndarray:
    offset = 2 ** (bits - 1)
    numbers = unpack_words(stored.read_stored(parts["weight_packed"]), bits)[:, : shape[1]]
    scales = stored.read_stored(parts["weight_scale"])
    zeros = np.full_like(scales, offset, np.float32)
    if "weight_zero_point" in parts:
        stored_zeros = stored.read_stored(parts["weight_zero_point"])
        if stored_zeros.dtype == np.int32:  # packed along the outputs, with the same offset
            zeros = unpack_words(stored_zeros.T, bits).T[: shape[0]]
        else:
            zeros += stored_zeros
    return apply_scales(numbers, scales, np.arange(shape[0]), columns, zeros)


def _group_indices(stored: Stored, name: str, inputs: int, groups: int, size: int | None) -> np.ndarray:
    """Group index of each input. Raises TideError if the number of groups does not match their size."""
    size = inputs if size in (None, -1) else size
    if groups != 1 and groups != -(-inputs // size):
        raise unsupported_error(stored, f"{name} has {groups} groups, expected groups of {size} in {inputs} inputs")
    return block_indices(inputs, groups, inputs if groups == 1 else size)

"""Reads the rotary embedding settings of a Hugging Face configuration and resolves every default."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tide_jax.errors import TideError, shorten
from tide_jax.model.architecture import RopeConfig


def rope_config(hf: Any, head_dim: int, layer_type: str = "full_attention", **flags: Any) -> RopeConfig:
    """Returns the rotary embedding of one layer type.

    Args:
      hf: a transformers configuration; its `rope_parameters` are flat, or nested by layer type.
      head_dim: channels of a head.
      flags: further fields of `RopeConfig`.

    Raises:
      TideError: the rope type is not implemented, or a setting it needs is missing or makes no sense.
    """
    settings = hf.rope_parameters
    settings = settings[layer_type] if layer_type in hf.nested_rope_parameter_keys(settings) else settings
    kind = settings.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _READERS:
        raise TideError(f"rope_type {shorten(repr(kind))} is not supported, expected one of {', '.join(_READERS)}")
    _check_numbers(settings)
    share = settings.get("partial_rotary_factor") or 1.0
    rotary_dim = head_dim if kind == "proportional" else int(head_dim * share)
    if rotary_dim % 2:
        raise TideError(
            f"config.json rotates {rotary_dim} of {head_dim} channels of a head, expected an even number; correct it"
        )
    try:
        extra = _READERS[kind](hf, settings)
        flags |= {"turning": int(share * head_dim // 2)} if kind == "proportional" else {}
        rope = RopeConfig(theta=float(settings["rope_theta"]), rotary_dim=rotary_dim, kind=kind, **extra, **flags)
        return _check_factor_counts(rope)
    except KeyError as error:
        raise TideError(f"rope_type {kind!r} needs {error} in config.json's rope_parameters; add it") from error
    except TideError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise TideError(
            f"config.json's rope_parameters are invalid for rope_type {kind!r} ({error}); correct them"
        ) from error


def _check_numbers(settings: Mapping[str, Any]) -> None:
    """Raises TideError for a number setting whose value is not a number."""
    for name, value in settings.items():
        if (
            name in _NUMBER_SETTINGS
            and value is not None
            and (isinstance(value, bool) or not isinstance(value, int | float))
        ):
            raise TideError(f"config.json's rope_parameters have {name}={shorten(repr(value))}, expected a number")


def _check_factor_counts(rope: RopeConfig) -> RopeConfig:
    if rope.kind == "longrope":
        for name, factors in (("short_factor", rope.short_factor), ("long_factor", rope.long_factor)):
            if len(factors) != rope.rotary_dim // 2:
                raise TideError(
                    f"config.json's rope_parameters have {len(factors)} values in {name}, expected "
                    f"{rope.rotary_dim // 2}, one for each pair of rotated channels"
                )
    return rope


def _default(hf: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _linear(hf: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"factor": float(settings["factor"])}


def _proportional(hf: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"factor": float(settings.get("factor") or 1.0)}


def _dynamic(hf: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"factor": float(settings["factor"]), "max_positions": hf.max_position_embeddings}


def _llama3(hf: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "factor": float(settings["factor"]),
        "original_max_positions": int(settings["original_max_position_embeddings"]),
        "low_freq_factor": float(settings["low_freq_factor"]),
        "high_freq_factor": float(settings["high_freq_factor"]),
    }


def _yarn(hf: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    original_length = int(settings["original_max_position_embeddings"])
    factor = settings.get("factor") or hf.max_position_embeddings / original_length
    return {
        "factor": float(factor),
        "original_max_positions": original_length,
        "attention_factor": _yarn_attention(factor, settings),
        "beta_fast": float(settings.get("beta_fast") or 32),
        "beta_slow": float(settings.get("beta_slow") or 1),
        "truncate": bool(settings.get("truncate", True)),
    }


def _yarn_attention(factor: float, settings: Mapping[str, Any]) -> float:
    """YaRN's temperature (Peng et al. 2023, section 3.4); DeepSeek's form with two parameters if both are given."""
    if (stated := settings.get("attention_factor")) is not None:
        return float(stated)

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all_dim = settings.get("mscale"), settings.get("mscale_all_dim")
    return temperature(mscale) / temperature(mscale_all_dim) if mscale and mscale_all_dim else temperature(1.0)


def _longrope(hf: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    original_length = int(settings["original_max_position_embeddings"])
    factor = settings.get("factor") or hf.max_position_embeddings / original_length
    attention = settings.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0
    return {
        "factor": float(factor),
        "original_max_positions": original_length,
        "attention_factor": float(attention),
        "short_factor": tuple(map(float, settings["short_factor"])),
        "long_factor": tuple(map(float, settings["long_factor"])),
    }


_NUMBER_SETTINGS = {
    *("rope_theta", "factor", "attention_factor", "partial_rotary_factor", "original_max_position_embeddings"),
    *("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim"),
    *("alpha", "llama_4_scaling_beta", "short_mscale", "long_mscale"),
}
_READERS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}

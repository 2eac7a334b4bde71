"""Translates rotary settings of GGUF files to the `rope_parameters` of a Hugging Face configuration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convert.sources.gguf.file import shorten
from convert.sources.gguf.hyperparameters import Hyperparameters

_KINDS = ("none", "linear", "yarn", "longrope")
_YARN_FIELDS = {
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}


def rope_parameters(hp: Hyperparameters, width: int, context: int) -> dict[str, Any]:
    """Returns the rotary settings of a file.

    Args:
      width: rotated channels of a head.
      context: the model's context length.

    Raises:
      TideError: a kind of scaling that is not supported.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": hp.take("rope.freq_base")}
    hp.ignore("rope.scaling.finetuned", "rope.scale_linear")
    factor, kind = hp.take("rope.scaling.factor"), hp.take("rope.scaling.type")
    if kind not in _KINDS:
        raise hp.unsupported_error(f"rope.scaling.type={shorten(kind)}: not known, expected {', '.join(_KINDS)}")
    stated = hp.stated_value("rope.scaling.original_context_length")
    original, attention = hp.take("rope.scaling.original_context_length"), hp.take("rope.scaling.attn_factor")
    # Frequency divisors in the file have precedence over the named kind of scaling.
    factors = hp.vector("rope_freqs.weight")
    if factors is not None and not np.all(factors == 1.0):
        if factor not in (0.0, 1.0):
            raise hp.unsupported_error(f"rope.scaling.factor={factor}: not supported together with rope_freqs.weight")
        return rope | _llama3(hp, rope["rope_theta"], factors, width, stated or 8192)
    long, short = hp.vector("rope_factors_long.weight"), hp.vector("rope_factors_short.weight")
    if long is not None and short is not None:
        return rope | _longrope(long, short, attention, context, original or context)
    if attention != 1.0:
        raise hp.unsupported_error(
            f"rope.scaling.attn_factor={attention}: not supported without longrope's factors, expected 1.0"
        )
    if kind == "none" or factor in (0.0, 1.0):
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return rope | _yarn(hp, factor, original)
    raise hp.unsupported_error(
        f"rope.scaling.type={kind!r}: not supported without longrope's factors, expected none, linear or yarn"
    )


def _yarn(hp: Hyperparameters, factor: float, original: int) -> dict[str, Any]:
    hp.expect("rope.scaling.yarn_ext_factor", -1.0, 1.0)
    given = {name: hp.take(f"rope.scaling.{key}") for name, key in _YARN_FIELDS.items()}
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return yarn | {name: value for name, value in given.items() if value is not None}


def _longrope(long: np.ndarray, short: np.ndarray, attention: float, context: int, original: int) -> Any:
    stretch = context / original
    usual = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    # In float32 the usual value differs slightly from the one that transformers computes.
    unusual = not math.isclose(attention, usual, rel_tol=1e-6)
    return {
        "rope_type": "longrope",
        "factor": stretch,
        "original_max_position_embeddings": original,
        "long_factor": _decimals(long),
        "short_factor": _decimals(short),
        "attention_factor": attention if unusual else usual,
    }


def _decimals(values: np.ndarray) -> list[float]:
    """Shortest decimals of float32 numbers, which are the intended values."""
    return [float(str(value)) for value in values.astype(np.float32)]


def _llama3(hp: Hyperparameters, theta: float, factors: np.ndarray, width: int, original: int) -> dict[str, Any]:
    """Parameters of Llama 3.1's rotary scaling that give the divisors [width / 2] in `rope_freqs.weight`.

    Only the stretch factor differs between published models; the band edges are 1 and 4, in Llama 4 both 1. Raises
    TideError if no stretch factor gives these divisors.
    """
    if factors.shape != (width // 2,):
        raise hp.unsupported_error(f"rope: rope_freqs.weight has shape {list(factors.shape)}, expected [{width // 2}]")
    factor = float(str(np.float32(factors.max())))
    wavelengths = 2 * math.pi * theta ** (np.arange(0, width, 2) / width)
    for low, high in ((1.0, 4.0), (1.0, 1.0)):
        with np.errstate(divide="ignore"):
            kept = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
        expected = 1.0 / ((1.0 - kept) / factor + kept)
        if np.allclose(factors, expected, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise hp.unsupported_error("rope: rope_freqs.weight doesn't follow Llama 3's rotary scaling, expected such factors")

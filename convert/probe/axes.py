"""Candidate values for the flags of attention that names and shapes don't determine, likely ones first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from convert.configuration.rope import rope_config
from convert.families.alibi import alibi_slopes, mpt_slopes
from convert.probe.trace import Trace
from tide_jax.errors import TideError
from tide_jax.model.architecture import RopeConfig

_THETA = 10000.0


def _ropes(trace: Trace, width: int) -> list[RopeConfig | None]:
    """Rotary embeddings that the configuration may mean, for heads of `width` channels; None is no rotation."""
    plain = [
        RopeConfig(theta=theta, rotary_dim=dim)
        for dim, theta in itertools.product(_rotary_dims(trace, width), _thetas(trace))
    ]
    found = [*_declared_ropes(trace, width), *plain]
    likely = [dataclasses.replace(rope, interleaved=paired) for paired in (False, True) for rope in found]
    reversed_ = [dataclasses.replace(rope, reverse=True) for rope in likely]
    return list(dict.fromkeys([*likely, None, *reversed_]))


def scales(trace: Trace, width: int, hidden: int, layer: int) -> list[float]:
    """Factors that query-key products may have."""
    from_settings = [abs(v) for v in trace.settings.values() if v]
    found = [width**-0.5, 1.0, *(f(v) for v in from_settings for f in (float, lambda v: v**-0.5, lambda v: 1 / v))]
    found += [1 / width, hidden**-0.5, width**-0.5 / (layer + 1)]
    return list(dict.fromkeys(found))


def nearest_known(trace: Trace, fitted: float, known: Sequence[float]) -> float:
    """Replaces a fitted number by the known number it approximates, if any."""
    best = min(known, key=lambda value: abs(value - fitted))
    return best if abs(best - fitted) <= 1e-3 * abs(best) else trace.snap_to_known(fitted)


def positions(trace: Trace, heads: int, width: int) -> list[dict[str, Any]]:
    """Ways in which attention may encode positions, as fields of `AttentionType`."""
    biases = dict.fromkeys((alibi_slopes(heads), mpt_slopes(heads)))
    linear = [{"alibi": slopes, "alibi_bfloat16": rounded} for rounded in (False, True) for slopes in biases]
    return [{"rope": rope} for rope in _ropes(trace, width)] + linear


def softcaps(trace: Trace) -> list[float | None]:
    """Caps for attention scores."""
    return [None, *(float(v) for v in trace.numbers_named("cap") if v > 0)]


def clips(trace: Trace) -> list[float | None]:
    """Clamps for queries, keys and values. If the numbers never reach a clamp, the configuration decides."""
    declared = [float(v) for v in trace.numbers_named("clip_?qkv|qkv_?clip") if v > 0]
    return [*declared, None, *(float(v) for v in trace.numbers_named("clip|clamp") if v > 0)]


def limits(trace: Trace) -> list[float | None]:
    """Clamps for gated activations. If the numbers never reach a clamp, the configuration decides."""
    declared = [float(v) for v in trace.numbers_named("(glu|act|mlp|activation)_limit") if v > 0]
    return [*declared, None, *(float(v) for v in trace.numbers_named("limit|clamp") if v > 0)]


def windows(trace: Trace) -> Iterator[tuple[str, int, int]]:
    """Windows and chunks: field, small size in the reference, true size; with and without the token itself counted."""
    for more in (0, 1):
        for small, true in trace.reference.windows.items():
            yield "window", small + more, true + more
            yield "chunk", small + more, true + more


def _thetas(trace: Trace) -> list[float]:
    from_settings = [v for v in trace.numbers_named("theta|base|freq|rope|rotary") if v >= 100]
    return list(dict.fromkeys([*map(float, from_settings), _THETA]))


def _rotary_dims(trace: Trace, width: int) -> list[int]:
    from_settings = trace.numbers_named("rot|rope|pct|partial")
    sizes: Sequence[float] = [*(v if v > 1 else v * width for v in from_settings), width, width / 2, width / 4]
    return list(dict.fromkeys(int(d) for d in sizes if 2 <= d <= width and int(d) == d and d % 2 == 0))


def _declared_ropes(trace: Trace, width: int) -> Iterator[RopeConfig]:
    """Rotary embeddings that the configuration declares in transformers' format."""
    hf = trace.reference.hf
    text = hf.get_text_config() if hasattr(hf, "get_text_config") else hf
    if not isinstance(getattr(text, "rope_parameters", None), dict):
        return
    for kind in dict.fromkeys([*text.rope_parameters, "full_attention"]):
        try:
            yield rope_config(text, width, kind)
        except (TideError, AttributeError):  # for other heads, or not in transformers' format
            continue

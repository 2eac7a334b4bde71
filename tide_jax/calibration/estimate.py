"""Estimates the time of calibration on an accelerator from counts of tokens, operations and bytes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from tide_jax.calibration.calibrate import REPORT_THRESHOLDS
from tide_jax.calibration.collect import HELD_OUT_TEXTS, MIN_TOKENS
from tide_jax.calibration.confidence_training import HELD_BACK_SHARE
from tide_jax.calibration.reservoir import Reservoir
from tide_jax.calibration.translator_fit import MAX_TOKENS
from tide_jax.calibration.tuned_heads import BATCH_TOKENS, MAX_VOCABULARY
from tide_jax.config import CalibrationConfig, exit_point_layers
from tide_jax.model.architecture import AttentionType, DecoderConfig, RopeConfig
from tide_jax.model.decoder import abstract_parameters

_RIDGE_COUNT = 5  # ridge strengths tried for an affine head


class Accelerator(NamedTuple):
    """Assumed speed of a machine.

    Attributes:
      name: name of the device.
      peak_flops: dense bfloat16 operations a second of matrix products, from the data sheet.
      utilisation: share of `peak_flops` that a forward pass reaches.
      float32_flops: float32 operations a second of the fits' products, without tensor cores, from the data sheet.
      float32_utilisation: share of `float32_flops` that the fits reach.
      transfer_bytes: bytes a second between host and device, as reached in practice.
    """

    name: str
    peak_flops: float
    utilisation: float
    float32_flops: float
    float32_utilisation: float
    transfer_bytes: float


H100 = Accelerator("H100 SXM", 989e12, 0.35, 67e12, 0.5, 25e9)
"""NVIDIA's H100 on PCIe 5: peaks from the data sheet, assumed utilisation."""


def eight_billion_config() -> DecoderConfig:
    """Configuration of a typical model with 8 billion parameters (the shape of Llama 3.1).

    >>> f"{sum(operations_per_token(eight_billion_config(), width=0)) / 1e9:.2f} GFLOP a token"
    '15.01 GFLOP a token'
    """
    return DecoderConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        max_positions=131072,
        attention_types=(AttentionType(scale=128**-0.5, rope=RopeConfig(theta=500000.0, rotary_dim=128)),),
        attention_pattern=(0,) * 32,
    )


def operations_per_token(config: DecoderConfig, *, width: int) -> tuple[float, float]:
    """Floating-point operations for one token in a row of `width` tokens: of the layers, and of the output head.

    Counts two for each matrix weight that the token uses, and four for each pair of token and query channel.
    """
    body, table = 0.0, config.vocab_size * config.head_size
    for path, shape in abstract_parameters(config).items():
        if path.startswith("layers.") and len(shape) > 1:
            used = 1.0
            if config.moe is not None and ".experts." in path:
                used = config.moe.experts_per_token / config.moe.num_experts
            body += 2.0 * used * math.prod(shape)
    return body + 4.0 * width * config.num_layers * config.num_heads * config.head_dim, 2.0 * table


def estimate_calibration(
    model: DecoderConfig,
    config: CalibrationConfig | None = None,
    *,
    texts: int = 2000,
    tokens: int = 275_000,
    padding: float = 1.1,
    accelerator: Accelerator = H100,
) -> dict[str, Any]:
    """Estimates the seconds of each stage of `tide_jax.calibrate`, without compilation and loading.

    Args:
      model: configuration of the model.
      config: calibration settings; default `CalibrationConfig()`.
      texts: number of texts read.
      tokens: total tokens of all texts.
      padding: tokens run, padding included, divided by tokens read.
      accelerator: assumed speed of the machine.

    Returns:
      The stages with their operations, bytes and seconds, the total seconds, and the assumptions.

    >>> found = estimate_calibration(eight_billion_config())
    >>> 5 < found["seconds"] < 60, found["stages"][0]["stage"]
    (True, 'reading text')
    >>> slower = estimate_calibration(eight_billion_config(), accelerator=H100._replace(utilisation=0.035))
    >>> round(slower["stages"][0]["seconds"] / found["stages"][0]["seconds"])
    10
    """
    config = config or CalibrationConfig()
    # Sizes: exit points, sampled tokens of each split, operations for a token.
    size = model.hidden_size
    count = len(exit_point_layers(model.num_layers, config.checkpoint_interval))
    kept = min(tokens, config.reservoir_bytes // Reservoir.bytes_per_token(count, size))
    validation = config.validation_fraction * kept
    affine = config.exit_strategy != "identity"
    heads = 0.5 * (kept - validation) if affine else 0.0
    routers = kept - validation - heads
    body, head = operations_per_token(model, width=round(tokens / texts))
    held_out = tokens / texts * min(max(texts // 12, HELD_OUT_TEXTS[0]), HELD_OUT_TEXTS[1])
    solve_operations = _RIDGE_COUNT * (size**3 / 3 + 2 * size**3)
    pairs, eigen_operations, moved_bytes = _translator_work(model, config)
    translator_tokens = _translator_tokens(model, config)
    work = [  # stage, bfloat16 operations, float32 operations, bytes between host and device
        ("reading text", tokens * padding * body + kept * head, 0.0, kept * Reservoir.bytes_per_token(count, size)),
        (
            "fitting exit heads",
            0.0,
            count * ((4 * heads + 2 * _RIDGE_COUNT * validation) * size**2 + solve_operations) if affine else 0.0,
            count * 4 * size * (heads + _RIDGE_COUNT * validation) if affine else 0.0,
        ),
        (
            "tuning exit heads",
            # Predictions of the full model and of the head, and twice those of the head for the gradient.
            count * config.exit_head_steps * BATCH_TOKENS * (8 * size * MAX_VOCABULARY + 6 * size**2)
            if affine
            else 0.0,
            0.0,
            count * config.exit_head_steps * BATCH_TOKENS * 4 * size if affine else 0.0,
        ),
        (
            "fitting translators",
            translator_tokens * body if pairs else 0.0,
            pairs * (2 * translator_tokens * size**2 + 2 * size**3) + eigen_operations,
            moved_bytes,
        ),
        (
            "labelling",
            count * (routers + validation) * (head + (2 * size**2 if affine else 0)),
            0.0,
            count * (routers + validation) * 2 * size,
        ),
        (
            "training routers",
            0.0,
            config.max_epochs * count * (3 * routers + validation) * 2 * size * config.router_bottleneck_dim,
            config.max_epochs * count * (routers + validation) * 2 * size,
        ),
        (
            "training the second look",
            count * HELD_BACK_SHARE * routers * 2 * size * (config.confidence_candidates + size),
            0.0,
            count * HELD_BACK_SHARE * routers * 2 * size,
        ),
        ("measuring exits", (len(REPORT_THRESHOLDS) + 1) * held_out * padding * (body + head), 0.0, 0.0),
    ]
    stages = [_stage_time(accelerator, *entry) for entry in work]
    return {
        "stages": stages,
        "seconds": sum(stage["seconds"] for stage in stages),
        "assumptions": {
            "model": f"{model.num_layers} layers of width {size}, {(body + head) / 1e9:.1f} GFLOP a token",
            "text": f"{texts} texts, {tokens} tokens, {padding:.2f} x as many with padding",
            "kept": f"states of {int(kept)} tokens at {count} exit points",
            "accelerator": accelerator._asdict(),
            "left out": "loading the model, tokenising, compilation; transfers and products take turns",
        },
    }


def _translator_work(model: DecoderConfig, config: CalibrationConfig) -> tuple[float, float, float]:
    """Number of pairs of exit point and later layer, operations of the eigenproblems, bytes of the sampled states."""
    if config.translator_rank is None:
        return 0.0, 0.0, 0.0
    exit_points, size = exit_point_layers(model.num_layers, config.checkpoint_interval), model.hidden_size
    pairs = sum(model.num_layers - c - 2 for c in exit_points)
    return float(pairs), len(exit_points) * 12.0 * size**3, pairs * _translator_tokens(model, config) * 4.0 * size


def _translator_tokens(model: DecoderConfig, config: CalibrationConfig) -> int:
    layers = model.num_layers - exit_point_layers(model.num_layers, config.checkpoint_interval)[0] - 1
    return max(MIN_TOKENS, min(MAX_TOKENS, config.reservoir_bytes // (layers * (2 * model.hidden_size + 4))))


def _stage_time(
    accelerator: Accelerator, name: str, bfloat16_operations: float, float32_operations: float, moved_bytes: float
) -> dict[str, Any]:
    seconds = bfloat16_operations / (accelerator.peak_flops * accelerator.utilisation)
    seconds += float32_operations / (accelerator.float32_flops * accelerator.float32_utilisation)
    return {
        "stage": name,
        "tflop": bfloat16_operations / 1e12,
        "tflop_float32": float32_operations / 1e12,
        "gigabytes_moved": moved_bytes / 1e9,
        "seconds": seconds + moved_bytes / accelerator.transfer_bytes,
    }

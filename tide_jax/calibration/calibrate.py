"""Calibration: trains routers on a frozen model and text, and measures them on held-out text."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from tide_jax.calibration.collect import Progress, ReadingResult, Splits, collect_states, tokenise
from tide_jax.calibration.confidence_training import HELD_BACK_SHARE, final_scores, train_confidence
from tide_jax.calibration.exit_heads import fit_heads, label_tokens
from tide_jax.calibration.router_training import train_routers
from tide_jax.calibration.translator_fit import fit_translators
from tide_jax.calibration.tuned_heads import frequent_tokens, tune_heads
from tide_jax.checks import instance_of, path_like
from tide_jax.config import CalibrationConfig, exit_point_layers
from tide_jax.errors import TideError
from tide_jax.exits.evaluation import measure_exits
from tide_jax.exits.router import Candidates, RouterMetadata, Routers, model_identity
from tide_jax.model.decoder import Decoder

REPORT_THRESHOLDS = (0.7, 0.8, 0.9, 0.95, 0.99)
"""Thresholds that the report includes."""


def calibrate(
    model: Decoder,
    tokenizer: Any,
    texts: Iterable[Any],
    config: CalibrationConfig | None = None,
    *,
    source: str = "texts",
    progress: Progress | None = None,
    work_dir: str | Path | None = None,
    mesh: Mesh | None = None,
) -> Routers:
    """Trains routers, exit heads and translators on a frozen model.

    One pass over the text keeps a bounded, uniform sample of hidden states, split by text into three parts. On the
    first, affine heads are fitted in closed form and tuned on the full model's predictions, and translators are fitted
    for the cache of skipped layers. On the second, routers and their second look (`tide_jax.exits.confidence`) are
    trained by binary cross-entropy. The third chooses the ridge strength and when to stop, and the report is measured
    on its texts. Position 0 is left out. The recipe is TIDE's (2026). The default label is whether the exit's argmax
    equals the full model's, since on real models states rarely come within the paper's cosine of the last state before
    the last layer.

    Args:
      model: the decoder; not changed.
      tokenizer: called on each text, ``tokenizer(text)["input_ids"]``; unused for texts given as token ids.
      texts: strings, sequences of token ids, or `tide_jax.calibration.collect.Sample`s; `tide_jax.texts` makes them
        from files, data sets and the model itself.
      config: calibration settings; default `CalibrationConfig()`.
      source: a name for the data, recorded in the metadata.
      progress: called with (stage, done, total). For the reading pass it is also called at the start, with the part
        that an interrupted run has done.
      work_dir: a folder for the state of the reading pass, empty or missing, in an existing folder. A run with the same
        model, texts in the same order, and configuration resumes the pass there. It tokenises and compares the texts
        again; what is fitted after the pass may differ. Up to `reservoir_bytes` stay in the folder, so that other fits
        need not read again: delete it when the routers are good. None keeps everything in memory.
      mesh: devices that share the reading pass. Rows of a batch are split over the axis "data", so `batch_size`, which
        counts texts over all devices, should be a multiple of its size. Every device holds the whole model, unless the
        mesh also has an axis "model" (`tide_jax.make_mesh`): then each holds its part. The same tokens are kept on
        every mesh; their states may differ in the last float16 bit.

    Returns:
      Routers; `.report` holds the measurements by exit point and by threshold.

    Raises:
      TideError: the model has too few layers for an exit point; there is too little text; `work_dir` belongs to another
        model, text or configuration, is damaged or can't be written; or `mesh` has no axis "data".
    """
    instance_of("model", model, Decoder)
    instance_of("config", config, CalibrationConfig, or_none=True)
    if work_dir is not None:
        path_like("work_dir", work_dir)
    depth = model.config.num_layers
    # Resolve the configuration against the model.
    config = config or CalibrationConfig(min_layers=min(CalibrationConfig.min_layers, depth))
    if config.min_layers > depth:
        raise TideError(f"min_layers={config.min_layers} exceeds the model's {depth} layers; lower it")
    check_ranks(config, model.config.hidden_size)
    config = dataclasses.replace(config, max_length=min(config.max_length, model.config.context_length))
    exit_points = exit_point_layers(model.config.num_layers, config.checkpoint_interval)
    if not exit_points:
        raise TideError(
            f"checkpoint_interval={config.checkpoint_interval} leaves no exit point before the last of the model's "
            f"{model.config.num_layers} layers; lower it"
        )
    # Read the text, train, and measure.
    samples = tokenise(tokenizer, texts, config, model.config.vocab_size)
    reading = collect_states(model, samples, exit_points, config, progress, work_dir=work_dir, mesh=mesh)
    routers, training_labels, validation_labels = _train(model, reading, exit_points, config, progress)
    report = _report(model, routers, reading, training_labels, validation_labels, config, progress)
    metadata = model_identity(model) | {
        "config": dataclasses.asdict(config),
        "data": source,
        "versions": {name: importlib.metadata.version(name) for name in ("tide_jax", "jax", "flax", "optax")},
        "report": report,
    }
    return dataclasses.replace(routers, metadata=RouterMetadata.from_dict(metadata))


def check_ranks(config: CalibrationConfig, width: int) -> None:
    """Raises TideError for a rank above the model's width; a default rank is allowed, and means the width."""
    for name in ("exit_head_rank", "translator_rank"):
        rank = getattr(config, name)
        if rank is not None and rank > width and rank != getattr(CalibrationConfig, name):
            raise TideError(f"{name}={rank} exceeds the model's width of {width}; lower it")


def _train(
    model: Decoder,
    reading: ReadingResult,
    exit_points: tuple[int, ...],
    config: CalibrationConfig,
    progress: Progress | None,
) -> tuple[Routers, Bool[np.ndarray, "C N"], Bool[np.ndarray, "C M"]]:
    """Trains everything; returns routers and the labels of the routers' and the validation tokens."""
    # Exit heads and translators, on their own texts.
    splits, heads, translators = reading.splits, None, None
    if config.exit_strategy == "affine":
        heads = fit_heads(splits.heads, splits.validation, config.exit_head_rank, progress)
        if config.exit_head_steps:
            heads = tune_heads(model, heads, splits.heads, splits.validation, config, progress)
    if config.translator_rank is not None:
        translators = fit_translators(
            model, reading.fit_batches, exit_points, config.translator_rank, config.reservoir_bytes, progress
        )
    routers = Routers((), heads, exit_points, translators)
    # Routers. A part of their tokens is held back for the second look.
    labels = label_tokens(model, routers, splits.routers, config, progress)
    validation_labels = label_tokens(model, routers, splits.validation, config, progress)
    held_back = int(len(splits.routers) * HELD_BACK_SHARE) if config.confidence_candidates else 0
    router_rows, held_back_rows = slice(held_back, None), slice(0, held_back)
    states = splits.routers.states
    trained = train_routers(
        states[:, router_rows], labels[:, router_rows], splits.validation.states, validation_labels, config, progress
    )
    routers = dataclasses.replace(routers, routers=trained)
    # The second look, on the tokens held back.
    if held_back:
        ids = frequent_tokens(splits.routers.targets, model.config.vocab_size, config.confidence_candidates)
        routers = dataclasses.replace(routers, candidates=Candidates(ids, model.head_rows(ids)))
        confidence = train_confidence(
            model, routers, states[:, held_back_rows], labels[:, held_back_rows], config.seed, progress
        )
        routers = dataclasses.replace(routers, confidence=confidence)
    return routers, labels, validation_labels


def _split_sizes(splits: Splits) -> dict[str, int]:
    return {f"{name}_tokens": len(split) for name, split in zip(Splits._fields, splits, strict=True)}


def _report(
    model: Decoder,
    routers: Routers,
    reading: ReadingResult,
    training_labels: Bool[np.ndarray, "C N"],
    validation_labels: Bool[np.ndarray, "C M"],
    config: CalibrationConfig,
    progress: Progress | None,
) -> dict[str, Any]:
    """Measurements on the validation split: by exit point from its states, by threshold with the engine's own pass."""
    depth, exit_points = model.config.num_layers, routers.exit_points
    states = reading.splits.validation.states
    scores = final_scores(model, routers, states)
    by_exit_point = [
        {
            "layer": layer,
            "agreement": float(validation_labels[c].mean()),
            "positives_in_training": float(training_labels[c].mean()),
            "auc": auc(scores[c], validation_labels[c]),
        }
        for c, layer in enumerate(exit_points)
    ]
    thresholds = sorted({*REPORT_THRESHOLDS, config.exit_threshold})
    exits = measure_exits(model, routers, reading.held_out_batches, thresholds, config.min_layers, progress)
    for row in exits:
        expected = expected_exits(scores, validation_labels, exit_points, depth, row["threshold"], config.min_layers)
        row["label_agreement"] = expected["agreement"]
    return {
        "counts": reading.counts | _split_sizes(reading.splits),
        "label": config.label,
        "exit_points": by_exit_point,
        "exits": exits,
        "oracle": expected_exits(validation_labels.astype(np.float32), validation_labels, exit_points, depth, 0.5, 0),
    }


def expected_exits(
    scores: Float[np.ndarray, "C M"],
    labels: Bool[np.ndarray, "C M"],
    exit_points: tuple[int, ...],
    num_layers: int,
    threshold: float,
    min_layers: int,
) -> dict[str, Any]:
    """Expected exits at a threshold if all earlier tokens ran at full depth.

    This ignores the effect of exits on the cache of later tokens; `tide_jax.exits.evaluation.measure_exits` includes
    it.

    Returns:
      Share of tokens that exit, mean depth, the share of tokens with a true label at their exit (full depth counts as
      true), and the share of tokens that exit at each layer.
    """
    allowed = np.asarray([layer + 1 >= min_layers for layer in exit_points])
    exits_here = (scores > threshold) & allowed[:, None]
    exits = exits_here.any(axis=0)
    first = exits_here.argmax(axis=0)
    layers = np.where(exits, np.asarray(exit_points)[first] + 1, num_layers)
    agrees = np.where(exits, labels[first, np.arange(labels.shape[1])], True)
    return {
        "threshold": float(threshold),
        "exit_rate": float(exits.mean()),
        "depth": float(layers.mean() / num_layers),
        "agreement": float(agrees.mean()),
        "exits_by_layer": {str(layer): float((exits & (first == c)).mean()) for c, layer in enumerate(exit_points)},
    }


def auc(scores: Float[np.ndarray, " N"], labels: Bool[np.ndarray, " N"]) -> float | None:
    """Area under the ROC curve, ties counted half; None if all labels are equal.

    >>> auc(np.asarray([0.1, 0.4, 0.8]), np.asarray([False, True, True]))
    1.0
    """
    positives = int(labels.sum())
    negatives = labels.size - positives
    if not positives or not negatives:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = mean_rank[inverse][labels].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))

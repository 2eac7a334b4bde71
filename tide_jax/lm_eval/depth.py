"""Counts the layers that ran to predict each token, by task, for lm-eval's results."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


class DepthCounts:
    """Counts of tokens by the last layer that ran to predict them.

    Args:
      num_layers: number of layers in the model.
    """

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._counts: dict[str, np.ndarray] = {}

    def add(self, task: str | None, *exit_layers: np.ndarray) -> None:
        """Counts a task's tokens."""
        counts = self._counts.setdefault(task or "", self._zero_counts())
        for layers in exit_layers:
            counts += np.bincount(layers, minlength=len(counts))

    def to_dict(self) -> dict[str, Any]:
        """Depth over all tasks and for each task, JSON-ready."""
        return {
            "num_layers": self._num_layers,
            **_depth_statistics(sum(self._counts.values(), self._zero_counts())),
            "tasks": {task: _depth_statistics(counts) for task, counts in sorted(self._counts.items())},
        }

    def log(self, tasks: Iterable[str | None], mode: str) -> None:
        """Logs how deep some tasks ran."""
        for task in sorted({task or "" for task in tasks}):
            depth = _depth_statistics(self._counts[task])
            logger.info(
                "%s: %.2f of %d layers run to predict each of %d tokens (%s)",
                task or "requests",
                depth["layers_per_token"],
                self._num_layers,
                depth["tokens"],
                mode,
            )

    def _zero_counts(self) -> np.ndarray:
        return np.zeros((self._num_layers,), np.int64)


def _depth_statistics(counts: np.ndarray) -> dict[str, Any]:
    """Depth statistics of token counts by last layer, JSON-ready."""
    tokens = int(counts.sum())
    layers = float((counts * np.arange(1, len(counts) + 1)).sum() / tokens) if tokens else 0.0
    exits = {str(layer): int(count) for layer, count in enumerate(counts) if count}
    return {
        "tokens": tokens,
        "layers_per_token": layers,
        "depth": layers / len(counts),
        "tokens_by_last_layer": exits,
    }

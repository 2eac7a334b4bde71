"""Threshold vectors, one number for each exit point, in the order in which `guarantee` tests them: safest first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tide_jax.calibration.collect import Progress, Sample
from tide_jax.config import CalibrationConfig
from tide_jax.engine import TIDE
from tide_jax.exits.confidence import exit_scores
from tide_jax.exits.evaluation import Batch, argmax_by_row
from tide_jax.exits.router import Routers
from tide_jax.model.decoder import Decoder
from tide_jax.risk.answers import pack_texts

_SHARES = np.minimum(0.001 * 1.4 ** np.arange(22), 1.0)
"""Shares of tokens: candidate thresholds let these shares exit, and the path has a vector for each as disagreement."""


class TokenScores(NamedTuple):
    """Scores of N tokens at C exit points, with all earlier tokens at full depth.

    Attributes:
      scores: exit scores.
      agrees: whether exiting there gives the full model's argmax.
      weights: one over the counted tokens of the token's text, so that all texts count equally; they sum to 1.
    """

    scores: Float[np.ndarray, "C N"]
    agrees: Bool[np.ndarray, "C N"]
    weights: Float[np.ndarray, " N"]


def threshold_path(
    engine: TIDE, samples: Sequence[Sample], settings: CalibrationConfig, progress: Progress | None = None
) -> list[tuple[float, ...]]:
    """Threshold vectors to test, safest first, chosen by disagreement and depth as if exits left the cache unchanged.

    This takes one pass at full depth. A guarantee holds for any vectors, as long as they are chosen on other texts.
    """
    routers = engine.routers
    assert routers is not None
    depth = engine.model.config.num_layers
    allowed = [layer + 1 >= engine.config.min_layers for layer in routers.exit_points]
    depth_shares = [(layer + 1) / depth for layer in routers.exit_points]
    return greedy_path(score_tokens(engine.model, routers, samples, settings, progress), depth_shares, allowed)


def greedy_path(tokens: TokenScores, depth_shares: Sequence[float], allowed: Sequence[bool]) -> list[tuple[float, ...]]:
    """Lowers thresholds greedily, one step at one exit point at a time, within rising levels of disagreement.

    Each step lowers the threshold that saves the most depth for each new disagreement.

    Args:
      tokens: scores and agreement of the tokens.
      depth_shares: for each exit point, the share of the layers run by a token that exits there.
      allowed: exit points at which tokens may exit; the others keep a threshold of 1.

    Returns:
      The first vector on the way, then the last one within each level if it saves more depth than the one before.
    """
    candidates = [
        _candidate_thresholds(row) if is_allowed else [1.0]
        for row, is_allowed in zip(tokens.scores, allowed, strict=True)
    ]
    unit_steps, position = np.eye(len(candidates), dtype=int), np.zeros(len(candidates), int)
    depth, disagreement, path = 1.0, 0.0, list[tuple[float, ...]]()

    def vector(position: np.ndarray) -> tuple[float, ...]:
        return tuple(c[i] for c, i in zip(candidates, position, strict=True))

    for level in _SHARES:
        last = depth
        while True:
            # Cost of lowering each threshold by one candidate, without those that exceed the level.
            steps = [position + unit for c, unit in enumerate(unit_steps) if position[c] + 1 < len(candidates[c])]
            costs = [(step, *_depth_and_disagreement(tokens, vector(step), depth_shares)) for step in steps]
            costs = [cost for cost in costs if cost[2] <= level]
            if not costs:
                break
            # Take the step with the best ratio. Half a token is added to each cost, so that no step counts as free.
            floor = 0.5 / tokens.weights.size
            position, depth, disagreement = max(
                costs, key=lambda c: (depth - c[1]) / (max(c[2] - disagreement, 0.0) + floor)
            )
            if depth < 1.0 and not path:
                path.append(vector(position))
        if depth < last and vector(position) not in path:
            path.append(vector(position))
    return path or [vector(position)]


def _candidate_thresholds(scores: np.ndarray) -> list[float]:
    """Candidate thresholds, descending from 1 (no exits): each just below the score that a share of tokens reaches."""
    reached = np.quantile(scores, 1 - _SHARES, method="higher").astype(np.float32)
    below = np.maximum(np.nextafter(reached, np.float32(-1)), np.float32(0))
    return sorted({1.0, *map(float, below)}, reverse=True)


def _depth_and_disagreement(
    tokens: TokenScores, thresholds: tuple[float, ...], depth_shares: Sequence[float]
) -> tuple[float, float]:
    """Mean depth and disagreement at these thresholds."""
    exits_here = tokens.scores > np.asarray(thresholds, np.float32)[:, None]
    exits, first = exits_here.any(axis=0), exits_here.argmax(axis=0)
    depth = np.where(exits, np.asarray(depth_shares)[first], 1.0)
    disagrees = exits & ~tokens.agrees[first, np.arange(first.size)]
    return float(depth @ tokens.weights), float(disagrees @ tokens.weights)


def score_tokens(
    model: Decoder,
    routers: Routers,
    samples: Sequence[Sample],
    settings: CalibrationConfig,
    progress: Progress | None = None,
) -> TokenScores:
    """Scores and agreement of the texts' counted tokens at every exit point."""
    scores, agrees, weights = [], [], []
    rows = min(settings.batch_size, len(samples))
    for start in range(0, len(samples), settings.batch_size):
        group = samples[start : start + settings.batch_size]
        batch = pack_texts(group, rows, settings.max_length)
        out = jax.device_get(_score_batch(model, routers.without_metadata(), batch))
        counted = np.asarray(batch.counted)
        # Keep the counted tokens; those of one text share a weight of one text.
        scores.append(out[0][:, counted])
        agrees.append(out[1][:, counted])
        token_weights = 1 / (len(samples) * np.maximum(counted.sum(axis=1), 1))
        weights.append(np.repeat(token_weights, counted.sum(axis=1)))
        if progress is not None:
            progress("choosing thresholds", start + len(group), len(samples))
    return TokenScores(np.concatenate(scores, axis=1), np.concatenate(agrees, axis=1), np.concatenate(weights))


@jax.jit
def _score_batch(model: Decoder, routers: Routers, batch: Batch) -> tuple[Array, Array]:
    """Scores and agreement with the full model, each [C, B, T], in one pass at full depth."""
    outputs = [x for x, _ in model.layer_outputs(batch.tokens, batch.positions, None)]
    scores, answers = [], []
    for c, exit_point in enumerate(routers.exit_points):
        x = outputs[exit_point]
        result = exit_scores(model, routers, c, x.reshape(-1, x.shape[-1]))
        scores.append(result.scores.reshape(x.shape[:2]))
        answers.append(argmax_by_row(model, result.states.reshape(x.shape)))
    return jnp.stack(scores), jnp.stack(answers) == argmax_by_row(model, model.final_norm(outputs[-1]))[None]

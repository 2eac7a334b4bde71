"""Agreement of exits with the full model on whole texts, measured with ``kv_strategy="propagate"``.

The pass is the engine's own: keys and values of skipped layers come from exit states, and later tokens read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tide_jax.exits.depth import run_depth
from tide_jax.exits.exits import Exits
from tide_jax.exits.router import Routers
from tide_jax.model.decoder import Decoder


class Batch(NamedTuple):
    """Texts as right-padded arrays [B, T].

    Attributes:
      tokens: token ids.
      positions: position of each token, -1 for padding.
      counted: tokens to measure; the others run at full depth.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    counted: Bool[Array, "B T"]


def measure_exits(
    model: Decoder,
    routers: Routers,
    batches: Sequence[Batch],
    thresholds: Sequence[float],
    min_layers: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Runs texts with exits at each threshold and compares every argmax with the full model's on the same prefix.

    Returns:
      For each threshold: exit rate, mean depth, agreement, and the share of tokens that exit at each layer.
    """
    # The full model's argmaxes, once for all thresholds.
    reference = [_argmax_full(model, batch) for batch in batches]
    counted = np.concatenate([np.asarray(batch.counted).reshape(-1) for batch in batches])
    wanted = np.concatenate([np.asarray(r).reshape(-1) for r in reference])[counted]
    results, bare = [], routers.without_metadata()
    # One pass with exits for each threshold.
    for done, threshold in enumerate(thresholds, 1):
        exits = Exits.uniform(bare, threshold, min_layers)
        outputs = [_argmax_with_exits(model, batch, exits) for batch in batches]
        found, layers = (np.concatenate([np.asarray(o[i]).reshape(-1) for o in outputs])[counted] for i in (0, 1))
        results.append(_row(threshold, layers, found == wanted, routers.exit_points, model.config.num_layers))
        if progress is not None:
            progress("measuring exits", done, len(thresholds))
    return results


def _row(
    threshold: float, layers: np.ndarray, agrees: np.ndarray, exit_points: tuple[int, ...], num_layers: int
) -> dict[str, Any]:
    return {
        "threshold": float(threshold),
        "exit_rate": float((layers < num_layers - 1).mean()),
        "depth": float((layers + 1).mean() / num_layers),
        "agreement": float(agrees.mean()),
        "exits_by_layer": {str(layer): float((layers == layer).mean()) for layer in exit_points},
    }


@jax.jit
def _argmax_full(model: Decoder, batch: Batch) -> Int[Array, "B T"]:
    return argmax_by_row(model, run_depth(model, batch.tokens, batch.positions, None).states)


@jax.jit
def _argmax_with_exits(model: Decoder, batch: Batch, exits: Exits) -> tuple[Array, Array]:
    out = run_depth(model, batch.tokens, batch.positions, None, exits, may_exit=batch.counted)
    return argmax_by_row(model, out.states), out.exit_layers


def argmax_by_row(model: Decoder, states: Float[Array, "B T D"]) -> Int[Array, "B T"]:
    """Most likely token after each final-normed state; only one row's logits are in memory at a time."""
    return lax.map(lambda row: jnp.argmax(model.logits(row[None])[0], axis=-1).astype(jnp.int32), states)

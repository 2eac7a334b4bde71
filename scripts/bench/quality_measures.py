"""Measures the quality that exits cost on given text, for scripts.bench.quality.

Everything is teacher-forced with the engine's own pass, in which later tokens read the keys and values that exits leave
behind. The device compares both models' distributions over the whole vocabulary, a few tokens at a time. Position 0 is
never counted, because it cannot exit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from tide_jax.calibration.collect import Sample
from tide_jax.exits.depth import run_depth
from tide_jax.exits.evaluation import Batch
from tide_jax.exits.exits import Exits
from tide_jax.exits.router import Routers
from tide_jax.model.decoder import Decoder
from tide_jax.risk.answers import pack_texts

_CHUNK = 64  # number of tokens whose logits are in memory at once
Progress = Callable[[int, int], None]
Row = dict[str, Any]


class Comparison(NamedTuple):
    """The full model compared with exits after each of N tokens.

    Attributes:
      agrees: whether both have the same likeliest next token.
      kl: KL(full || exits) of their distributions, in nats.
      full_nll, exit_nll: negative log probability of the text's own next token; NaN after a text's last token.
      layers: layers run with exits.
      texts: index of each token's text.
    """

    agrees: np.ndarray
    kl: np.ndarray
    full_nll: np.ndarray
    exit_nll: np.ndarray
    layers: np.ndarray
    texts: np.ndarray


class Reference:
    """Texts with the full model's final-normed states after each token. The states stay on the device.

    Args:
      texts: token ids.
      max_length: length of the longest text.
      batch_size: number of texts per forward pass.
      progress: called with the done and total numbers of batches.
    """

    def __init__(
        self,
        model: Decoder,
        texts: Sequence[Sequence[int]],
        *,
        max_length: int,
        batch_size: int,
        progress: Progress | None = None,
    ) -> None:
        self.model = model
        ordered = sorted(texts, key=len)  # keeps padding short
        groups = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
        self.batches = [pack_texts([Sample(ids, 1) for ids in group], batch_size, max_length) for group in groups]
        self.states = list(_reported(self.batches, lambda b: _full_states(model, b), progress))

    def compare(self, exits: Exits, progress: Progress | None = None) -> Comparison:
        """Runs the texts with exits and compares."""
        numbered = list(enumerate(zip(self.batches, self.states, strict=True)))
        parts = _reported(numbered, lambda item: self._compare(item[0], item[1][0], item[1][1], exits), progress)
        return Comparison(*map(np.concatenate, zip(*parts, strict=True)))

    def oracles(self, routers: Routers, min_layers: int, perplexity_ratio: float) -> Row:
        """Measures the best exits that these heads allow, with every token's past at full depth.

        Returns:
          "oracle": mean depth if every token exits at the first exit point with the full model's argmax, and each exit
          point's agreement and mean divergence; "oracle_by_kl": `least_depth` at a mean KL of the logarithm of
          `perplexity_ratio`.
        """
        depth, layers = self.model.config.num_layers, np.asarray(routers.exit_points)
        bare = routers.without_metadata()
        parts = []
        for batch, states in zip(self.batches, self.states, strict=True):
            counted = np.asarray(batch.counted)
            parts.append([np.asarray(a)[:, counted] for a in _exits_everywhere(self.model, bare, batch, states)])
        agrees, kl = (np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True))
        run = first_right(agrees, layers, depth, min_layers)
        by_kl, spent = least_depth(kl, layers, depth, min_layers, math.log(perplexity_ratio))
        oracle = {
            "layers": float(run.mean()),
            "depth": float(run.mean() / depth),
            "depth_without_min_layers": float(first_right(agrees, layers, depth, 0).mean() / depth),
            "agreement_by_layer": {str(layer): float(a.mean()) for layer, a in zip(layers, agrees, strict=True)},
            "kl_by_layer": {str(layer): float(a.mean()) for layer, a in zip(layers, kl, strict=True)},
        }
        return {"oracle": oracle, "oracle_by_kl": {"depth": by_kl, "kl": spent}}

    def _compare(self, number: int, batch: Batch, states: Array, exits: Exits) -> Comparison:
        counted = np.asarray(batch.counted)
        out = _compare(self.model, batch, states, exits)
        agrees, kl, full, early, exit_layers = (np.asarray(a)[counted] for a in out)
        row, column = np.nonzero(counted)
        last = column == counted.shape[1] - 1 - np.argmax(counted[:, ::-1], axis=1)[row]
        full, early = (np.where(last, np.nan, a.astype(np.float64)) for a in (full, early))
        return Comparison(agrees, kl.astype(np.float64), full, early, exit_layers + 1, number * counted.shape[0] + row)


def summarise(found: Comparison, num_layers: int) -> Row:
    """Summary of a strategy at one threshold."""
    has_next = ~np.isnan(found.full_nll)
    full, early = (float(a[has_next].mean()) for a in (found.full_nll, found.exit_nll))
    values, counts = np.unique(found.layers, return_counts=True)
    return {
        "layers": float(found.layers.mean()),
        "depth": float(found.layers.mean() / num_layers),
        "agreement": float(found.agrees.mean()),
        "agreement_error": standard_error(found.agrees, found.texts),
        "kl": float(found.kl.mean()),
        "full_nll": full,
        "exit_nll": early,
        "perplexity_ratio": math.exp(early - full),
        "exit_rate": float((found.layers < num_layers).mean()),
        "share_by_last_layer": {str(v - 1): float(n / found.layers.size) for v, n in zip(values, counts, strict=True)},
        "tokens": int(found.layers.size),
    }


def standard_error(values: np.ndarray, texts: np.ndarray) -> float | None:
    """Standard error of a mean over tokens if only texts are independent; None for a single text."""
    numbers = np.unique(texts)
    if numbers.size < 2:
        return None
    residuals = values - values.mean()
    sums = np.asarray([residuals[texts == n].sum() for n in numbers])
    return float(math.sqrt(numbers.size / (numbers.size - 1) * np.square(sums).sum()) / values.size)


def first_right(agrees: np.ndarray, exit_points: np.ndarray, num_layers: int, min_layers: int) -> np.ndarray:
    """Layers run by each of N tokens that exit at the first exit point where ``agrees [C, N]``, else never."""
    allowed = agrees & (exit_points + 1 >= min_layers)[:, None]
    return np.where(allowed.any(axis=0), exit_points[allowed.argmax(axis=0)] + 1, num_layers)


def least_depth(
    kl: np.ndarray, exit_points: np.ndarray, num_layers: int, min_layers: int, limit: float
) -> tuple[float, float]:
    """Least mean depth of N tokens with mean divergence within `limit`, and that divergence.

    Each token exits where its divergence minus a price for the layers saved is least, or not at all. The price is the
    highest that keeps the limit. No other choice of exits runs fewer layers for the same divergence.

    Args:
      kl: divergence of each token's answer at each exit point, ``[C, N]``.
    """
    saved = np.where(exit_points + 1 >= min_layers, 1 - (exit_points + 1) / num_layers, -np.inf)[:, None]

    def choose(price: float) -> tuple[float, float]:
        cost = np.concatenate([kl - price * saved, np.zeros((1, kl.shape[1]))])
        best = cost.argmin(axis=0)
        exits = best < len(kl)
        at = np.where(exits, best, 0)
        depth = np.where(exits, (exit_points[at] + 1) / num_layers, 1.0)
        return float(depth.mean()), float(np.where(exits, kl[at, np.arange(kl.shape[1])], 0.0).mean())

    low, high = 1e-9, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if choose(middle)[1] <= limit else (low, middle)
    return choose(low)


def qualifies(row: Row, agreement: float, perplexity_ratio: float) -> bool:
    """Whether a measured row keeps both limits."""
    return row["agreement"] >= agreement and row["perplexity_ratio"] <= perplexity_ratio


def at_target(rows: Sequence[Row], agreement: float, perplexity_ratio: float) -> Row | None:
    """The measured row of least depth that keeps both limits; among equal ones the one with the highest threshold."""
    kept = [row for row in rows if qualifies(row, agreement, perplexity_ratio)]
    return min(kept, key=lambda row: (row["depth"], -row["threshold"]), default=None)


def next_threshold(rows: Sequence[Row], agreement: float, perplexity_ratio: float) -> float | None:
    """Returns the next threshold to measure, or None.

    It is halfway between the best row's threshold and the one below it (0 if there is none). If no row keeps the
    limits, it is halfway between the highest threshold under 1 and 1.
    """
    measured = [row["threshold"] for row in rows]
    best = at_target(rows, agreement, perplexity_ratio)
    if best is None or best["depth"] == 1.0:
        top = max((t for t in measured if t < 1.0), default=0.0)
        return (top + 1.0) / 2
    below = max((t for t in measured if t < best["threshold"]), default=0.0)
    return None if best["threshold"] == 0.0 else (best["threshold"] + below) / 2


def _reported(items: Sequence[Any], work: Callable[[Any], Any], progress: Progress | None) -> list[Any]:
    results = []
    for done, item in enumerate(items, 1):
        results.append(jax.block_until_ready(work(item)))
        if progress is not None:
            progress(done, len(items))
    return results


@jax.jit
def _full_states(model: Decoder, batch: Batch) -> Float[Array, "B T D"]:
    return run_depth(model, batch.tokens, batch.positions, None).states


@jax.jit
def _compare(
    model: Decoder, batch: Batch, states: Float[Array, "B T D"], exits: Exits
) -> tuple[Array, Array, Array, Array, Int[Array, "B T"]]:
    """Agreement, KL, both models' negative log-likelihoods, and the last layer run, of each token [B, T]."""
    may_exit = batch.counted | exits.prompt
    out = run_depth(model, batch.tokens, batch.positions, None, exits, may_exit=may_exit)

    def one(arguments: tuple[Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        full, early, following = arguments
        agrees, kl, logs = _differences(model, full, early)
        return agrees, kl, -logs[0][following], -logs[1][following]

    flat = [a.reshape(-1, a.shape[-1]) for a in (states, out.states)]
    following = jnp.roll(batch.tokens, -1, axis=1).reshape(-1)
    found = lax.map(one, (flat[0], flat[1], following), batch_size=_CHUNK)
    return *(a.reshape(batch.tokens.shape) for a in found), out.exit_layers


def _differences(
    model: Decoder, full: Float[Array, " D"], early: Float[Array, " D"]
) -> tuple[Array, Array, tuple[Array, Array]]:
    """Whether two final-normed states have the same argmax, KL(full || early), and both log distributions."""
    logits = [model.logits(state[None, None])[0, 0].astype(jnp.float32) for state in (full, early)]
    logs = jax.nn.log_softmax(logits[0]), jax.nn.log_softmax(logits[1])
    # Avoid 0 * -inf, which is NaN, for tokens that a model never gives.
    kl = jnp.sum(jnp.where(logs[0] > -jnp.inf, jnp.exp(logs[0]) * (logs[0] - logs[1]), jnp.float32(0)))
    return jnp.argmax(logits[0]) == jnp.argmax(logits[1]), kl, logs


@jax.jit
def _exits_everywhere(
    model: Decoder, routers: Routers, batch: Batch, states: Float[Array, "B T D"]
) -> tuple[Array, Array]:
    """Whether an exit at each exit point gives the full model's argmax, and KL(full || exit), ``[C, B, T]``."""
    full = states.reshape(-1, states.shape[-1])

    def compare(exits: Array) -> tuple[Array, Array]:
        pairs = full, exits.reshape(full.shape)
        agrees, kl = lax.map(lambda pair: _differences(model, *pair)[:2], pairs, batch_size=_CHUNK)
        return agrees.reshape(batch.tokens.shape), kl.reshape(batch.tokens.shape)

    exits = []
    for i, (x, _) in enumerate(model.layer_outputs(batch.tokens, batch.positions, None)):
        if i in routers.exit_points:
            state = routers.exit_state(routers.exit_points.index(i), x, eps=model.config.norm_eps)
            exits.append(compare(model.final_norm(state)))
    agrees, kl = zip(*exits, strict=True)
    return jnp.stack(agrees), jnp.stack(kl)

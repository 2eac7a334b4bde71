"""Fits affine exit heads in closed form, and labels at which exit points a token's exit would be right."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tide_jax.calibration.collect import Progress
from tide_jax.calibration.reservoir import Reservoir
from tide_jax.config import CalibrationConfig
from tide_jax.exits.router import ExitHead, Routers
from tide_jax.exits.router_file import round_half
from tide_jax.model.decoder import Decoder

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # relative to the mean squared input channel
_CHUNK_TOKENS = 4096  # tokens converted to float32 at once
_LOGIT_TOKENS = 256  # tokens whose logits are in memory at once


def fit_heads(
    fit_sample: Reservoir, held_out: Reservoir, rank: int | None, progress: Progress | None = None
) -> tuple[ExitHead, ...]:
    """Fits ridge regressions from the normed state at each exit point to that of the last layer.

    The ridge strength is chosen on held-out text.

    Args:
      fit_sample: states to fit on.
      held_out: states that choose the strength.
      rank: rank of the correction to the identity; None is full rank.
      progress: called with (stage, done, total).

    Returns:
      One head for each exit point, rounded to float16 values so that saving them changes nothing.
    """
    heads = []
    for c in range(len(fit_sample.states)):
        heads.append(_fit_head(fit_sample, held_out, c, rank))
        if progress is not None:
            progress("fitting exit heads", c + 1, len(fit_sample.states))
    return tuple(heads)


def _fit_head(fit_sample: Reservoir, held_out: Reservoir, c: int, rank: int | None) -> ExitHead:
    # Centre: the regression target is the last state minus the exit state.
    mean_x = jnp.asarray(fit_sample.states[c].mean(axis=0, dtype=np.float64), jnp.float32)
    mean_y = jnp.asarray(fit_sample.last.mean(axis=0, dtype=np.float64), jnp.float32) - mean_x
    gram, cross = _moments(fit_sample, c, mean_x, mean_y)
    # Solve for every strength, and take the best on held-out tokens.
    kernels = [_solve_ridge(gram, cross, jnp.float32(ridge)) for ridge in _RIDGES]
    kernel = min(kernels, key=lambda k: _held_out_error(k, held_out, c, mean_x, mean_y))
    factors = (kernel,) if rank is None or rank >= kernel.shape[0] else _reduce_rank(kernel, gram, rank)
    factors = tuple(jnp.asarray(round_half(np.asarray(f))) for f in factors)
    # The bias makes up for the means, as mapped by the rounded factors.
    mapped = mean_x
    for factor in factors:
        mapped = jnp.dot(mapped, factor, precision="highest")
    return ExitHead(factors, jnp.asarray(round_half(np.asarray(mean_y - mapped))))


def _centred_pairs(sample: Reservoir, c: int, mean_x: Array, mean_y: Array) -> Iterator[tuple[Array, Array]]:
    """Yields centred inputs and residual targets in float32, in chunks, since all at once would double the memory."""
    for start in range(0, len(sample), _CHUNK_TOKENS):
        rows = slice(start, start + _CHUNK_TOKENS)
        x, last = (jnp.asarray(a, jnp.float32) for a in (sample.states[c, rows], sample.last[rows]))
        yield x - mean_x[None, :], last - x - mean_y[None, :]


def _moments(sample: Reservoir, c: int, mean_x: Array, mean_y: Array) -> tuple[Array, Array]:
    size = mean_x.shape[0]
    sums = jnp.zeros((size, size), jnp.float32), jnp.zeros((size, size), jnp.float32)
    for x, y in _centred_pairs(sample, c, mean_x, mean_y):
        sums = _add_products(sums, x, y)
    return sums[0] / len(sample), sums[1] / len(sample)


@jax.jit
def _add_products(sums: tuple[Array, Array], x: Float[Array, "N D"], y: Float[Array, "N D"]) -> tuple[Array, Array]:
    return sums[0] + jnp.dot(x.T, x, precision="highest"), sums[1] + jnp.dot(x.T, y, precision="highest")


@jax.jit
def _solve_ridge(gram: Float[Array, "D D"], cross: Float[Array, "D D"], ridge: Float[Array, ""]) -> Float[Array, "D D"]:
    strength = ridge * jnp.trace(gram) / gram.shape[0]
    return jax.scipy.linalg.solve(gram + strength * jnp.eye(gram.shape[0], dtype=gram.dtype), cross, assume_a="pos")


def _held_out_error(kernel: Array, sample: Reservoir, c: int, mean_x: Array, mean_y: Array) -> float:
    return sum(float(_squared_error(kernel, x, y)) for x, y in _centred_pairs(sample, c, mean_x, mean_y))


@jax.jit
def _squared_error(kernel: Array, x: Array, y: Array) -> Array:
    return jnp.sum(jnp.square(jnp.dot(x, kernel, precision="highest") - y))


def _reduce_rank(kernel: Array, gram: Array, rank: int) -> tuple[Array, Array]:
    """Reduced-rank regression (Izenman 1975): the best map of this rank for inputs of covariance `gram`."""
    predictions = jnp.dot(jnp.dot(kernel.T, gram, precision="highest"), kernel, precision="highest")
    _, vectors = jnp.linalg.eigh(predictions)
    top = vectors[:, -rank:]
    return jnp.dot(kernel, top, precision="highest"), top.T


def label_tokens(
    model: Decoder, routers: Routers, sample: Reservoir, config: CalibrationConfig, progress: Progress | None = None
) -> Bool[np.ndarray, "C N"]:
    """Labels whether exiting is right, for each exit point and token.

    With label "agreement" it is right if the exit's argmax equals the full model's. With label "cosine" (the TIDE
    paper's) it is right if the state's cosine with the last state exceeds `convergence_threshold`.
    """
    # Labels of one exit point at a time.
    labels = np.zeros(sample.states.shape[:2], bool)
    for c in range(len(labels)):
        labels[c] = (
            _cosines(sample, c) > config.convergence_threshold
            if config.label == "cosine"
            else (exit_argmax(model, routers, c, sample.states[c]) == sample.targets)
        )
        if progress is not None:
            progress("labelling", c + 1, len(labels))
    return labels


def exit_argmax(model: Decoder, routers: Routers, exit_point: int, states: Float[np.ndarray, "N D"]) -> np.ndarray:
    """Argmax token of each state if it exits at this exit point, int32 [N]."""
    bare = routers.without_metadata()
    return map_chunks(lambda chunk: _compiled_argmax(model, bare, chunk, exit_point=exit_point), states)


def map_chunks(function: Callable[[Array], Array], states: Float[np.ndarray, "N D"]) -> np.ndarray:
    """Applies a function to chunks of rows of one size, the last one padded.

    This takes one compilation, and bounds the memory of logits.
    """
    parts = []
    for start in range(0, len(states), _LOGIT_TOKENS):
        chunk = states[start : start + _LOGIT_TOKENS]
        parts.append(np.asarray(function(jnp.asarray(np.pad(chunk, ((0, _LOGIT_TOKENS - len(chunk)), (0, 0)))))))
    return np.concatenate(parts)[: len(states)]


def _compute_argmax(model: Decoder, routers: Routers, states: Float[Array, "N D"], *, exit_point: int) -> Array:
    x = states.astype(model.dtype)[None]
    out = model.final_norm(routers.exit_state(exit_point, x, eps=model.config.norm_eps))
    return jnp.argmax(model.logits(out)[0], axis=-1).astype(jnp.int32)


_compiled_argmax = jax.jit(_compute_argmax, static_argnames="exit_point")


def _cosines(sample: Reservoir, c: int) -> np.ndarray:
    cosines = []
    for start in range(0, len(sample), 4096):
        rows = slice(start, start + 4096)
        a, b = sample.states[c, rows].astype(np.float32), sample.last[rows].astype(np.float32)
        cosines.append((a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12))
    return np.concatenate(cosines)

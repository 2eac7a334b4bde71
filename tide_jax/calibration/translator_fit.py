"""Fits translators in closed form: reduced-rank regression from exit states to the inputs of later layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16

from tide_jax.calibration.collect import MIN_TOKENS, Progress
from tide_jax.exits.evaluation import Batch
from tide_jax.exits.router_file import round_half
from tide_jax.exits.translators import LayerTranslators, Translators
from tide_jax.model.decoder import Decoder

MAX_TOKENS = 8192
"""Most tokens that a fit uses; memory may allow fewer."""

_RIDGE = 3e-3  # relative to the mean squared input channel


class LayerInputs(NamedTuple):
    """Inputs of the layers behind the first exit point, for N tokens.

    Attributes:
      states: scaled to a root mean square of 1, one entry for each layer from `first` on.
      scales: the root mean squares before scaling.
      first: index of the first of those layers.
    """

    states: Float16[np.ndarray, "L' N D"]
    scales: Float[np.ndarray, "L' N"]
    first: int


def fit_translators(
    model: Decoder,
    batches: Sequence[Batch],
    exit_points: tuple[int, ...],
    rank: int,
    max_bytes: int,
    progress: Progress | None = None,
) -> Translators:
    """Runs up to `MAX_TOKENS` tokens of `batches` and regresses the inputs of later layers on the exit states.

    For one exit point, the maps to all later layers form one reduced-rank regression (Izenman 1975), with targets
    weighted to equal variance. `down` spans the directions of the exit state that predict the targets best. It is
    whitened, so each layer's `up` is the covariance of the code with that layer's target.

    Args:
      model: the decoder.
      batches: text that the routers are not trained on.
      exit_points: layers of the exit points.
      rank: rank of the maps; 0 fits the shifts only.
      max_bytes: memory for the sampled states; at least `MIN_TOKENS` tokens are used in any case.
      progress: called with (stage, done, total).

    Returns:
      Translators rounded to float16 values, so that saving them changes nothing.
    """
    # Sample the inputs of all later layers, then fit the maps from one exit point at a time.
    inputs = _sample_layer_inputs(model, batches, exit_points[0] + 1, max_bytes)
    depth, down = model.config.num_layers, list[Array]()
    shifts: list[list[np.ndarray]] = [[] for _ in range(depth)]
    ups: list[list[np.ndarray]] = [[] for _ in range(depth)]
    for number, exit_point in enumerate(exit_points):
        projection, layers = _fit_exit_point(inputs, exit_point, depth, rank)
        down.append(jnp.asarray(projection))
        for layer, (shift, up) in layers.items():
            shifts[layer].append(shift)
            ups[layer].append(up)
        if progress is not None:
            progress("fitting translators", number + 1, len(exit_points))
    # Group the maps by the layer they lead to, as `Translators` stores them.
    entries = [
        LayerTranslators(jnp.asarray(np.stack(shifts[i])), jnp.asarray(np.stack(ups[i]))) if shifts[i] else None
        for i in range(depth)
    ]
    return Translators(tuple(down), tuple(entries))


def _sample_layer_inputs(model: Decoder, batches: Sequence[Batch], first: int, max_bytes: int) -> LayerInputs:
    layers, size = model.config.num_layers - first, model.config.hidden_size
    budget = max(MIN_TOKENS, min(MAX_TOKENS, max_bytes // (layers * (2 * size + 4))))
    states, scales, kept = [], [], 0
    for batch in batches:
        places = np.flatnonzero(np.asarray(batch.counted).reshape(-1))[: budget - kept]
        if not len(places):
            break
        out = _scaled_inputs(model, batch, first=first)
        states.append(np.asarray(out[0])[:, places])
        scales.append(np.asarray(out[1])[:, places])
        kept += len(places)
    return LayerInputs(np.concatenate(states, axis=1), np.concatenate(scales, axis=1), first)


@functools.partial(jax.jit, static_argnames="first")
def _scaled_inputs(
    model: Decoder, batch: Batch, *, first: int
) -> tuple[Float16[Array, "L' N D"], Float[Array, "L' N"]]:
    outputs = [x for x, _ in model.layer_outputs(batch.tokens, batch.positions, None)]
    x = jnp.stack(outputs[first - 1 : -1]).astype(jnp.float32)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    scales = jnp.sqrt(jnp.mean(jnp.square(x), axis=-1) + model.config.norm_eps)
    return (x / scales[:, :, None]).astype(jnp.float16), scales


def _fit_exit_point(
    inputs: LayerInputs, exit_point: int, depth: int, rank: int
) -> tuple[np.ndarray, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """`down` of one exit point, and (shift, up) of each later layer but the next, which reads the exit state itself."""
    # The exit state is the input of the next layer.
    x = jnp.asarray(inputs.states[exit_point + 1 - inputs.first], jnp.float32)
    mean_x = jnp.mean(x, axis=0)
    gram = _regularised_gram(x, mean_x)
    # Find the directions that all later layers share.
    layers = range(exit_point + 2, depth)
    crosses = {layer: _cross_moments(x, mean_x, _regression_target(inputs, exit_point, layer, x)) for layer in layers}
    down = _predictive_directions(gram, list(crosses.values()), rank)
    down = jnp.asarray(round_half(np.asarray(down)))
    # With a whitened code, `up` is a covariance; the shift makes up for the means.
    fitted = dict[int, tuple[np.ndarray, np.ndarray]]()
    for layer, (cross, mean_y, _) in crosses.items():
        up = round_half(np.asarray(jnp.dot(down.T, cross, precision="highest")))
        mean_code = np.asarray(jnp.dot(mean_x, down, precision="highest"))
        fitted[layer] = round_half(np.asarray(mean_y) - mean_code @ up), up
    return np.asarray(down), fitted


def _regression_target(inputs: LayerInputs, exit_point: int, layer: int, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Sum of what the layers in between added, in units of the exit state's root mean square."""
    source, i = exit_point + 1 - inputs.first, layer - inputs.first
    ratio = jnp.asarray(inputs.scales[i] / inputs.scales[source], jnp.float32)
    return jnp.asarray(inputs.states[i], jnp.float32) * ratio[:, None] - x


@jax.jit
def _regularised_gram(x: Float[Array, "N D"], mean: Float[Array, " D"]) -> Float[Array, "D D"]:
    centred = x - mean[None, :]
    gram = jnp.dot(centred.T, centred, precision="highest") / x.shape[0]
    strength = _RIDGE * jnp.maximum(jnp.trace(gram) / gram.shape[0], 1e-6)
    return gram + strength * jnp.eye(gram.shape[0], dtype=gram.dtype)


@jax.jit
def _cross_moments(
    x: Float[Array, "N D"], mean: Float[Array, " D"], y: Float[Array, "N D"]
) -> tuple[Array, Array, Array]:
    """Covariance of x and y, the mean of y, and the total variance of y."""
    mean_y = jnp.mean(y, axis=0)
    centred = y - mean_y[None, :]
    cross = jnp.dot((x - mean[None, :]).T, centred, precision="highest") / x.shape[0]
    return cross, mean_y, jnp.mean(jnp.sum(jnp.square(centred), axis=1))


def _predictive_directions(gram: Array, crosses: list[tuple[Array, Array, Array]], rank: int) -> Float[Array, "D R"]:
    """The `rank` most predictive directions, whitened: ``down^T gram down = I``."""
    if not crosses or rank == 0:
        return jnp.zeros((gram.shape[0], 0 if rank == 0 else min(rank, gram.shape[0])), jnp.float32)
    explained = jnp.zeros_like(gram)
    for cross, _, size in crosses:
        explained = _add_explained(explained, cross, size)
    return _generalised_eigenvectors(gram, explained)[:, -min(rank, gram.shape[0]) :]


@jax.jit
def _add_explained(explained: Array, cross: Array, size: Array) -> Array:
    return explained + jnp.dot(cross, cross.T, precision="highest") / jnp.maximum(size, 1e-12)


@jax.jit
def _generalised_eigenvectors(gram: Array, explained: Array) -> Array:
    """Generalised eigenvectors of (explained, gram), ascending."""
    lower = jnp.linalg.cholesky(gram)
    half = jax.scipy.linalg.solve_triangular(lower, explained, lower=True)
    whitened = jax.scipy.linalg.solve_triangular(lower, half.T, lower=True)
    _, vectors = jnp.linalg.eigh((whitened + whitened.T) / 2)
    return jax.scipy.linalg.solve_triangular(lower.T, vectors, lower=False)

"""Trains routers by binary cross-entropy on sampled states; each router keeps its own best epoch."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from tide_jax.calibration.collect import Progress
from tide_jax.calibration.gradient_step import apply_gradients
from tide_jax.config import CalibrationConfig
from tide_jax.exits.router import Router
from tide_jax.exits.router_file import round_columns

_BATCH = 256
_CHUNK_TOKENS = 4096


def train_routers(
    states: Float[np.ndarray, "C N D"],
    labels: Bool[np.ndarray, "C N"],
    validation_states: Float[np.ndarray, "C M D"],
    validation_labels: Bool[np.ndarray, "C M"],
    config: CalibrationConfig,
    progress: Progress | None = None,
) -> tuple[Router, ...]:
    """Trains the routers of all exit points at once with AdamW; each keeps its best epoch on the validation split.

    Args:
      states: RMS-normed training states, float16.
      labels: whether exiting there is right.
      validation_states: RMS-normed validation states, float16.
      validation_labels: labels of the validation states.
      config: calibration settings.
      progress: called with (stage, done, total).

    Returns:
      Routers with down-projections rounded to 8 bits in each column, the precision they are stored in.
    """
    count, tokens, size = states.shape
    parameters = _initial_routers(count, size, labels, config)
    steps = max(1, tokens // _BATCH) * config.max_epochs
    schedule = optax.cosine_decay_schedule(config.learning_rate, steps)
    optimiser = optax.adamw(schedule, weight_decay=config.weight_decay)
    state = optimiser.init(parameters)
    # The initial routers count as epoch 0, so training never makes a router worse on validation.
    best = jax.tree.map(np.asarray, parameters)
    best_loss, stale_epochs = _losses(parameters, validation_states, validation_labels), 0
    rng = np.random.default_rng(config.seed)
    step = _training_step(optimiser)
    for epoch in range(config.max_epochs):
        for rows in _minibatches(tokens, rng):
            parameters, state = step(parameters, state, jnp.asarray(states[:, rows]), jnp.asarray(labels[:, rows]))
        # Keep the routers that improved; stop after `patience` epochs in which none did.
        loss = _losses(parameters, validation_states, validation_labels)
        better = loss < best_loss
        best = jax.tree.map(lambda new, old, b=better: _select_better(b, np.asarray(new), old), parameters, best)
        best_loss, stale_epochs = np.where(better, loss, best_loss), 0 if better.any() else stale_epochs + 1
        if progress is not None:
            progress("training routers", epoch + 1, config.max_epochs)
        if stale_epochs >= config.patience:
            break
    return tuple(_round_router(jax.tree.map(lambda a, c=c: a[c], best)) for c in range(count))


def router_probabilities(router: Router, states: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " N"]:
    """Router scores of RMS-normed states, computed in chunks."""
    chunks = [states[i : i + _CHUNK_TOKENS] for i in range(0, len(states), _CHUNK_TOKENS)]
    return np.concatenate([np.asarray(jax.nn.sigmoid(_logits(router, jnp.asarray(chunk)))) for chunk in chunks])


def _initial_routers(count: int, size: int, labels: np.ndarray, config: CalibrationConfig) -> Router:
    """Initial routers, stacked over exit points; output biases start at the log odds of the labels."""
    key, hidden = jax.random.key(config.seed), config.router_bottleneck_dim
    rate = np.clip(labels.mean(axis=1), 1e-4, 1 - 1e-4)
    return Router(
        down=jax.random.normal(key, (count, size, hidden), jnp.float32) / np.float32(np.sqrt(size)),
        down_bias=jnp.zeros((count, hidden), jnp.float32),
        up=jnp.zeros((count, hidden), jnp.float32),
        up_bias=jnp.asarray(np.log(rate / (1 - rate)), jnp.float32),
    )


def _logits(router: Router, states: Float[Array, "N D"]) -> Float[Array, " N"]:
    hidden = jnp.dot(states.astype(jnp.float32), router.down, precision="highest")
    hidden = jax.nn.silu(hidden + router.down_bias[None, :])
    return jnp.dot(hidden, router.up, precision="highest") + router.up_bias


def _training_step(optimiser: optax.GradientTransformation) -> Callable[..., tuple[Router, optax.OptState]]:
    def loss(parameters: Router, states: Array, labels: Array) -> Array:
        logits = jax.vmap(_logits)(parameters, states)
        # Sum over exit points: they share no parameters, so each gradient comes from its own loss.
        return jnp.sum(jnp.mean(optax.sigmoid_binary_cross_entropy(logits, labels.astype(jnp.float32)), axis=1))

    @jax.jit
    def step(parameters: Router, state: optax.OptState, states: Array, labels: Array) -> tuple[Router, optax.OptState]:
        gradients = jax.grad(loss)(parameters, states, labels)
        return apply_gradients(optimiser, gradients, state, parameters)

    return step


@jax.jit
def _chunk_loss(parameters: Router, states: Array, labels: Array) -> Array:
    logits = jax.vmap(_logits)(parameters, states)
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, labels.astype(jnp.float32)), axis=1)


def _losses(parameters: Router, states: np.ndarray, labels: np.ndarray) -> np.ndarray:
    total = np.zeros(len(labels))
    for i in range(0, labels.shape[1], _CHUNK_TOKENS):
        rows = slice(i, i + _CHUNK_TOKENS)
        total += np.asarray(_chunk_loss(parameters, jnp.asarray(states[:, rows]), jnp.asarray(labels[:, rows])))
    return total / labels.shape[1]


def _minibatches(tokens: int, rng: np.random.Generator) -> list[np.ndarray]:
    order = rng.permutation(tokens)
    count = max(1, tokens // _BATCH)
    return [np.sort(part) for part in np.array_split(order[: count * _BATCH] if tokens >= _BATCH else order, count)]


def _select_better(better: np.ndarray, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    return np.where(better.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)


def _round_router(router: Router) -> Router:
    return Router(*(jnp.asarray(a, jnp.float32) for a in router._replace(down=round_columns(np.asarray(router.down)))))

"""Trains the second look: one small network for each exit point, on tokens that no router was trained on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from pallas_kernels.exit_step import router_scores
from tide_jax.calibration.collect import Progress
from tide_jax.calibration.exit_heads import map_chunks
from tide_jax.calibration.gradient_step import apply_gradients
from tide_jax.exits.confidence import exit_scores, features
from tide_jax.exits.router import SCREEN_LEVELS, Confidence, Routers
from tide_jax.model.decoder import Decoder

HELD_BACK_SHARE = 0.3
"""Share of the routers' tokens held back for the second look: a router is overconfident on its training tokens."""

_HIDDEN, _STEPS, _LEARNING_RATE, _WEIGHT_DECAY = 16, 400, 0.02, 1e-3
_MAX_REJECTED = 0.02  # share of the tokens with a second-look score above a level that its screen may reject


def train_confidence(
    model: Decoder,
    routers: Routers,
    states: Float[np.ndarray, "C N D"],
    labels: Bool[np.ndarray, "C N"],
    seed: int,
    progress: Progress | None = None,
) -> tuple[Confidence, ...]:
    """Trains the second look's network of each exit point by binary cross-entropy.

    Args:
      model: the decoder.
      routers: trained routers and heads, with candidates.
      states: RMS-normed states of tokens that neither heads nor routers were trained on.
      labels: whether exiting there is right.
      seed: seed of the initial weights.
      progress: called with (stage, done, total).
    """
    networks = []
    for c in range(len(states)):
        inputs = _second_look_features(model, routers, c, states[c])
        network = _train_network(inputs, labels[c], jax.random.fold_in(jax.random.key(seed), c))
        networks.append(network._replace(screens=_choose_screens(network, inputs)))
        if progress is not None:
            progress("training the second look", c + 1, len(states))
    return tuple(networks)


def final_scores(model: Decoder, routers: Routers, states: Float[np.ndarray, "C N D"]) -> Float[np.ndarray, "C N"]:
    """Scores that exit thresholds apply to, for RMS-normed states."""
    bare = routers.without_metadata()

    def scores(exit_point: int) -> np.ndarray:
        return map_chunks(lambda chunk: _compiled_scores(model, bare, chunk, exit_point=exit_point), states[exit_point])

    return np.stack([scores(c) for c in range(len(states))])


def _compute_scores(model: Decoder, routers: Routers, states: Array, *, exit_point: int) -> Float[Array, " N"]:
    return exit_scores(model, routers, exit_point, states.astype(model.dtype)).scores[0]


_compiled_scores = jax.jit(_compute_scores, static_argnames="exit_point")


def _second_look_features(model: Decoder, routers: Routers, c: int, states: np.ndarray) -> Float[Array, "N F"]:
    bare = routers.without_metadata()
    return jnp.asarray(map_chunks(lambda chunk: _compiled_features(model, bare, chunk, exit_point=c), states))


def _compute_features(model: Decoder, routers: Routers, states: Array, *, exit_point: int) -> Float[Array, "N F"]:
    assert routers.candidates is not None
    x, eps = states.astype(model.dtype), model.config.norm_eps
    first = router_scores(x, routers.routers[exit_point], eps=eps)
    out = model.final_norm(routers.exit_state(exit_point, x[None], eps=eps))
    return features(model, routers.candidates.rows, out, first[None])[0]


_compiled_features = jax.jit(_compute_features, static_argnames="exit_point")


def _train_network(inputs: Float[Array, "N F"], labels: Bool[np.ndarray, " N"], key: Array) -> Confidence:
    """Trains a network on standardised features, then folds the standardisation into its first layer."""
    # Standardise the features; the network starts at the log odds of the labels.
    mean, scale = jnp.mean(inputs, axis=0), jnp.maximum(jnp.std(inputs, axis=0), 1e-3)
    rate = float(np.clip(labels.mean(), 1e-4, 1 - 1e-4))
    width = inputs.shape[1]
    network = Confidence(
        screens=jnp.zeros((len(SCREEN_LEVELS),), jnp.float32),
        down=jax.random.normal(key, (width, _HIDDEN), jnp.float32) / np.float32(np.sqrt(width)),
        down_bias=jnp.zeros((_HIDDEN,), jnp.float32),
        up=jnp.zeros((_HIDDEN,), jnp.float32),
        up_bias=jnp.float32(np.log(rate / (1 - rate))),
    )
    network = _minimise_loss(network, (inputs - mean[None, :]) / scale[None, :], jnp.asarray(labels, jnp.float32))
    # Fold the standardisation into the first layer.
    down = network.down / scale[:, None]
    return network._replace(down=down, down_bias=network.down_bias - jnp.dot(mean, down, precision="highest"))


@jax.jit
def _minimise_loss(network: Confidence, inputs: Float[Array, "N F"], labels: Float[Array, " N"]) -> Confidence:
    optimiser = optax.adamw(optax.cosine_decay_schedule(_LEARNING_RATE, _STEPS), weight_decay=_WEIGHT_DECAY)

    def loss(network: Confidence) -> Array:
        return jnp.mean(optax.sigmoid_binary_cross_entropy(network.logit(inputs), labels))

    def step(_: int, carry: tuple[Confidence, optax.OptState]) -> tuple[Confidence, optax.OptState]:
        network, state = carry
        gradients = jax.grad(loss)(network)
        return apply_gradients(optimiser, gradients, state, network)

    return jax.lax.fori_loop(0, _STEPS, step, (network, optimiser.init(network)))[0]


def _choose_screens(network: Confidence, inputs: Float[Array, "N F"]) -> Float[Array, " levels"]:
    """Screen of each level: the router score that nearly all tokens with a final score above the level exceed.

    At most `_MAX_REJECTED` of those tokens have a lower one.

    A screen never exceeds its level, so tokens whose router score exceeds the level always get a second look. All
    screens are 1 if no token's final score exceeds the lowest level.
    """
    final, first = (np.asarray(jax.nn.sigmoid(odds)) for odds in (network.logit(inputs), inputs[:, 0]))
    if not (final > SCREEN_LEVELS[0]).any():
        return jnp.ones((len(SCREEN_LEVELS),), jnp.float32)
    screens = []
    for level in SCREEN_LEVELS:
        above = first[final > level]
        screens.append(min(np.quantile(above, _MAX_REJECTED) * (1 - 1e-6), level) if len(above) else level)
    return jnp.asarray(np.maximum.accumulate(screens), jnp.float32)

"""Tunes affine exit heads on the full model's predictions (tuned lens, Belrose et al. 2023, arXiv:2303.08112).

The closed-form fit brings the exit state near the last state, but the prediction is what counts. So gradient descent
continues from there, on the KL divergence of the heads' predictions from the full model's. Both distributions are over
the tokens that the full model predicts in the sample: a small part of the vocabulary with nearly all its probability.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from tide_jax.calibration.collect import Progress
from tide_jax.calibration.gradient_step import apply_gradients
from tide_jax.calibration.reservoir import Reservoir
from tide_jax.config import CalibrationConfig
from tide_jax.exits.router import ExitHead
from tide_jax.exits.router_file import round_half
from tide_jax.model.decoder import Decoder, HeadRows

BATCH_TOKENS = 512
_HELD_OUT_TOKENS = 2048  # held-out tokens that decide whether tuning helped
MAX_VOCABULARY = 4096
_LEARNING_RATE = 0.024  # divided by the root of the hidden size: a step changes predictions equally at any width

_Step = Callable[..., tuple[ExitHead, optax.OptState]]


def tune_heads(
    model: Decoder,
    heads: tuple[ExitHead, ...],
    fit_sample: Reservoir,
    held_out: Reservoir,
    config: CalibrationConfig,
    progress: Progress | None = None,
) -> tuple[ExitHead, ...]:
    """Tunes each head for `exit_head_steps` steps; a head that does not improve on held-out tokens stays unchanged.

    Returns:
      Heads rounded to float16 values, so that saving them changes nothing.
    """
    # Predictions are restricted to the most frequent tokens.
    rows = model.head_rows(frequent_tokens(fit_sample.targets, model.config.vocab_size, MAX_VOCABULARY))
    size, steps = model.config.hidden_size, config.exit_head_steps
    optimiser = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE / float(np.sqrt(size)), steps))
    step, tuned = _training_step(optimiser), list[ExitHead]()
    for c, head in enumerate(heads):
        rng, best, state = np.random.default_rng(config.seed), head, optimiser.init(head)
        for _ in range(steps):
            chosen = np.sort(rng.integers(0, len(fit_sample), min(BATCH_TOKENS, len(fit_sample))))
            head, state = step(
                model, rows, head, state, jnp.asarray(fit_sample.states[c, chosen]), fit_sample.last[chosen]
            )
        # Compare rounded heads, as they will be saved.
        head = jax.tree.map(lambda a: jnp.asarray(round_half(np.asarray(a))), head)
        before, after = (_held_out_divergence(model, rows, candidate, held_out, c) for candidate in (best, head))
        tuned.append(head if after < before else best)
        if progress is not None:
            progress("tuning exit heads", c + 1, len(heads))
    return tuple(tuned)


def frequent_tokens(targets: np.ndarray, vocab_size: int, count: int) -> Array:
    """Up to `count` of the most frequent targets, at least two, int32."""
    frequency = np.bincount(targets, minlength=vocab_size)
    order = np.argsort(-frequency, kind="stable")
    return jnp.asarray(order[: max(2, min(count, np.count_nonzero(frequency)))], jnp.int32)


def _divergence(
    model: Decoder, rows: HeadRows, head: ExitHead, states: Float[Array, "N D"], last: Float[Array, "N D"]
) -> Float[Array, ""]:
    """Mean KL divergence of the exit's predictions from the full model's, over the tokens of `rows`."""
    eps = model.config.norm_eps
    full = model.logits(model.final_norm(last.astype(model.dtype)[None]), rows)
    out = model.logits(model.final_norm(head(states.astype(model.dtype)[None], eps=eps)), rows)
    full, out = jax.nn.log_softmax(full, axis=-1), jax.nn.log_softmax(out, axis=-1)
    return jnp.mean(jnp.sum(jnp.exp(full) * (full - out), axis=-1))


_compiled_divergence = jax.jit(_divergence)


def _held_out_divergence(model: Decoder, rows: HeadRows, head: ExitHead, sample: Reservoir, c: int) -> float:
    states, last = sample.states[c, :_HELD_OUT_TOKENS], sample.last[:_HELD_OUT_TOKENS]
    size = min(BATCH_TOKENS, len(last))
    starts = range(0, len(last) - size + 1, size)
    parts = (_compiled_divergence(model, rows, head, states[i : i + size], last[i : i + size]) for i in starts)
    return float(np.mean([float(part) for part in parts]))


def _training_step(optimiser: optax.GradientTransformation) -> _Step:
    @jax.jit
    def step(
        model: Decoder, rows: HeadRows, head: ExitHead, state: optax.OptState, states: Array, last: Array
    ) -> tuple[ExitHead, optax.OptState]:
        gradients = jax.grad(lambda head: _divergence(model, rows, head, states, last))(head)
        return apply_gradients(optimiser, gradients, state, head)

    return step

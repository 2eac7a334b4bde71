"""Choosing the next token from logits: pure functions with traced settings.

Filters apply in transformers' order: repetition penalty, rules (`tide_jax.generation.logit_rules`), temperature, top-k,
top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, UInt32

from tide_jax.checks import whole_number
from tide_jax.model.generation_settings import sampling_dial
from tide_jax.model.ops import likeliest

RowKeys = Key[Array, " N"] | UInt32[Array, "N k"]
"""A random key for each row, of the new style or the old."""


class Sampling(NamedTuple):
    """Sampling settings, float32 or int32 scalars.

    Attributes:
      temperature: 0 is greedy.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set whose probability reaches p (Holtzman et al. 2019, arXiv:1904.09751); 1 keeps all.
      min_p: keep tokens with at least this fraction of the most likely token's probability (Nguyen et al. 2024,
        arXiv:2407.01082).
      repetition_penalty: divides positive and multiplies negative logits of tokens already in the row
        (Keskar et al. 2019, arXiv:1909.05858); 1 is none.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]


def make_sampling(
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Sampling:
    """Checks the settings and turns them into arrays. Raises TideError for a value outside its range."""
    return Sampling(
        temperature=jnp.float32(sampling_dial("temperature", temperature)),
        top_k=jnp.int32(whole_number("top_k", top_k)),
        top_p=jnp.float32(sampling_dial("top_p", top_p)),
        min_p=jnp.float32(sampling_dial("min_p", min_p)),
        repetition_penalty=jnp.float32(sampling_dial("repetition_penalty", repetition_penalty)),
    )


Rule = Callable[[Float[Array, "B V"]], Float[Array, "B V"]]


def sample(
    key: PRNGKeyArray,
    logits: Float[Array, "B V"],
    sampling: Sampling,
    seen: Bool[Array, "B V"],
    rule: Rule | None = None,
) -> Int[Array, " B"]:
    """Draws one token for each row, int32.

    Each row has its own random key, so its tokens do not depend on the other rows.

    Args:
      key: random key of the step.
      logits: float32.
      sampling: sampling settings.
      seen: tokens already in the row, for the repetition penalty.
      rule: further change of the logits, see `tide_jax.generation.logit_rules.rule_on`.
    """
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)
    return sample_rows(lambda: row_keys(key, rows), logits, sampling, seen, rule)


def row_keys(key: PRNGKeyArray, rows: Int[Array, " N"]) -> RowKeys:
    """Random keys for rows of a batch."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def sample_rows(
    keys: Callable[[], RowKeys],
    logits: Float[Array, "B V"],
    sampling: Sampling,
    seen: Bool[Array, "B V"],
    rule: Rule | None = None,
) -> Int[Array, " B"]:
    """Like `sample`, with a key for each row; `keys` is called only for sampling, greedy decoding needs none."""
    logits = penalise(logits, sampling.repetition_penalty, seen)
    logits = logits if rule is None else rule(logits)

    def draw() -> Array:
        return jax.vmap(jax.random.categorical)(keys(), filter_logits(logits, sampling)).astype(jnp.int32)

    return lax.cond(sampling.temperature > 0, draw, lambda: likeliest(logits))


def penalise(logits: Float[Array, "B V"], penalty: Float[Array, ""], seen: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    """Applies the repetition penalty to tokens in `seen`; 1 changes nothing."""

    def apply() -> Array:
        return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)

    return lax.cond(penalty == 1.0, lambda: logits, apply)


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Divides logits by the temperature and sets those that top-k, top-p or min-p exclude to minus infinity."""
    logits = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    logits = lax.cond(sampling.top_k > 0, lambda: _top_k(logits, sampling.top_k), lambda: logits)
    logits = lax.cond(sampling.top_p < 1.0, lambda: _top_p(logits, sampling.top_p), lambda: logits)
    floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
    return jnp.where(logits >= floor, logits, -jnp.inf)


def _top_k(logits: Float[Array, "B V"], k: Int[Array, ""]) -> Float[Array, "B V"]:
    """Keeps logits not below the k-th largest."""
    keys, count = _order_keys(logits), jnp.minimum(k, logits.shape[-1])
    cut = _largest(lambda t: jnp.sum(keys >= t[:, None], axis=-1, dtype=jnp.int32) >= count, logits.shape[0])
    return jnp.where(keys >= cut[:, None], logits, -jnp.inf)


def _top_p(logits: Float[Array, "B V"], p: Float[Array, ""]) -> Float[Array, "B V"]:
    """Keeps the most likely tokens until their total probability reaches p, ties included."""
    keys, probabilities = _order_keys(logits), jax.nn.softmax(logits, axis=-1)
    above = _largest(
        lambda t: jnp.sum(jnp.where(keys >= t[:, None], probabilities, 0.0), axis=-1) >= p, logits.shape[0]
    )
    return jnp.where(keys >= above[:, None], logits, -jnp.inf)


def _order_keys(x: Float[Array, "B V"]) -> Int[Array, "B V"]:
    """int32 keys with the same order as the floats."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _largest(holds: Callable[[Int[Array, " B"]], Bool[Array, " B"]], batch: int) -> Int[Array, " B"]:
    """Largest int32 for which a condition holds, by bisection; above it the condition must not hold.

    This takes 32 passes over the vocabulary. On a CPU, sorting costs several times as much.
    """

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # condition holds at low, fails at high
        # The mean without overflow.
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        good = holds(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    limits = jnp.iinfo(jnp.int32)
    bounds = jnp.full((batch,), limits.min, jnp.int32), jnp.full((batch,), limits.max, jnp.int32)
    return lax.fori_loop(0, 32, halve, bounds)[0]

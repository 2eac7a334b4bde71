"""Recurrent layers give what transformers' layers give: whole rows, padded batches, and token by token."""

from __future__ import annotations

from typing import Any

import channel_mixers
import jax
import jax.numpy as jnp
import matrix_mixers
import numpy as np
import pytest
from mixer_pairs import SIZE, Pair

from tide_jax.model.recurrent.mixer import Mixer
from tide_jax.model.recurrent.order import TokenOrder

TOKENS = 75
MAKERS = [
    channel_mixers.short_conv,
    matrix_mixers.gated_delta,
    matrix_mixers.rates_up_to_two,
    matrix_mixers.kimi_delta,
    matrix_mixers.full_kimi_delta,
    matrix_mixers.limited_kimi_delta,
    matrix_mixers.state_space,
    channel_mixers.selective,
    channel_mixers.plain_norms,
    channel_mixers.scaled_norms,
    matrix_mixers.lightning,
    channel_mixers.rg_lru,
    matrix_mixers.matrix_lstm,
    channel_mixers.time_mix,
]


@pytest.fixture(scope="module", params=MAKERS, ids=lambda make: make.__name__)
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param()


def rows() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(2, TOKENS, SIZE)).astype(np.float32)


def assert_close(found: Any, wanted: np.ndarray) -> None:
    """No number differs by more than a few roundings of the largest one."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-6 * np.abs(wanted).max())


@jax.jit
def run(mixer: Mixer, x: jax.Array, real: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    order = TokenOrder.of(real)
    out, inputs = mixer(x, order, state)
    return out, mixer.advance(state, inputs, order)


def test_whole_rows(pair: Pair) -> None:
    mixer, expected = pair
    x = rows()
    out, _ = run(mixer, jnp.asarray(x), jnp.ones(x.shape[:2], bool), mixer.start(2, jnp.float32))
    assert_close(out, expected(x))


def test_padding_anywhere_and_rows_in_parts(pair: Pair) -> None:
    """Tokens of each row, with slots that hold none before, between and behind them, in three passes."""
    mixer, expected = pair
    x, real = rows(), np.random.default_rng(4).random((2, TOKENS)) < 0.7
    real[1, :9] = False
    state, outs = mixer.start(2, jnp.float32), []
    for part in (slice(0, 40), slice(40, 41), slice(41, TOKENS)):
        spoilt = np.where(real[:, part, None], x[:, part], 1e3)
        out, state = run(mixer, jnp.asarray(spoilt), jnp.asarray(real[:, part]), state)
        outs.append(np.asarray(out))
    out = np.concatenate(outs, axis=1)
    for b in range(2):
        assert_close(out[b, real[b]], expected(x[b : b + 1, real[b]])[0])


def test_token_by_token(pair: Pair) -> None:
    mixer, expected = pair
    x, state, outs = rows()[:, :12], mixer.start(2, jnp.float32), []
    for t in range(x.shape[1]):
        out, state = run(mixer, jnp.asarray(x[:, t : t + 1]), jnp.ones((2, 1), bool), state)
        outs.append(out)
    assert_close(np.concatenate(outs, axis=1), expected(x))


def test_inputs_without_running_the_layer(pair: Pair) -> None:
    mixer, _ = pair
    x = jnp.asarray(rows())
    _, inputs = mixer(x, TokenOrder.of(jnp.ones(x.shape[:2], bool)), mixer.start(2, jnp.float32))
    np.testing.assert_array_equal(mixer.project_inputs(x), inputs)

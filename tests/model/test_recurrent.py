"""Recurrences over many tokens are the step, repeated; slots without a token change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tide_jax.model.recurrent.conv import causal_conv, move_window
from tide_jax.model.recurrent.linear import CHANNEL_CHUNK, CHUNK, Updates, run_linear
from tide_jax.model.recurrent.order import TokenOrder

B, H, DK, DV = 2, 3, 5, 4
FADES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "middling": lambda size: -size,
    "weak": lambda size: -0.01 * size,
    "strong": lambda size: -jnp.minimum(18.0 + size, 20.0),
    "some strong": lambda size: -jnp.where(size > 1.8, 20.0, 0.01 * size),
}


def token_by_token(state: np.ndarray, updates: Updates, delta: bool) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence as its definition says it, in float64."""
    state, out = state.astype(np.float64), []
    queries, keys, values, fade, rate = (np.asarray(a, np.float64) for a in updates)
    for t in range(queries.shape[1]):
        state = state * np.exp(fade[:, t].reshape(len(state), H, -1))[..., None]
        write = values[:, t]
        if delta:
            write = write - np.einsum("bhk,bhkv->bhv", keys[:, t], state)
        state = state + np.einsum("bhk,bhv->bhkv", keys[:, t], write * rate[:, t][..., None])
        out.append(np.einsum("bhk,bhkv->bhv", queries[:, t], state))
    return np.stack(out, axis=1), state


def made(tokens: int, seed: int = 0, *, fades: str = "middling", channels: bool = False) -> tuple[Any, Updates]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    keys = normal(B, tokens, H, DK) + 0.5  # keys resemble each other, so that writes depend on many earlier ones
    keys = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    rate = jax.nn.sigmoid(normal(B, tokens, H))
    fade = FADES[fades](jnp.abs(normal(B, tokens, H, DK) if channels else normal(B, tokens, H)))
    return normal(B, H, DK, DV), Updates(normal(B, tokens, H, DK), keys, normal(B, tokens, H, DV), fade, rate)


def assert_exact(found: Any, wanted: Any, roundings: float = 2e-6) -> None:
    """Outputs and states differ by less than a few roundings of the largest number."""
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=roundings * np.abs(other).max())


def run(state: Any, updates: Updates, delta: bool) -> Any:
    return jax.jit(run_linear, static_argnames="delta")(state, updates, delta=delta)


@pytest.mark.parametrize("channels", [False, True], ids=["heads", "channels"])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 8, CHUNK - 1, CHUNK, CHANNEL_CHUNK + 7])
def test_chunks_are_the_recurrence(tokens: int, delta: bool, channels: bool) -> None:
    state, updates = made(tokens, channels=channels)
    assert_exact(run(state, updates, delta), token_by_token(np.asarray(state), updates, delta))


@pytest.mark.parametrize("channels", [False, True], ids=["heads", "channels"])
@pytest.mark.parametrize("fades", ["weak", "strong", "some strong"])
def test_strong_and_weak_fades(fades: str, channels: bool) -> None:
    """Small fades count behind large ones, and nothing overflows."""
    state, updates = made(CHANNEL_CHUNK + 7, fades=fades, channels=channels)
    assert_exact(run(state, updates, True), token_by_token(np.asarray(state), updates, True))


@pytest.mark.parametrize("channels", [False, True], ids=["heads", "channels"])
def test_rates_up_to_two(channels: bool) -> None:
    state, updates = made(CHUNK + 7, fades="weak", channels=channels)
    updates = updates._replace(rate=2.0 * updates.rate)
    assert_exact(run(state, updates, True), token_by_token(np.asarray(state), updates, True))


@pytest.mark.parametrize("delta", [False, True])
def test_tokens_that_are_none_do_nothing(delta: bool) -> None:
    tokens = 70
    real = np.random.default_rng(1).random((B, tokens)) < 0.6
    state, updates = made(tokens)
    order = TokenOrder.of(jnp.asarray(real))
    ordered = Updates(*map(order.forth, updates)).only(order.real)
    out, after = run_linear(state, ordered, delta=delta)
    out = np.asarray(order.back(out))
    for b in range(B):
        some = Updates(*(np.asarray(a)[b : b + 1, real[b]] for a in updates))
        wanted, wanted_after = token_by_token(np.asarray(state)[b : b + 1], some, delta)
        np.testing.assert_allclose(out[b, real[b]], wanted[0], rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(after[b], wanted_after[0], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("size", [3, 4])
def test_a_convolution_goes_on_where_it_stopped(size: int) -> None:
    """Real tokens of each row in two parts, with padding before, between and behind them."""
    rng = np.random.default_rng(2)
    rows, filters, bias = rng.normal(size=(B, 11, 6)), rng.normal(size=(6, size)), rng.normal(size=6)
    real = rng.random((B, 11)) < 0.6
    window, out = jnp.zeros((B, size - 1, 6)), []
    for part in (slice(0, 5), slice(5, 11)):
        order = TokenOrder.of(jnp.asarray(real[:, part]))
        ordered = order.forth(jnp.asarray(rows[:, part], jnp.float32))
        found = causal_conv(window, ordered, jnp.asarray(filters, jnp.float32), jnp.asarray(bias, jnp.float32))
        window = move_window(window, ordered, order.count)
        out.append(order.back(found))
    found = np.concatenate(out, axis=1)
    for b in range(B):
        before = np.concatenate([np.zeros((size - 1, 6)), rows[b, real[b]]])
        wanted = np.stack([(before[t : t + size].T * filters).sum(1) for t in range(real[b].sum())]) + bias
        np.testing.assert_allclose(found[b, real[b]], wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(window[b], before[len(before) - size + 1 :], rtol=1e-6)

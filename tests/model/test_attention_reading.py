"""Attention over new and cached keys, however they are read, is one softmax over the keys that each query sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tide_jax.model.attention import reading, softmax
from tide_jax.model.attention.softmax import Part, _by_token, _keys_first, _products, attend_part
from tide_jax.model.attention.span import BLOCK, CachedRows, KeyValue, Span
from tide_jax.model.attention.tiles import Tiles

B, KV, G, HD, HV = 2, 2, 2, 6, 5


@pytest.mark.parametrize("way", [_products, _keys_first, _by_token])
@pytest.mark.parametrize("shape", [(1, 2, 3, 1), (2, 1, 4, 1), (2, 2, 1, 5), (1, 1, 7, 9)])
def test_queries_times_keys(way: Callable[..., jax.Array], shape: tuple[int, int, int, int]) -> None:
    rng = np.random.default_rng(0)
    q, keys = rng.normal(size=(*shape, 6)), rng.normal(size=(*shape[:2], 11, 6))
    found = way(jnp.asarray(q, jnp.float32), jnp.asarray(keys, jnp.float32))
    wanted = np.einsum("bkgtd,bksd->bkgts", q, keys)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


class Case(NamedTuple):
    """Queries of new tokens, their own keys and values, cached ones, and what each query sees of both."""

    q: jax.Array
    new: KeyValue
    cached: KeyValue
    filled: int
    masks: tuple[np.ndarray, np.ndarray]

    def bias(self, of: int) -> np.ndarray:
        """A bias for each head, token and key of a run."""
        shape = (B, KV * G, *self.masks[of].shape[1:])
        return np.random.default_rng(of).normal(size=shape).astype(np.float32)


def make_case(tokens: int, slots: int, filled: int, window: int | None = None) -> Case:
    """The first row has real tokens throughout; the second has padding ahead and sees no key there."""
    rng = np.random.default_rng(tokens + slots + filled)

    def random(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    ahead = np.asarray([0, filled + tokens // 3])[:, None]
    places = np.arange(filled + tokens)[None] - ahead
    old, query = places[:, :filled], places[:, filled:]
    slot = np.concatenate([old, np.full((B, slots - filled), -1)], axis=1)

    def mask(keys: np.ndarray) -> np.ndarray:
        distance = query[:, :, None] - keys[:, None]
        seen = (keys[:, None] >= 0) & (distance >= 0)
        return seen if window is None else seen & (distance < window)

    def rows(count: int) -> KeyValue:
        return KeyValue(random(B, KV, count, HD), random(B, KV, count, HV))

    return Case(random(B, tokens, KV, G, HD), rows(tokens), rows(slots), filled, (mask(query), mask(slot)))


def one_softmax(
    case: Case, softcap: float | None, sinks: np.ndarray | None, biased: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Attention in float64 without blocks, and which queries see a key."""
    keys = np.concatenate([case.new.keys, case.cached.keys], axis=2, dtype=np.float64)
    values = np.concatenate([case.new.values, case.cached.values], axis=2, dtype=np.float64)
    mask = np.concatenate(case.masks, axis=2)
    scores = np.einsum("btkgd,bksd->btkgs", np.asarray(case.q, np.float64), keys) * 0.3
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if biased:
        bias = np.concatenate([case.bias(0), case.bias(1)], axis=3)
        scores = scores + bias.reshape(B, KV, G, *bias.shape[2:]).transpose(0, 3, 1, 2, 4)
    weights = np.exp(scores) * mask[:, :, None, None]
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks.reshape(1, 1, KV, G, 1))
    seen = mask.any(-1)
    return np.einsum("btkgs,bksd->btkgd", weights / np.where(total == 0, 1, total), values), seen


@pytest.mark.parametrize(
    ("tokens", "slots", "filled", "window"),
    [
        (700, 40, 30, None),  # more queries than a tile, and not a multiple of them
        (300, 3 * BLOCK, BLOCK + 7, None),
        (300, 3 * BLOCK + 128, 3 * BLOCK + 100, None),  # the last tile of keys overlaps the one before
        (300, 2 * BLOCK, 2 * BLOCK, 50),  # whole tiles lie before every window
        (1, 4 * BLOCK, 300, None),
        (1, 4 * BLOCK, 900, None),
        (3, BLOCK, 10, 4),
    ],
)
@pytest.mark.parametrize("rest", ["plain", "softcap, bias and sinks"])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_attention_is_one_softmax(
    tokens: int, slots: int, filled: int, window: int | None, rest: str, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(tokens, slots, filled, window)
    biased = rest != "plain"
    softcap, sinks = (2.0, np.asarray([0.5, -1.0, 0.0, 2.0])) if biased else (None, None)
    if platform != "cpu":
        # What other platforms would run, with blocks and caches as long as here.
        def choose(*args: Any, default: Callable[..., Any], **ways: Callable[..., Any]) -> Any:
            return ways.get(platform, default)(*args)

        for module in (reading, softmax):
            monkeypatch.setattr(module, "lax", _With(module.lax, platform_dependent=choose))
        monkeypatch.setattr(reading, "_LONG_BLOCK", 128)
        monkeypatch.setattr(reading, "LARGE_CACHE", 1)

    @jax.jit
    def found() -> jax.Array:
        biases = [jnp.asarray(case.bias(of)) if biased else None for of in (0, 1)]
        masks = map(jnp.asarray, case.masks)
        runs = (case.new, CachedRows(*case.cached, filled=jnp.int32(filled)))
        spans = [(rows, Span(mask, bias)) for rows, mask, bias in zip(runs, masks, biases, strict=True)]
        given = None if sinks is None else jnp.asarray(sinks, jnp.float32)
        return reading.attend(jnp.asarray(case.q), spans, scale=0.3, softcap=softcap, sinks=given)

    wanted, seen = one_softmax(case, softcap, sinks, biased)
    assert seen.any(axis=1).all() or tokens < 3
    result = np.asarray(found())
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result[seen], wanted[seen], atol=2e-5)


def test_long_prompts_can_be_differentiated() -> None:
    case = make_case(2 * BLOCK + 5, BLOCK, 1)
    span = Span(jnp.asarray(case.masks[0]), None)

    def total(q: jax.Array) -> jax.Array:
        return jnp.sum(reading.attend(q, [(case.new, span)], scale=0.3) ** 2)

    slope = jax.jit(jax.grad(total))(case.q)
    ahead = jnp.zeros_like(case.q).at[0, 300, 1, 0, 2].set(1e-2)
    change = (total(case.q + ahead) - total(case.q - ahead)) / 2e-2
    np.testing.assert_allclose(slope[0, 300, 1, 0, 2], change, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("heads", [1, 71])
def test_a_single_token_never_reads_in_a_loop_on_an_accelerator(heads: int) -> None:
    """Blocks of a cache would be copied; 71 heads share a key in Falcon-7B."""
    q, cache = jnp.zeros((1, 1, 1, heads, 8)), jnp.zeros((1, 1, 4096, 8))
    span = Span(jnp.ones((1, 1, 4096), bool), None)

    def step(filled: jax.Array) -> jax.Array:
        return reading.attend(q, [(CachedRows(cache, cache, filled), span)], scale=1.0)

    for platform in ("cuda", "tpu"):
        assert "while" not in jax.jit(step).trace(jnp.int32(9)).lower(lowering_platforms=(platform,)).as_text()


class _With:
    """A module with some attributes replaced."""

    def __init__(self, module: Any, **changes: Any) -> None:
        self.__dict__.update(vars(module), **changes)


def test_tiles_that_no_query_sees_are_not_read() -> None:
    """Values that are not numbers would reach the result through a weight of zero."""
    case = make_case(300, 4 * BLOCK, 4 * BLOCK, window=20)
    values = np.asarray(case.cached.values).copy()
    values[:, :, : 2 * BLOCK] = np.nan

    def part(q: jax.Array, rows: KeyValue, span: Span) -> Part:
        return attend_part(q, rows, span, 0.3, None)

    q = jnp.transpose(jnp.asarray(case.q), (0, 2, 3, 1, 4))
    rows, span = KeyValue(case.cached.keys, jnp.asarray(values)), Span(jnp.asarray(case.masks[1]), None)
    tiles = Tiles(part, q, rows, span, None, tall=64, wide=BLOCK, skip=True)
    assert np.isfinite(jax.jit(lambda: tiles.read())().output()).all()
    assert not np.isfinite(jax.jit(lambda: tiles._replace(skip=False).read())().output()).all()

"""Scores of cached keys: each platform's way of multiplying is the same product."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tide_jax.model.attention.span import _by_token, _keys_first, _products


@pytest.mark.parametrize("way", [_products, _keys_first, _by_token])
@pytest.mark.parametrize("shape", [(1, 2, 3, 1), (2, 1, 4, 1), (2, 2, 1, 5), (1, 1, 7, 9)])
def test_queries_times_keys(way: Callable[..., jax.Array], shape: tuple[int, int, int, int]) -> None:
    rng = np.random.default_rng(0)
    q, keys = rng.normal(size=(*shape, 6)), rng.normal(size=(*shape[:2], 11, 6))
    found = way(jnp.asarray(q, jnp.float32), jnp.asarray(keys, jnp.float32))
    wanted = np.einsum("bkgtd,bksd->bkgts", q, keys)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)

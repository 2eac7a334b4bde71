"""Translators: what they add to an exit state, how they are fitted, and that they survive a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_model

from tide_jax.calibration.translator_fit import fit_translators
from tide_jax.errors import TideError
from tide_jax.exits import router_file
from tide_jax.exits.evaluation import Batch, measure_exits
from tide_jax.exits.router import RouterMetadata, Routers, model_identity
from tide_jax.model.decoder import Decoder
from tide_jax.testing import random_routers, tiny_config

EPS = tiny_config().norm_eps
EXIT_POINTS = (1, 3)
MODEL: Decoder = tiny_model(tiny_config())


def batches(count: int, seed: int) -> list[Batch]:
    """Texts of random tokens, 24 each."""
    tokens = np.random.default_rng(seed).integers(3, 259, (count, 24)).astype(np.int32)
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)
    return [
        Batch(*map(jnp.asarray, (tokens[i : i + 8], positions[i : i + 8], positions[i : i + 8] >= 1)))
        for i in range(0, count, 8)
    ]


def layer_inputs(model: Decoder, batch: Batch) -> np.ndarray:
    """Input of every layer for the counted tokens, [L, N, D]."""
    x, found = model.embed_tokens(batch.tokens, batch.positions), []
    contexts = model.contexts(batch.positions, None)
    for layer in model.layers:
        found.append(np.asarray(x)[np.asarray(batch.counted)])
        x, _ = layer(x, contexts, None)
    return np.stack(found)


@pytest.mark.matrix
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("rank", [0, 3])
def test_each_token_gets_what_its_own_exit_point_predicts(rank: int, tokens: int) -> None:
    made = random_routers(tiny_config(), interval=1, translator_rank=rank).translators
    assert made is not None
    rng = np.random.default_rng(0)
    x, left = rng.normal(size=(1, tokens, 48)).astype(np.float32), rng.integers(0, 5, (1, tokens))
    codes = jnp.stack([made.code(c, jnp.asarray(x), eps=EPS) for c in range(5)])
    code = jnp.take_along_axis(codes, jnp.asarray(left)[None, :, :, None], axis=0)[0]
    found = made.translate(4, jnp.asarray(x), code, jnp.asarray(left), eps=EPS)
    entry = made.layers[4]
    assert entry is not None
    for t, c in enumerate(left[0]):
        expected = x[0, t]
        if c < 3:  # those that left after layer 3 are right where layer 4 reads; after layer 4 they have run it
            scale = np.sqrt(np.mean(expected**2) + EPS)
            read = expected / scale @ np.asarray(made.down[c])
            expected = expected + scale * (np.asarray(entry.shift[c]) + read @ np.asarray(entry.up[c]))
        np.testing.assert_allclose(found[0, t], expected, rtol=1e-4, atol=1e-4)


def test_a_fit_predicts_later_inputs_better_with_every_rank() -> None:
    fresh, errors = batches(8, seed=9)[0], []
    inputs = layer_inputs(MODEL, fresh)
    for rank in (0, 4, 24):
        fitted = fit_translators(MODEL, batches(64, seed=1), EXIT_POINTS, rank, 2**30)
        assert fitted.rank == rank
        assert [entry is None for entry in fitted.layers] == [True, True, True, False, False, False]
        x = jnp.asarray(inputs[2])[None]
        number = jnp.zeros(x.shape[:2], jnp.int32)
        found = fitted.translate(5, x, fitted.code(0, x, eps=EPS), number, eps=EPS)[0]
        errors.append(float(np.mean(np.square(np.asarray(found) - inputs[5]))))
    alone = float(np.mean(np.square(inputs[2] - inputs[5])))
    assert alone > errors[0] > errors[1] > errors[2]


def test_a_linear_relation_is_found_exactly() -> None:
    """Layers that add a constant: the shift alone predicts them."""
    model = tiny_model(tiny_config(), seed=3)
    for layer in model.layers:
        layer.mlp.down.kernel[...] = jnp.zeros_like(layer.mlp.down.kernel[...])
        layer.attention.out.kernel[...] = jnp.zeros_like(layer.attention.out.kernel[...])
    fitted = fit_translators(model, batches(16, seed=1), EXIT_POINTS, 0, 2**30)
    for entry in fitted.layers[3:]:
        np.testing.assert_allclose(entry.shift, 0.0, atol=1e-3)


def test_memory_bounds_the_tokens_read() -> None:
    few = fit_translators(MODEL, batches(64, seed=1), EXIT_POINTS, 0, 4 * (2 * 48 + 4) * 100)
    same = fit_translators(MODEL, batches(8, seed=1), EXIT_POINTS, 0, 4 * (2 * 48 + 4) * 100)
    jax.tree.map(np.testing.assert_array_equal, few, same)


def test_the_least_memory_still_gives_numbers() -> None:
    for leaf in jax.tree.leaves(fit_translators(MODEL, batches(64, seed=1), EXIT_POINTS, 4, 1)):
        assert np.isfinite(leaf).all()


def test_translated_rows_keep_more_of_the_model_than_propagated_ones() -> None:
    """A quarter of the tokens leaves early, whoever they are; the others' answers are compared."""
    bare = random_routers(MODEL.config, interval=2)
    fitted = fit_translators(MODEL, batches(64, seed=1), bare.exit_points, 24, 2**30)
    agreement = [
        measure_exits(MODEL, routers, batches(16, seed=5), [0.6], 0)[0]["agreement"]
        for routers in (bare, dataclasses.replace(bare, translators=fitted))
    ]
    assert agreement[1] > agreement[0]


@pytest.mark.parametrize("ids", [[5], [5, 5], [5, -1], [5, 500000], [5, 2.5], None])
def test_candidates_that_are_no_tokens_are_refused(ids: list[float] | None, tmp_path: Path) -> None:
    path = tmp_path / "routers.safetensors"
    routers = random_routers(MODEL.config, interval=2, model=MODEL)
    dataclasses.replace(routers, metadata=RouterMetadata.from_dict(model_identity(MODEL))).save(path)
    tensors, metadata = router_file.read(path)
    del tensors["candidates"]
    extra = {} if ids is None else {"candidates": np.asarray(ids, np.float32)}
    path.write_bytes(router_file.encode(tensors | extra, metadata))
    with pytest.raises(TideError, match="candidates"):
        Routers.load(path, model=MODEL)


@pytest.mark.parametrize("affine", [True, False])
def test_a_file_gives_back_translators_and_the_second_look(affine: bool, tmp_path: Path) -> None:
    fitted = fit_translators(MODEL, batches(16, seed=1), EXIT_POINTS, 4, 2**30)
    routers = random_routers(MODEL.config, interval=2, affine=affine, model=MODEL)
    metadata = RouterMetadata.from_dict(model_identity(MODEL))
    routers = dataclasses.replace(routers, translators=fitted, metadata=metadata)
    routers.save(tmp_path / "routers.safetensors")
    loaded = Routers.load(tmp_path / "routers.safetensors", model=MODEL)
    assert (loaded.heads is None) is not affine
    jax.tree.map(np.testing.assert_array_equal, loaded.translators, routers.translators)
    jax.tree.map(np.testing.assert_array_equal, loaded.candidates, routers.candidates)
    jax.tree.map(np.testing.assert_array_equal, loaded.confidence, routers.confidence)

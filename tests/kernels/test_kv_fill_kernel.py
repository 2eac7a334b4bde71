"""The cache fill: its reference against the model's own layers, its Pallas kernel against the reference."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import gpu_lowering
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, tiny_model

from pallas_kernels import kv_fill as package
from pallas_kernels import selection
from pallas_kernels.common import NormSettings, NormWeights
from pallas_kernels.kv_fill import KVRows, KVWeights, Rotary, Settings, kv_fill, pallas_triton, reference
from tide_jax.exits import cache_fill
from tide_jax.exits.cache_fill import fill_rows, unsupported
from tide_jax.exits.depth import run_depth
from tide_jax.exits.exits import Exits
from tide_jax.exits.queue import init_cache
from tide_jax.model.architecture import AttentionType, QKNorm, RopeConfig
from tide_jax.testing import random_routers, tiny_config, tiny_decoder

EPS = 1e-5
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
PLAIN = Settings(NormSettings(EPS))


def arguments_of(
    tokens: tuple[int, int],
    heads: int,
    channels: int,
    dtype: Any,
    *,
    half: int = 0,
    bias: bool = False,
    key_norm: bool = False,
    size: int = 24,
    fill: float = 0.6,
) -> tuple[Any, ...]:
    """States, weights, rotary tables, tokens to fill and buffers."""
    rng = np.random.default_rng(channels)

    def normal(*shape: int, scale: float = 1.0, kind: Any = dtype) -> jax.Array:
        return jnp.asarray(scale * rng.normal(size=shape), kind)

    shape = tokens[0], heads, tokens[1], channels
    projection = (
        normal(heads, 2, channels, size, scale=size**-0.5),
        normal(heads, 2, channels) if bias else None,
        normal(channels) if key_norm else None,
    )
    angles = rng.uniform(0, 6, (*tokens, half))
    rotary = Rotary(*(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))) if half else None
    chosen = jnp.asarray(rng.random(tokens) < fill)
    out = KVRows(normal(*shape), normal(*shape))
    x = normal(*tokens, size, scale=3.0)
    return x, KVWeights(NormWeights(normal(size)), *projection), rotary, chosen, out


def assert_is_the_reference(arguments: tuple[Any, ...], found: KVRows, settings: Settings = PLAIN) -> None:
    """Within rounding where tokens are filled, untouched elsewhere."""
    expected = reference.kv_fill(*arguments, settings=settings)
    *_, fill, out = arguments
    fill = np.asarray(fill)
    for ours, theirs, before in zip(found, expected, out, strict=True):
        assert ours.dtype == theirs.dtype == before.dtype
        tolerance = {"float32": 1e-5, "bfloat16": 1.6e-2, "float16": 2e-3}[ours.dtype.name]
        ours, theirs, before = (np.asarray(a, np.float32).swapaxes(1, 2) for a in (ours, theirs, before))
        np.testing.assert_allclose(ours[fill], theirs[fill], atol=tolerance, rtol=tolerance)
        np.testing.assert_array_equal(ours[~fill], before[~fill])


# The reference is the model's own layer.

_EXTRA = {
    "key norm, partial rotation": tiny_config(
        num_layers=1,
        attention_types=(AttentionType(scale=0.3, rope=RopeConfig(theta=100.0, rotary_dim=4), qk_norm=QKNorm()),),
    ),
    "interleaved, unit offset": tiny_config(
        num_layers=1,
        norm_unit_offset=True,
        attention_types=(
            AttentionType(
                scale=0.3,
                rope=RopeConfig(theta=100.0, rotary_dim=6, interleaved=True),
                qk_norm=QKNorm(unit_offset=True),
            ),
        ),
    ),
}
MODELS = CONFIGS | _EXTRA
LEFT_OUT = {"alibi and sinks": "clipped", "gated output": "another kind", "latent attention": "LatentAttention"}


@pytest.mark.matrix(keep=2)
@pytest.mark.parametrize(
    "implementation, dtype", [(None, jnp.float32), (None, jnp.bfloat16), ("pallas_interpret", jnp.float32)]
)
@pytest.mark.parametrize("name", sorted(set(MODELS) - set(LEFT_OUT)))
def test_filled_rows_are_what_the_layer_stores(name: str, dtype: Any, implementation: str | None) -> None:
    model = tiny_model(MODELS[name], dtype=dtype)
    positions = jnp.asarray([[-1, 0, 1, 2, 3], [0, 1, 2, 5, 9]], jnp.int32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, model.config.hidden_size)), dtype)
    contexts, fill = model.contexts(positions, None), positions % 2 == 1
    for layer in (model.layers[0], model.layers[-1]):
        assert unsupported(layer) is None
        expected = layer.project_rows(x, contexts)
        found = fill_rows(layer, x, contexts, fill, implementation=implementation)
        for ours, theirs in zip(found, expected, strict=True):
            ours, theirs = (np.asarray(a, np.float32).swapaxes(1, 2)[np.asarray(fill)] for a in (ours, theirs))
            if implementation is None:
                np.testing.assert_array_equal(ours, theirs)
            else:
                np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_layers_of_other_kinds_say_why_and_project_in_plain_jax(caplog: pytest.LogCaptureFixture) -> None:
    cache_fill._warn_once.cache_clear()
    changes: dict[str, dict[str, Any]] = {
        "values have a bias": {"qkv_bias": True, "key_bias": False},
        "clipped": {"clip_qkv": 1.0},
        "scaled or rotated": {"value_scale": 0.5},
        "another kind": {"attention_types": (AttentionType(scale=0.3, qk_norm=QKNorm(per_head=True)),)},
        "beside keys": {"attention_types": (AttentionType(scale=0.3, keys_as_values=True),)},
        "ShapedAttention": {"attention_types": (AttentionType(scale=0.3, head_dim=4, num_kv_heads=1),)},
    }
    models = {reason: tiny_model(tiny_config(num_layers=1, **change)) for reason, change in changes.items()}
    models |= {reason: tiny_model(CONFIGS[name]) for name, reason in LEFT_OUT.items()}
    positions = jnp.asarray([[0, 1, 2]], jnp.int32)
    for reason, model in models.items():
        layer, contexts = model.layers[0], model.contexts(positions, None)
        assert reason in str(unsupported(layer))
        x = jnp.ones((1, 3, model.config.hidden_size))
        expected = layer.project_rows(x, contexts)
        with caplog.at_level(logging.WARNING, logger="tide_jax.exits.cache_fill"):
            found = fill_rows(layer, x, contexts, positions >= 0, implementation="pallas_interpret")
        assert reason in caplog.text
        caplog.clear()
        fill_rows(layer, x, contexts, positions >= 0)
        assert not caplog.text
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


# The kernel is the reference.


@pytest.mark.matrix(keep=2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "tokens, heads, channels, half, bias, key_norm, interleaved",
    [
        ((1, 1), 1, 8, 4, False, False, True),
        ((2, 5), 3, 64, 32, True, True, False),
        ((1, 7), 2, 20, 5, True, True, True),
        ((3, 2), 5, 10, 0, False, True, False),
        ((1, 3), 4, 128, 16, True, False, False),
    ],
)
def test_kernel_is_the_reference(
    tokens: tuple[int, int],
    heads: int,
    channels: int,
    half: int,
    bias: bool,
    key_norm: bool,
    interleaved: bool,
    dtype: Any,
) -> None:
    arguments = arguments_of(tokens, heads, channels, dtype, half=half, bias=bias, key_norm=key_norm)
    settings = Settings(NormSettings(EPS), key_eps=1e-3, key_unit_offset=interleaved, interleaved=interleaved)
    found = kv_fill(*arguments, settings=settings, implementation="pallas_interpret")
    assert_is_the_reference(arguments, found, settings)


@pytest.mark.parametrize("kind", ["rms", "layer", "none"])
def test_every_norm_in_front(kind: Any) -> None:
    x, weights, *others = arguments_of((2, 3), 2, 8, jnp.float32, half=4)
    scale, bias = jnp.full((24,), 0.5), jnp.ones((24,))
    settings = Settings(NormSettings(EPS, kind, unit_offset=kind == "rms"))
    for norm in (NormWeights(), NormWeights(scale), NormWeights(scale, bias)):
        arguments = x, weights._replace(norm=norm), *others
        found = kv_fill(*arguments, settings=settings, implementation="pallas_interpret")
        assert_is_the_reference(arguments, found, settings)


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_all_tokens_or_none(fill: float) -> None:
    arguments = arguments_of((2, 5), 3, 16, jnp.float32, half=4, fill=fill)
    found = kv_fill(*arguments, settings=PLAIN, implementation="pallas_interpret")
    assert_is_the_reference(arguments, found)
    assert np.array_equal(found.keys, arguments[4].keys) == (fill == 0.0)


def test_tokens_that_are_not_filled_may_hold_anything() -> None:
    x, weights, rotary, fill, out = arguments_of((2, 9), 3, 20, jnp.float32, half=5, bias=True)
    spoilt = jnp.where(fill[:, :, None], x, jnp.nan)
    marked = KVRows(*(jnp.where(fill[:, None, :, None], jnp.nan, a) for a in out))
    arguments = spoilt, weights, rotary, fill, marked
    found = kv_fill(*arguments, settings=PLAIN, implementation="pallas_interpret")
    assert all(np.isfinite(a).all() for a in found)
    assert_is_the_reference((x, weights, rotary, fill, marked), found)


def test_the_buffers_keep_their_own_dtype() -> None:
    *others, out = arguments_of((1, 4), 2, 16, jnp.bfloat16, half=8)
    arguments = *others, KVRows(*(a.astype(jnp.float32) for a in out))
    assert_is_the_reference(arguments, kv_fill(*arguments, settings=PLAIN, implementation="pallas_interpret"))


def test_none_is_the_kernel_on_a_gpu_once_proven_and_for_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernels(tokens: int) -> bool:
        arguments = arguments_of((1, tokens), 2, 16, jnp.float32)
        return bool(gpu_lowering.kernel_equations(functools.partial(kv_fill, settings=PLAIN), *arguments))

    monkeypatch.setattr(selection, "platform", lambda: "gpu")
    assert not kernels(64)
    monkeypatch.setattr(package, "IMPLEMENTATIONS", package.IMPLEMENTATIONS._replace(proven=True))
    assert kernels(64)
    assert not kernels(63)  # its buffers would cost more than it saves


def test_none_is_never_a_kernel_outside_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "platform", lambda: "gpu")
    monkeypatch.setattr(selection, "_import_error", lambda module: None)
    only = package.IMPLEMENTATIONS._replace(proven=True, on_gpu=("triton",))
    assert only.choose(None, lambda name: None, 64) == "reference"
    assert only.choose("triton", lambda name: None, 64) == "triton"


def test_what_the_kernel_cannot_do_is_refused_with_the_reason() -> None:
    x, weights, rotary, fill, out = arguments_of((1, 4), 2, 16, jnp.float32, half=8)
    with pytest.raises(ValueError, match="'pallas_triton' runs on a GPU, this process computes on a cpu"):
        kv_fill(x, weights, rotary, fill, out, settings=PLAIN, implementation="pallas_triton")

    def filled(*arguments: Any) -> KVRows:
        return kv_fill(*arguments, settings=PLAIN, implementation="pallas_interpret")

    wide = jnp.zeros((1, 2, 4, 8))
    with pytest.raises(ValueError, match="keys and values of one shape"):
        filled(x, weights, rotary, fill, KVRows(out.keys, wide))
    with pytest.raises(ValueError, match="float32, float16 and bfloat16, not int32"):
        filled(x, weights, rotary, fill, KVRows(out.keys, out.values.astype(jnp.int32)))
    with pytest.raises(ValueError, match="32 rotary channels do not fit keys of 16"):
        filled(x, weights, Rotary(*(jnp.zeros((1, 4, 16)),) * 2), fill, out)
    with pytest.raises(ValueError, match="at least one token"):
        filled(x[:, :0], weights, None, fill[:, :0], KVRows(*(a[:, :, :0] for a in out)))
    with pytest.raises(ValueError, match="up to 16384 numbers, not 130 heads of 128"):
        filled(*arguments_of((1, 1), 130, 128, jnp.float32))


# What a GPU's compiler would be given.


@pytest.mark.matrix(keep=4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, channels, half", [(3, 64, 32), (8, 128, 64), (32, 80, 16), (5, 20, 0)])
def test_kernel_lowers_for_cuda(heads: int, channels: int, half: int, dtype: Any) -> None:
    for tokens, extra in (((1, 1), False), ((4, 300), True)):
        arguments = arguments_of((1, 1), heads, channels, dtype, half=half, bias=extra, key_norm=extra)
        x, weights, rotary, fill, out = arguments

        def many(a: jax.Array, tokens: tuple[int, int] = tokens) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*tokens, *a.shape[2:]), a.dtype)

        def rows(a: jax.Array, tokens: tuple[int, int] = tokens) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((tokens[0], heads, tokens[1], channels), a.dtype)

        given = many(x), weights, jax.tree.map(many, rotary), many(fill), jax.tree.map(rows, out)
        kernel = functools.partial(pallas_triton.kv_fill, settings=PLAIN._replace(interleaved=extra))
        assert gpu_lowering.lower(kernel, *given).count(gpu_lowering.KERNEL_CALL) == 1
        assert not gpu_lowering.undefined_loads(gpu_lowering.kernel_equations(kernel, *given))


def test_lowering_refuses_a_block_that_is_no_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of((1, 3), 3, 12, jnp.float32)
    monkeypatch.setattr(pallas_triton, "power_of_two", lambda number: number)
    kernel = functools.partial(pallas_triton.kv_fill, settings=PLAIN)
    assert_is_the_reference(arguments, kernel(*arguments, interpret=True))
    with pytest.raises(ValueError, match="power of 2"):
        gpu_lowering.lower(kernel, *arguments)


def test_a_step_with_the_kernel_fills_every_tokens_rows() -> None:
    """From position 1 on, the first at which a token may exit, as the plain projection does."""
    model = tiny_decoder(tiny_config(num_layers=3))
    exits = Exits.uniform(random_routers(model.config, interval=1), 0.0)
    cache, one = init_cache(model.config, 2, 4, model.dtype), jnp.ones((2, 1), jnp.int32)
    cache = cache.append(model.run_layers(one, 0 * one, None)[1], 0 * one, model.layers)

    def rows(implementation: str) -> tuple[np.ndarray, ...]:
        given = dataclasses.replace(exits, implementation=implementation)
        out = jax.jit(run_depth)(model, 5 * one, one, cache, given)
        assert out.layers_executed == 1
        return tuple(np.stack(arrays) for arrays in zip(*out.new, strict=True))

    for found, expected in zip(rows("pallas_interpret"), rows("reference"), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert (np.abs(expected[1:]).max(axis=(1, 2, 3, 4)) > 0).all()


def test_keys_are_rounded_after_their_norm_as_the_model_rounds_them() -> None:
    """A wide buffer shows it: channels that are not rotated hold numbers of the model's dtype."""
    *others, fill, out = arguments_of((1, 4), 2, 16, jnp.bfloat16, half=4, key_norm=True, fill=1.0)
    wide = KVRows(*(a.astype(jnp.float32) for a in out))
    found = kv_fill(*others, fill, wide, settings=PLAIN, implementation="pallas_interpret")
    for keys in (found.keys, reference.kv_fill(*others, fill, wide, settings=PLAIN).keys):
        np.testing.assert_array_equal(keys, keys.astype(jnp.bfloat16).astype(jnp.float32))

"""Weights as 8-bit integers: the rounding is its formula, and the model is that of the floats they stand for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, random_prompts, tiny_model

from pallas_kernels.weight_product import kernel_off
from tide_jax import TIDE, ExitConfig, Routers
from tide_jax.config import RiskGuarantee
from tide_jax.exits.cache_fill import fill_rows, unsupported
from tide_jax.exits.router import RouterMetadata, model_identity
from tide_jax.functional import PassCosts
from tide_jax.model import ops
from tide_jax.model import rounding as rounding_module
from tide_jax.model.architecture import AttentionType, HeadTransform, MoEConfig
from tide_jax.model.decoder import Decoder, from_parameters, parameters, stored_parameters, summed_axes
from tide_jax.model.files.checkpoint import fingerprint
from tide_jax.model.moe import _by_row, _by_runs, _gather_experts, _integers_by_blocks, expert_matmul
from tide_jax.model.ops import integer_sums, times_rows
from tide_jax.model.rounding import floats_of, kept_as_floats, round_weights, scale_path
from tide_jax.risk.promise import exit_settings
from tide_jax.testing import random_routers, tiny_config

MORE = {
    "attention experts": tiny_config(num_layers=2, attention_experts=MoEConfig(4, 3, 8)),
    "a transformed head": tiny_config(
        num_layers=2, embedding_size=32, head_transform=HeadTransform(activation="gelu", bias=True), head_bias=True
    ),
    "many experts": tiny_config(
        num_layers=2,
        norm="layer",
        norm_bias=True,
        moe=MoEConfig(40, 1, 16, expert_bias=True, shared_size=16, shared_gate=True),
    ),
}
FEW = (
    *("pre norm", "post norm", "parallel", "norms after the residual add", "gated output", "latent attention"),
    *("alibi and sinks", "experts", "side by side"),
)
# One layer is enough: what takes time is to compile.
SWEEP = {
    name: dataclasses.replace(
        config,
        num_layers=1,
        layer_pattern=config.layer_pattern[:1],
        moe=None if config.moe is None else dataclasses.replace(config.moe, layers=(0,)),
    )
    for name, config in ({name: CONFIGS[name] for name in FEW} | MORE).items()
}
FREE = PassCosts(np.ones(3, np.float32), np.zeros(1, np.float32), np.float32(0))  # every draft is worth a try
FLOAT32 = jnp.dtype(jnp.float32)


def rounded(model: Decoder, dtype: Any = jnp.float32) -> Decoder:
    return from_parameters(model.config, parameters(model).items(), dtype=jnp.dtype(dtype), weights="int8")


def restored_model(model: Decoder) -> Decoder:
    """The floats that a model's integers stand for, as a model of floats."""
    return from_parameters(model.config, parameters(model).items(), dtype=FLOAT32)


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def logits_of(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def share_of_range(found: jax.Array, expected: jax.Array) -> float:
    found, expected = (np.asarray(a, np.float64) for a in (found, expected))
    return float(np.abs(found - expected).max() / np.ptp(expected))


# ---- the formula


def by_formula(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix by rows, a number at a time."""
    scale = [np.float32(max(map(abs, row)) / np.float32(127)) or np.float32(1) for row in weights]
    numbers = [[min(127, max(-127, round(float(w / s)))) for w in row] for row, s in zip(weights, scale, strict=True)]
    return np.asarray(numbers), np.asarray(scale)


def test_rounding_is_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.random.default_rng(0).normal(size=(7, 33)).astype(np.float32)
    weights[2] = 0
    weights[3] = np.arange(-16, 17) * 0.5 * 127 / 8  # halves, which go to even
    weights[3, 0] = -127
    weights[4] *= np.float32(1e-30)
    weights[5] = np.float32(1e-45)  # no float32 scale is so small
    integers, scale = round_weights(weights, (1,))
    wanted, wanted_scale = by_formula(weights)
    np.testing.assert_array_equal(integers, wanted)
    np.testing.assert_array_equal(scale, wanted_scale)
    assert (integers.dtype, scale.dtype, scale[2], scale[5]) == (np.int8, np.float32, 1, 1)
    assert set(np.abs(integers).max(axis=1)) == {0, 127}
    monkeypatch.setattr(rounding_module, "_BLOCK", 40)  # a row or two at once
    for found, whole in zip(round_weights(weights, (1,)), (integers, scale), strict=True):
        np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("shape, axes", [((3, 2, 5), (2,)), ((2, 5, 2, 3), (1,)), ((2, 3, 4, 5), (1, 2)), ((6,), (0,))])
def test_other_axes_are_rows_too(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    weights = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    integers, scale = round_weights(weights, axes)
    outputs = [axis for axis in range(len(shape)) if axis not in axes]
    flat = weights.transpose(*outputs, *axes).reshape(scale.size, -1)
    wanted, wanted_scale = by_formula(flat)
    np.testing.assert_array_equal(integers.transpose(*outputs, *axes).reshape(flat.shape), wanted)
    np.testing.assert_array_equal(scale, wanted_scale.reshape([shape[axis] for axis in outputs]))
    assert np.abs(floats_of(integers, scale, axes) - weights).max() <= scale.max() * 0.501


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_do_not_overflow_before_they_are_scaled(dtype: str) -> None:
    rows, x = jnp.full((2, 4096), 127, jnp.int8), jnp.ones((20, 4096), dtype)
    out = times_rows(x, rows, jnp.asarray([1e-3, 1e-2], jnp.float32))
    np.testing.assert_allclose(np.asarray(out, np.float32), [[520.2, 5202]] * 20, rtol=1e-2)


@pytest.mark.parametrize("tokens, limit", [(9, "_INTEGERS_AT_ONCE"), (17, "_INTEGERS_OF_PROMPTS")])
def test_many_tokens_make_floats_of_some_rows_at_a_time(
    tokens: int, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(2)
    x, rows = rng.normal(size=(2, tokens, 24)).astype(np.float32), rng.integers(-127, 128, (37, 24))
    scale = rng.uniform(0.1, 1, 37).astype(np.float32)
    wanted = np.einsum("btd,fd->btf", x.astype(np.float64), rows * scale[:, None])
    arrays = jnp.asarray(rows, jnp.int8), jnp.asarray(scale)
    monkeypatch.setattr(ops, limit, 24 * 5)  # eight blocks, the last of two new rows
    with kernel_off():
        np.testing.assert_allclose(times_rows(jnp.asarray(x), *arrays), wanted, rtol=1e-4, atol=1e-3)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(times_rows(x, *arrays) ** 2)))(jnp.asarray(x))
    slope = np.einsum("btf,fd->btd", 2 * wanted, rows * scale[:, None])
    np.testing.assert_allclose(gradient, slope, rtol=1e-3, atol=1e-3 * np.abs(slope).max())
    with kernel_off():
        text = jax.jit(lambda x: times_rows(x, *arrays)).lower(jnp.asarray(x)).compile().as_text()
    assert "f32[5,24]" in text
    assert "f32[37,24]" not in text


@pytest.mark.parametrize("count", [2, 24])
@pytest.mark.parametrize("way", [None, _gather_experts, _by_row, _integers_by_blocks, _by_runs])
def test_products_of_experts(count: int, way: Callable[..., jax.Array] | None) -> None:
    """A few rows by the experts that they chose, many by all of them; and as other platforms do either."""
    rng = np.random.default_rng(count)
    rows, kernels = rng.normal(size=(count, 6)), rng.integers(-127, 128, (5, 6, 2, 3))
    expert, scale = np.sort(rng.integers(0, 5, count)), rng.uniform(0.1, 1, (5, 2, 3))
    arrays = (jnp.asarray(rows, jnp.float32), jnp.asarray(kernels, jnp.int8), jnp.asarray(expert, jnp.int32))
    factors = jnp.asarray(scale, jnp.float32)
    found = expert_matmul(*arrays, factors) if way is None else way(*arrays) * factors[expert]
    wanted = np.einsum("md,mdpf->mpf", rows, kernels[expert] * scale[expert][:, None])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def test_accelerators_convert_within_the_product() -> None:
    """There a barrier between integers and product would be a copy: of a kernel that is reshaped, on a TPU."""
    x, kernel = jax.ShapeDtypeStruct((1, 24), jnp.bfloat16), jax.ShapeDtypeStruct((8, 4, 6), jnp.int8)
    traced = jax.jit(lambda x, kernel: integer_sums("td,fd->tf", x, kernel.reshape(8, 24))).trace(x, kernel)
    for platform, kept in (("cpu", True), ("cuda", False), ("tpu", False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("optimization_barrier" in text) == kept, platform


# ---- the model


@pytest.mark.parametrize("name", SWEEP)
def test_logits_are_those_of_the_floats_they_stand_for(name: str) -> None:
    model = tiny_model(SWEEP[name])
    small = rounded(model)
    assert (model.precision, small.precision) == ("float32", "float32 with int8 weights")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 259, (2, 9)), jnp.int32)
    found, wanted = logits_of(small, tokens), logits_of(restored_model(small), tokens)
    assert share_of_range(found, wanted) < 5e-6
    # Where states choose experts, some choose others.
    assert 1e-4 < share_of_range(found, logits_of(model, tokens)) < 0.1
    assert fingerprint(small) == fingerprint(model)


@pytest.mark.parametrize("name", SWEEP)
def test_what_is_rounded_and_what_is_not(name: str) -> None:
    config = SWEEP[name]
    small = {p.path: p.value for p in stored_parameters(rounded(tiny_model(config)))}
    axes = summed_axes(config)
    integers = {path for path, value in small.items() if value.dtype == jnp.int8}
    assert integers == set(axes)
    for path in integers:
        kept = [size for axis, size in enumerate(small[path].shape) if axis not in axes[path]]
        assert (small[scale_path(path)].dtype, list(small[scale_path(path)].shape)) == (FLOAT32, kept)
    assert {value.dtype for path, value in small.items() if path not in integers} == {FLOAT32}
    assert ("embed.kernel" in integers) == config.tie_embeddings
    left = kept_as_floats({path: value.shape for path, value in small.items() if path[-5:] != "scale"}, axes)
    words = ("embed", "router", "shared_gate", "positions", "added", "bias", "sinks", "weights", "norm")
    words += ("filters", "fade", "passed")  # of recurrent layers
    assert all(any(word in path for word in words) for path in left), left


@pytest.mark.parametrize("dtype", ["float16"])
def test_the_dtype_of_activations_is_the_callers(dtype: str) -> None:
    small = rounded(tiny_model(SWEEP["latent attention"]), dtype)
    assert (small.dtype, small.precision) == (jnp.dtype(dtype), f"{dtype} with int8 weights")
    assert small.embed_tokens(jnp.ones((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32)).dtype == jnp.dtype(dtype)
    tokens = jnp.asarray([[5, 6, 7, 8]], jnp.int32)
    assert share_of_range(logits_of(small, tokens), logits_of(restored_model(small), tokens)) < 0.05


def test_a_tied_table_reads_a_row_times_its_scale() -> None:
    model = tiny_model(SWEEP["pre norm"])
    small = rounded(model)
    scale = np.abs(parameters(model)["embed.kernel"]).max(axis=1) / np.float32(127)
    row = np.rint(np.asarray(parameters(model)["embed.kernel"])[7] / scale[7]) * scale[7]
    for index in ([[7]], [[7, 3]], [[7], [3]]):  # one row has a way of its own
        np.testing.assert_array_equal(small.embed(jnp.asarray(index, jnp.int32))[0, 0], row)
    assert small.embed(jnp.zeros((1, 0), jnp.int32)).shape == (1, 0, 48)
    untied = rounded(tiny_model(SWEEP["post norm"]))
    assert (untied.embed.scale, untied.embed.kernel[...].dtype, untied.weights) == (None, FLOAT32, "int8")


def test_the_rows_of_a_head_bring_their_scales() -> None:
    small, ids = rounded(tiny_model(SWEEP["post norm"])), jnp.asarray([3, 200, 7], jnp.int32)
    x = jax.random.normal(jax.random.key(0), (1, 4, 48))
    np.testing.assert_allclose(small.logits(x, small.head_rows(ids)), small.logits(x)[..., ids], rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(small.logits(x, small.head_rows(ids))))(x)
    wanted = jax.grad(lambda x: jnp.sum(restored_model(small).logits(x)[..., ids]))(x)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_kernels_for_gpus_are_not_given_floats() -> None:
    """The fill of a cache would take a layer's key and value weights as floats: its rows are projected without it."""
    small = rounded(tiny_model(SWEEP["pre norm"]))
    layer, positions = small.layers[0], jnp.asarray([[0, 1]], jnp.int32)
    x = jax.random.normal(jax.random.key(1), (1, 2, 48))
    options = small.contexts(positions, None), jnp.ones((1, 2), jnp.bool_)
    assert "8-bit integers" in str(unsupported(layer))
    assert unsupported(restored_model(small).layers[0]) is None
    filled = fill_rows(layer, x, *options, implementation="pallas_interpret")
    for found, wanted in zip(filled, layer.project_rows(x, options[0]), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


# ---- what runs on it


@pytest.fixture(scope="module")
def engines() -> tuple[TIDE, TIDE]:
    """An engine on 8-bit weights, and one on the floats that these stand for."""
    model = rounded(tiny_model(tiny_config(num_layers=2)))

    def engine(model: Decoder) -> TIDE:
        routers = random_routers(model.config, interval=1, model=model)
        return TIDE(model, routers, ExitConfig(exit_threshold=0.5, min_layers=0))

    return engine(model), engine(restored_model(model))


@pytest.mark.parametrize("kv_strategy", ["propagate", "recompute"])
def test_exits_are_those_of_the_floats(engines: tuple[TIDE, TIDE], kv_strategy: Any) -> None:
    prompts = random_prompts((7, 3))
    found, wanted = (e.with_config(kv_strategy=kv_strategy).generate(prompts, max_new_tokens=9) for e in engines)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.exit_layers, wanted.exit_layers)
    assert len(np.unique(found.exit_layers)) > 1


def test_lossless_tokens_are_those_of_full_depth(engines: tuple[TIDE, TIDE]) -> None:
    prompts = random_prompts((7,))
    engines[0]._learned._costs[1, "text"] = FREE  # measured ones would draft now this, now that
    full, lossless = (engines[0].generate(prompts, mode=mode, max_new_tokens=9) for mode in ("full", "lossless"))
    np.testing.assert_array_equal(lossless.tokens, full.tokens)


def test_routers_fit_both_and_a_promise_does_not(tmp_path: Path) -> None:
    model = tiny_model(tiny_config(num_layers=4))
    small, path = rounded(model), tmp_path / "routers.safetensors"
    made = random_routers(model.config, interval=1)
    numbers = {"sequences": 300, "tokens": 9000, "p_value": 0.03, "observed": 0.011, "depth": 0.9, "max_length": 256}
    dials = {"exit_threshold": 0.9, "min_layers": 2}
    promise = RiskGuarantee(risk=0.02, delta=0.05, loss="disagreement", **numbers, **dials)
    facts = model_identity(model) | {"config": {"router_bottleneck_dim": 16}, "guarantee_dtype": "float32"}
    facts["exit_config"] = ExitConfig(**dials, guarantee=promise).to_dict()
    dataclasses.replace(made, metadata=RouterMetadata.from_dict(facts)).save(path)
    routers = Routers.load(path, model=small)
    assert routers.exit_points == made.exit_points
    other = dataclasses.replace(model.config, attention_types=(AttentionType(scale=0.9),))
    assert fingerprint(rounded(tiny_model(other))) != fingerprint(small)
    assert exit_settings(model, routers)[0].guarantee == promise
    config, told = exit_settings(small, routers)
    assert config.guarantee is None
    assert told == "nothing promised: the promise holds for float32, this model runs in float32 with int8 weights"


def test_a_model_of_unknown_floats_has_a_fingerprint_of_its_own() -> None:
    small = rounded(tiny_model(SWEEP["pre norm"]))
    tensors = [(p.path, p.value) for p in stored_parameters(small)]
    again = from_parameters(small.config, tensors, dtype=FLOAT32, stored=True, weights="int8")
    assert again.float_fingerprint is None
    assert fingerprint(again) not in (fingerprint(small), fingerprint(restored_model(small)))
    for found, wanted in zip(stored_parameters(again), stored_parameters(small), strict=True):
        assert found.path == wanted.path
        np.testing.assert_array_equal(found.value, wanted.value)


def test_experts_are_read_as_they_are_chosen() -> None:
    """A step of decoding makes floats of the chosen experts alone."""
    small = rounded(tiny_model(SWEEP["many experts"]))
    layer = small.layers[0].mlp
    text = jax.jit(lambda x: layer(x)).lower(jnp.ones((1, 1, 48))).as_text()
    assert "tensor<1x48x2x16xf32>" in text
    assert "tensor<40x48x2x16xf32>" not in text

"""The exit projection: its reference against the model's own modules, its Pallas kernel against the reference."""

from __future__ import annotations

import functools
from typing import Any

import gpu_lowering
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, tiny_model

from pallas_kernels import exit_project as package
from pallas_kernels import selection
from pallas_kernels.common import NormSettings, NormWeights
from pallas_kernels.exit_project import AffineHead, exit_project, pallas_triton, reference
from tide_jax import TIDE, ExitConfig
from tide_jax.exits import confidence
from tide_jax.exits.router import ExitHead
from tide_jax.model.norms import Norm
from tide_jax.testing import random_routers

EPS = 1e-5
RMS = NormSettings(EPS)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def arguments_of(rows: int, size: int, dtype: Any, rank: int | None = None) -> tuple[Any, ...]:
    """Rows, a head (identity without a rank, full rank with 0), a final norm, exits and a buffer."""
    rng = np.random.default_rng(rows)

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * rng.normal(size=shape), dtype)

    shapes = [(size, size)] if rank == 0 else [(size, rank or 1), (rank or 1, size)]
    factors = tuple(normal(*shape, scale=shape[0] ** -0.5) for shape in shapes)
    head = None if rank is None else AffineHead(factors, normal(size))
    final_norm = NormWeights(normal(size), normal(size))
    return normal(rows, size, scale=3.0), head, final_norm, jnp.asarray(rng.random(rows) < 0.6), normal(rows, size)


def assert_is_the_reference(arguments: tuple[Any, ...], found: jax.Array, settings: NormSettings = RMS) -> None:
    expected = reference.exit_project(*arguments, settings=settings)
    assert found.dtype == expected.dtype
    tolerance = {"float32": 1e-5, "bfloat16": 1.6e-2, "float16": 2e-3}[arguments[-1].dtype.name]
    found, expected, before = (np.asarray(a, np.float32) for a in (found, expected, arguments[-1]))
    exits = np.asarray(arguments[3])
    np.testing.assert_allclose(found[exits], expected[exits], atol=tolerance, rtol=tolerance)
    np.testing.assert_array_equal(found[~exits], before[~exits])


@pytest.mark.parametrize("rank", [None, 0, 5])
@pytest.mark.parametrize("kind, unit_offset", [("rms", False), ("rms", True), ("layer", False)])
def test_reference_is_what_the_model_does(rank: int | None, kind: Any, unit_offset: bool) -> None:
    x, head, final_norm, exits, out = arguments_of(7, 24, jnp.float32, rank)
    norm = Norm((24,), kind=kind, eps=EPS, bias=True, unit_offset=unit_offset, dtype=jnp.float32)
    norm.scale[...], norm.bias[...] = final_norm
    states = x if head is None else ExitHead(*head)(x, eps=EPS)
    found = exit_project(x, head, final_norm, exits, out, settings=NormSettings(EPS, kind, unit_offset))
    np.testing.assert_array_equal(found, jnp.where(exits[:, None], norm(states), out))


@pytest.mark.matrix(keep=5)
@pytest.mark.parametrize("rank", [None, 0, 5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, size", [(1, 8), (3, 63), (17, 576), (5, 130)])
def test_kernel_is_the_reference(rank: int | None, dtype: Any, rows: int, size: int) -> None:
    arguments = arguments_of(rows, size, dtype, rank)
    found = exit_project(*arguments, settings=RMS, implementation="pallas_interpret")
    assert_is_the_reference(arguments, found)


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize(
    "settings",
    [NormSettings(EPS, "layer"), NormSettings(EPS, "rms", unit_offset=True), NormSettings(EPS, "none")],
    ids=["layer", "unit offset", "none"],
)
def test_kernel_has_every_final_norm(settings: NormSettings, rank: int | None) -> None:
    x, head, final_norm, exits, out = arguments_of(6, 70, jnp.float32, rank)
    for given in (final_norm, final_norm._replace(bias=None), NormWeights()):
        arguments = x + 20, head, given, exits, out
        found = exit_project(*arguments, settings=settings, implementation="pallas_interpret")
        assert_is_the_reference(arguments, found, settings)


def test_rows_that_stay_may_hold_anything() -> None:
    x, head, final_norm, exits, out = arguments_of(9, 70, jnp.float32, 0)
    spoilt = jnp.where(exits[:, None], x, jnp.nan)
    marked = jnp.where(exits[:, None], jnp.nan, out)
    found = exit_project(spoilt, head, final_norm, exits, marked, settings=RMS, implementation="pallas_interpret")
    assert_is_the_reference((x, head, final_norm, exits, marked), found)


def test_the_buffer_keeps_its_own_dtype() -> None:
    x, head, final_norm, exits, out = arguments_of(4, 40, jnp.bfloat16)
    arguments = x, head, final_norm, exits, out.astype(jnp.float32)
    assert_is_the_reference(arguments, exit_project(*arguments, settings=RMS, implementation="pallas_interpret"))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_states_are_rounded_before_the_final_norm(dtype: Any) -> None:
    """As the model's modules round them; it shows where no norm comes after and the buffer could hold more."""
    x, head, final_norm, exits, out = arguments_of(9, 70, dtype, 5)
    arguments = x, head, final_norm, exits, out.astype(jnp.float32)
    found = exit_project(*arguments, settings=NormSettings(EPS, "none"), implementation="pallas_interpret")
    np.testing.assert_array_equal(found[exits], found[exits].astype(dtype).astype(jnp.float32))


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_states_near_zero(rank: int | None, norm: Any) -> None:
    x, *others = arguments_of(6, 70, jnp.float32, rank)
    arguments, settings = (x * 1e-3, *others), NormSettings(EPS, norm)
    found = exit_project(*arguments, settings=settings, implementation="pallas_interpret")
    assert_is_the_reference(arguments, found, settings)


def test_none_is_the_reference_and_once_proven_the_kernel_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernels() -> bool:
        return bool(gpu_lowering.kernel_equations(functools.partial(exit_project, settings=RMS), *arguments))

    arguments = arguments_of(4, 40, jnp.float32)
    monkeypatch.setattr(package, "IMPLEMENTATIONS", package.IMPLEMENTATIONS._replace(proven=True))
    assert not kernels()
    monkeypatch.setattr(selection, "platform", lambda: "gpu")
    assert kernels()
    monkeypatch.setattr(package, "IMPLEMENTATIONS", package.IMPLEMENTATIONS._replace(proven=False))
    assert not kernels()


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["sandwich norms", "parallel", "norms after the residual add"])
def test_an_engine_takes_its_exit_states_from_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """RMSNorm with a unit offset, LayerNorm and no norm at all; affine heads, and a second look at what they give."""
    asked: list[str | None] = []

    def recorded(*arguments: Any, implementation: str | None, **settings: Any) -> jax.Array:
        asked.append(implementation)
        return exit_project(*arguments, implementation=implementation, **settings)

    monkeypatch.setattr(confidence, "exit_project", recorded)
    model, dials = tiny_model(CONFIGS[name]), ExitConfig(exit_threshold=0.4, min_layers=0)
    routers = random_routers(model.config, affine=True, interval=1, model=model)
    expected = TIDE(model, routers, dials)([[5, 3, 7, 11], [2, 9]])
    assert set(asked) == {None}
    asked.clear()
    found = TIDE(model, routers, dials, implementation="pallas_interpret")([[5, 3, 7, 11], [2, 9]])
    assert set(asked) == {"pallas_interpret"}
    assert (expected.exit_layers < model.config.num_layers - 1).any()
    np.testing.assert_array_equal(found.exit_layers, expected.exit_layers)
    np.testing.assert_allclose(found.logits, expected.logits, atol=2e-5)


def test_what_the_kernel_cannot_do_is_refused_with_the_reason() -> None:
    arguments = arguments_of(4, 40, jnp.float32)
    for name in ("pallas_triton", "triton"):
        with pytest.raises(ValueError, match=f"'{name}' runs on a GPU, this process computes on a cpu"):
            exit_project(*arguments, settings=RMS, implementation=name)
    with pytest.raises(ValueError, match="'magic' is not known; choose None or one of reference"):
        exit_project(*arguments, settings=RMS, implementation="magic")
    wide = jnp.zeros((1, 20000))
    with pytest.raises(ValueError, match="rows up to 16384 wide, not 20000"):
        exit_project(
            wide, None, NormWeights(), jnp.ones((1,), bool), wide, settings=RMS, implementation="pallas_interpret"
        )


def test_more_numbers_than_32_bit_offsets_reach_are_refused() -> None:
    """Beyond them the kernel would write elsewhere."""

    def run(x: jax.Array, exits: jax.Array) -> jax.Array:
        return exit_project(x, None, NormWeights(), exits, x, settings=RMS, implementation="pallas_interpret")

    def of(rows: int) -> tuple[Any, ...]:
        return jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((rows,), jnp.bool_)

    with pytest.raises(ValueError, match=r"up to 2\^31 numbers, not 524288 rows of 4096"):
        jax.eval_shape(run, *of(2**19))
    assert jax.eval_shape(run, *of(2**19 - 1)).shape == (2**19 - 1, 4096)


@pytest.mark.matrix(keep=2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [63, 576, 3584, 5120, 8192])
def test_kernel_lowers_for_cuda(size: int, dtype: Any) -> None:
    def of(shape: tuple[int, ...], dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    head = AffineHead((of((size, 16)), of((16, size))), of((size,)))
    for rows, given, norm in ((1, None, "rms"), (37, head, "layer"), (65536, head, "rms")):
        kernel = functools.partial(pallas_triton.exit_project, settings=NormSettings(EPS, norm))
        states = of((rows, size))
        arguments = states, given, NormWeights(of((size,)), of((size,))), of((rows,), jnp.bool_), states
        assert gpu_lowering.lower(kernel, *arguments).count(gpu_lowering.KERNEL_CALL) == 1
        assert not gpu_lowering.undefined_loads(gpu_lowering.kernel_equations(kernel, *arguments))

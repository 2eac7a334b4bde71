"""The exit step's Pallas kernel without a GPU: numerics interpreted by XLA, and lowering for CUDA."""

from __future__ import annotations

import functools
import logging
from typing import Any

import gpu_lowering
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from tiny_models import CONFIGS, tiny_model

from pallas_kernels import exit_step as package
from pallas_kernels import gpu, selection
from pallas_kernels.exit_step import ExitRows, ExitStep, Gate, Router, exit_step, pallas_triton, plan, reference
from pallas_kernels.exit_step.plan import Blocks, Problem, choose_blocks
from tide_jax import TIDE, ExitConfig
from tide_jax.errors import TideError
from tide_jax.testing import random_routers

EPS, LAYER = 1e-5, 5
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
WHOLE, SPLIT = Blocks(16, 32, 1), Blocks(16, 32, 3)


def arguments_of(rows: int, size: int, hidden: int, dtype: Any, seed: int = 0) -> tuple[Any, ...]:
    """States, router, gate and rows; the threshold lies amid the scores."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(rows, size)) * np.exp(rng.normal(size=(rows, 1))) + 0.3, dtype)
    shapes = ((size, hidden), (hidden,), (hidden,), ())
    router = Router(*(jnp.asarray(2 * rng.normal(size=s) / np.sqrt(max(1, *s, 1)), jnp.float32) for s in shapes))
    threshold = jnp.median(reference.router_scores(x, router, eps=EPS))
    masks = (jnp.asarray(rng.random(rows) < 0.8) for _ in range(2))
    state = ExitRows(*masks, jnp.asarray(rng.integers(0, 4, rows), jnp.int32))
    return x, router, gate_of(threshold), state


def gate_of(threshold: Any, min_layers: int = LAYER + 1) -> Gate:
    return Gate(threshold, LAYER, jnp.int32(min_layers))


@functools.partial(jax.jit, static_argnames=("blocks", "norm"))
def interpreted(arguments: tuple[Any, ...], blocks: Blocks, norm: Any = "rms") -> ExitStep:
    return pallas_triton.exit_step(*arguments, eps=EPS, norm=norm, interpret=True, blocks=blocks)


def assert_is_the_reference(arguments: tuple[Any, ...], found: ExitStep, norm: Any = "rms") -> None:
    """Scores within rounding; everything else follows exactly from them."""
    _, _, gate, rows = arguments
    expected = reference.exit_step(*arguments, eps=EPS, norm=norm)
    np.testing.assert_allclose(found.scores, expected.scores, atol=3e-6, rtol=0)
    clear = np.abs(np.asarray(expected.scores) - float(gate.threshold)) > 1e-5
    for name in ("exits", "active", "exit_layers"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours)[clear], np.asarray(theirs)[clear], err_msg=name)
    np.testing.assert_array_equal(found.active, rows.active & ~found.exits)
    assert found.any_exits == found.exits.any()
    assert found.any_active == found.active.any()


@pytest.mark.matrix(keep=2)
@pytest.mark.parametrize("blocks", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, size, hidden", [(1, 8, 1), (3, 63, 16), (16, 576, 128), (17, 129, 33), (40, 257, 100)])
def test_kernel_is_the_reference(blocks: Blocks, dtype: Any, rows: int, size: int, hidden: int) -> None:
    arguments = arguments_of(rows, size, hidden, dtype)
    assert_is_the_reference(arguments, interpreted(arguments, blocks))


@pytest.mark.matrix
@pytest.mark.parametrize("blocks", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_of_states_far_from_zero(blocks: Blocks, dtype: Any) -> None:
    x, *others = arguments_of(19, 129, 16, dtype)
    arguments = ((x + jnp.asarray(20, dtype)), *others)
    assert_is_the_reference(arguments, interpreted(arguments, blocks, norm="layer"), norm="layer")


@pytest.mark.parametrize("blocks", [WHOLE, SPLIT], ids=["whole", "split"])
def test_a_score_must_exceed_the_threshold(blocks: Blocks) -> None:
    x, router, _, rows = arguments_of(20, 70, 16, jnp.float32)
    half = gate_of(jnp.float32(0.5))
    scores = interpreted((x, router, half, rows), blocks).scores
    found = interpreted((x, router, gate_of(scores[7]), rows), blocks)
    np.testing.assert_array_equal(found.exits, rows.active & rows.may_exit & (scores > scores[7]))
    still = jax.tree.map(jnp.zeros_like, router)
    assert not interpreted((x, still, half, rows), blocks).any_exits
    below = gate_of(jnp.float32(np.nextafter(np.float32(0.5), np.float32(0))))
    np.testing.assert_array_equal(interpreted((x, still, below, rows), blocks).exits, rows.active & rows.may_exit)


@pytest.mark.matrix
@pytest.mark.parametrize("blocks", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_numbers_stay_and_leave_others_alone(blocks: Blocks, dtype: Any) -> None:
    x, *others = arguments_of(18, 70, 16, dtype)
    spoilt = x.at[2].set(jnp.nan).at[5, 69].set(jnp.inf).at[17, 0].set(jnp.nan)
    clean, found = interpreted((x, *others), blocks), interpreted((spoilt, *others), blocks)
    bad = np.isin(np.arange(18), [2, 5, 17])
    assert np.isnan(found.scores[bad]).all()
    assert not found.exits[bad].any()
    np.testing.assert_array_equal(found.scores[~bad], clean.scores[~bad])
    np.testing.assert_array_equal(found.exits[~bad], clean.exits[~bad])


def test_no_row_leaves_before_min_layers() -> None:
    x, router, gate, rows = arguments_of(9, 40, 16, jnp.float32)
    assert interpreted((x, router, gate, rows), SPLIT).any_exits
    later = x, router, gate_of(gate.threshold, min_layers=LAYER + 2), rows
    found = interpreted(later, SPLIT)
    assert not found.any_exits
    assert_is_the_reference(later, found)


def test_the_largest_states_and_zeros_are_scored() -> None:
    states = jnp.asarray([[0.0] * 40, [60000.0] * 40], jnp.float16)
    arguments = states, *arguments_of(2, 40, 16, jnp.float16)[1:]
    assert_is_the_reference(arguments, interpreted(arguments, SPLIT))


def test_sixteen_bit_states_lose_nothing_of_the_router() -> None:
    """One bfloat16 product with the weights rounded would be off by a thousand times as much."""
    x, router, *others = arguments_of(16, 512, 64, jnp.bfloat16)
    found = interpreted((x, router, *others), SPLIT).scores
    rounded = reference.router_scores(x, router._replace(down=router.down.astype(jnp.bfloat16)), eps=EPS)
    exact = reference.router_scores(x, router, eps=EPS)
    assert np.abs(rounded - exact).max() > 100 * np.abs(found - exact).max()


# What the engine calls.


def test_none_is_the_reference_on_a_cpu() -> None:
    arguments = arguments_of(4, 40, 16, jnp.float32)
    assert not gpu_lowering.kernel_equations(functools.partial(exit_step, eps=EPS), *arguments)
    for ours, theirs in zip(exit_step(*arguments, eps=EPS), reference.exit_step(*arguments, eps=EPS), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_interpreted_kernel_is_an_implementation() -> None:
    arguments = arguments_of(4, 40, 16, jnp.float32)
    assert_is_the_reference(arguments, exit_step(*arguments, eps=EPS, implementation="pallas_interpret"))


def test_an_engine_with_the_kernel_writes_the_same() -> None:
    settings = ExitConfig(exit_threshold=0.5, min_layers=0)
    model = tiny_model(CONFIGS["pre norm"])
    routers = random_routers(model.config, interval=2)
    outs = [
        TIDE(model, routers, settings, implementation=name).generate([[5, 3, 7], [2]], max_new_tokens=5)
        for name in (None, "pallas_interpret")
    ]
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)
    np.testing.assert_array_equal(outs[0].exit_layers, outs[1].exit_layers)
    assert (np.asarray(outs[1].exit_layers) < model.config.num_layers - 1).any()


def test_an_engine_says_why_a_kernel_cannot_run_here() -> None:
    with pytest.raises(TideError, match="'pallas_triton' runs on a GPU, this process computes on a cpu"):
        TIDE(tiny_model(CONFIGS["pre norm"]), implementation="pallas_triton")


@pytest.mark.parametrize("name", ["pallas_triton", "triton", "mosaic_gpu"])
def test_a_kernel_that_cannot_run_here_says_why(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' runs on a GPU, this process computes on a cpu"):
        exit_step(*arguments_of(4, 40, 16, jnp.float32), eps=EPS, implementation=name)


@pytest.mark.parametrize(
    "rows, hidden, reason", [(0, 16, "no rows"), (4, 300, "routers up to 256 wide, not 300")], ids=["rows", "hidden"]
)
def test_shapes_that_no_kernel_takes_are_named(rows: int, hidden: int, reason: str) -> None:
    x, router, gate, state = arguments_of(max(rows, 1), 40, hidden, jnp.float32)
    arguments = x[:rows], router, gate, ExitRows(*(a[:rows] for a in state))
    with pytest.raises(ValueError, match=reason):
        exit_step(*arguments, eps=EPS, implementation="pallas_interpret")
    assert exit_step(*arguments, eps=EPS).scores.shape == (rows,)


def test_kernels_leave_float64_to_the_reference() -> None:
    assert "not float64" in str(Problem(1, 8, 1, np.dtype(np.float64)).refusal())


def test_on_a_gpu_none_is_a_kernel_and_falls_back_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def kernels() -> bool:
        call = functools.partial(exit_step, eps=EPS)
        return bool(gpu_lowering.kernel_equations(call, *arguments_of(4, 40, 16, jnp.float32)))

    monkeypatch.setattr(selection, "platform", lambda: "gpu")
    monkeypatch.setattr(package, "IMPLEMENTATIONS", package.IMPLEMENTATIONS._replace(proven=False))
    assert not kernels(), "no GPU has run them yet"
    monkeypatch.setattr(package, "IMPLEMENTATIONS", package.IMPLEMENTATIONS._replace(proven=True))
    assert kernels()
    monkeypatch.setattr(selection, "_import_error", lambda module: f"ModuleNotFoundError: {module}")
    selection._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="pallas_kernels.selection"):
        assert not kernels()
    assert "'pallas_triton' can't be imported: ModuleNotFoundError" in caplog.text
    assert "'mosaic_gpu' can't be imported: ModuleNotFoundError: jax.experimental.pallas.mosaic_gpu" in caplog.text
    assert "'triton'" not in caplog.text, "CUDA graphs leave it out"


# Sizes of programs.


@pytest.mark.parametrize("rows", [1, 16, 64, 1000, 65536])
@pytest.mark.parametrize("size", [63, 576, 4096, 8192])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_cover_the_channels_and_keep_the_gpu_busy(rows: int, size: int, dtype: Any) -> None:
    problem = Problem(rows, size, 128, jnp.dtype(dtype))
    blocks = choose_blocks(problem, gpu.DEFAULT)
    tiles = -(-size // blocks.columns)
    assert blocks.splits * -(-tiles // blocks.splits) >= tiles
    programs = blocks.splits * -(-rows // blocks.rows)
    assert programs > gpu.DEFAULT.multiprocessors // 3 or blocks.splits == tiles


def test_measured_blocks_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    best = Blocks(32, 128, 7, 8)
    monkeypatch.setattr(plan, "MEASURED", {("9.0", "bfloat16", "rms", 4096, 2): best})
    assert choose_blocks(Problem(20, 4096, 128, jnp.dtype(jnp.bfloat16)), gpu.DEFAULT) == best
    assert choose_blocks(Problem(99, 4096, 128, jnp.dtype(jnp.bfloat16)), gpu.DEFAULT) != best


# What a GPU's compiler would be given.


def abstract(rows: int, size: int, hidden: int, dtype: Any) -> tuple[Any, ...]:
    def of(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    state = ExitRows(of((rows,), jnp.bool_), of((rows,), jnp.bool_), of((rows,), jnp.int32))
    router = Router(of((size, hidden)), of((hidden,)), of((hidden,)), of(()))
    return of((rows, size), dtype), router, Gate(of(()), of((), jnp.int32), of((), jnp.int32)), state


@pytest.mark.matrix(keep=4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [63, 576, 1024, 2048, 3584, 4096, 5120, 8192])
def test_kernel_lowers_for_cuda(size: int, dtype: Any) -> None:
    kernel = functools.partial(pallas_triton.exit_step, eps=EPS)
    for rows, hidden in ((1, 128), (37, 96), (65536, 128)):
        blocks = choose_blocks(Problem(rows, size, hidden, jnp.dtype(dtype)), gpu.current())
        text = gpu_lowering.lower(kernel, *abstract(rows, size, hidden, dtype))
        assert text.count(gpu_lowering.KERNEL_CALL) == (1 if blocks.splits == 1 else 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_lowers_for_cuda(dtype: Any) -> None:
    kernel = functools.partial(pallas_triton.exit_step, eps=EPS, norm="layer")
    for rows in (1, 65536):
        assert gpu_lowering.KERNEL_CALL in gpu_lowering.lower(kernel, *abstract(rows, 576, 128, dtype))


def test_more_numbers_than_32_bit_offsets_reach_are_refused() -> None:
    run = functools.partial(exit_step, eps=EPS, implementation="pallas_interpret")
    with pytest.raises(ValueError, match=r"up to 2\^31 numbers, not 524288 rows of 4096"):
        jax.eval_shape(run, *abstract(2**19, 4096, 16, jnp.bfloat16))


def test_lowering_refuses_what_the_gpu_cannot_do() -> None:
    """Interpreted, both kernels run: only lowering tells."""
    odd = functools.partial(pallas_triton.exit_step, eps=EPS, blocks=Blocks(16, 48, 1))
    with pytest.raises(ValueError, match="power of 2"):
        gpu_lowering.lower(odd, *abstract(16, 96, 16, jnp.float32))
    arguments = arguments_of(16, 96, 16, jnp.float32)
    assert_is_the_reference(arguments, interpreted(arguments, Blocks(16, 48, 1)))

    def sort(x: jax.Array, interpret: bool) -> jax.Array:
        def kernel(x_ref: Any, out_ref: Any) -> None:
            out_ref[...] = jnp.sort(x_ref[...])

        params = plt.CompilerParams(num_warps=4, num_stages=1)
        return pl.pallas_call(kernel, out_shape=x, compiler_params=params, interpret=interpret)(x)

    assert sort(jnp.asarray([3.0, 1.0, 2.0, 0.0]), True).tolist() == [0, 1, 2, 3]
    with pytest.raises(NotImplementedError, match="sort"):
        gpu_lowering.lower(functools.partial(sort, interpret=False), jax.ShapeDtypeStruct((4,), jnp.float32))


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 65536])
def test_loads_are_defined_and_products_exact(rows: int, dtype: Any, norm: str) -> None:
    """A masked load without a value for the rest is undefined on a GPU, and a product of float32 numbers is TF32
    there unless it asks for more. Interpreted, neither shows."""
    kernel = functools.partial(pallas_triton.exit_step, eps=EPS, norm=norm)
    equations = gpu_lowering.kernel_equations(kernel, *abstract(rows, 576, 96, dtype))
    assert not gpu_lowering.undefined_loads(equations)
    products = [equation for equation in equations if equation.primitive.name == "dot_general"]
    assert products
    for product in products:
        operands = {variable.aval.dtype for variable in product.invars}
        if operands == {jnp.dtype(jnp.float32)}:
            assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
        else:
            assert operands == {jnp.dtype(dtype)}
        assert product.outvars[0].aval.dtype == jnp.float32


def test_an_undefined_load_is_found() -> None:
    def kernel(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] = plt.load(x_ref.at[...], mask=jnp.arange(4) < 3)

    def call(x: jax.Array) -> jax.Array:
        return pl.pallas_call(kernel, out_shape=x, compiler_params=plt.CompilerParams(num_warps=4, num_stages=1))(x)

    equations = gpu_lowering.kernel_equations(call, jax.ShapeDtypeStruct((4,), jnp.float32))
    assert len(gpu_lowering.undefined_loads(equations)) == 1

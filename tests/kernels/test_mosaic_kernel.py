"""The exit step's Mosaic kernel without a GPU: numerics in JAX's interpreter of such kernels, and lowering for CUDA."""

from __future__ import annotations

import functools
from typing import Any

import gpu_lowering
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import params  # JAX has no public way to it
from test_exit_step_kernel import EPS, abstract, arguments_of, assert_is_the_reference
from tiny_models import tiny_config, tiny_model

from pallas_kernels import gpu, selection
from pallas_kernels.exit_step import exit_step, mosaic_gpu
from tide_jax.exits.depth import run_depth
from tide_jax.exits.exits import Exits
from tide_jax.testing import random_routers

DTYPES = [jnp.bfloat16, jnp.float16]


def interpreted(arguments: tuple[Any, ...], **settings: Any) -> Any:
    return mosaic_gpu.exit_step(*arguments, eps=EPS, **settings, interpret=params.InterpretGPUParams())


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, size, hidden, splits", [(1, 64, 1, 1), (3, 192, 16, 1), (64, 256, 128, 2), (70, 384, 100, 3)]
)
def test_kernel_is_the_reference(dtype: Any, rows: int, size: int, hidden: int, splits: int) -> None:
    arguments = arguments_of(rows, size, hidden, dtype)
    assert_is_the_reference(arguments, interpreted(arguments, splits=splits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_numbers_leave_others_alone(dtype: Any) -> None:
    x, *others = arguments_of(5, 128, 16, dtype)
    found, clean = interpreted((x.at[2, 127].set(jnp.nan), *others)), interpreted((x, *others))
    bad = np.arange(5) == 2
    assert np.isnan(found.scores[bad]).all()
    assert not found.exits[bad].any()
    np.testing.assert_array_equal(found.scores[~bad], clean.scores[~bad])


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"norm": "layer"}, "no LayerNorm"),
        ({"dtype": jnp.float32}, "it would multiply float32 in TF32"),
        ({"size": 72}, "a multiple of 64 channels, not 72"),
        ({"hidden": 129}, "routers up to 128 wide, not 129"),
        ({"rows": 0}, "no rows"),
    ],
    ids=["norm", "dtype", "size", "hidden", "rows"],
)
def test_what_the_kernel_cannot_do_is_refused(
    settings: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"rows": 4, "size": 128, "hidden": 16, "dtype": jnp.bfloat16} | settings
    norm = sizes.pop("norm", "rms")
    call = functools.partial(exit_step, eps=EPS, norm=norm, implementation="mosaic_gpu")
    monkeypatch.setattr(selection, "platform", lambda: "gpu")
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(call, *abstract(**sizes))


def test_other_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def scored() -> Any:
        call = functools.partial(exit_step, eps=EPS, implementation="mosaic_gpu")
        return jax.eval_shape(lambda *a: call(*a), *abstract(4, 128, 16, jnp.bfloat16)).scores

    monkeypatch.setattr(selection, "platform", lambda: "gpu")
    assert scored().shape == (4,)
    monkeypatch.setattr(gpu, "current", lambda: gpu.Gpu("10.0", 148))
    with pytest.raises(ValueError, match=r"compute capability 9\.0 \(H100, H200\), this GPU has 10\.0"):
        scored()


def test_what_is_written_is_committed_before_it_is_multiplied_or_copied() -> None:
    """Interpreted, it does not show."""
    kernel = functools.partial(mosaic_gpu.exit_step, eps=EPS)
    jaxpr = jax.make_jaxpr(kernel)(*abstract(64, 256, 128, jnp.bfloat16)).jaxpr
    committed, readers = True, 0
    for name in (equation.primitive.name for equation in gpu_lowering.equations(jaxpr)):
        if name in ("swap", "commit_smem"):
            committed = name == "commit_smem"
        elif name in ("wgmma_ref", "copy_smem_to_gmem"):
            readers += 1
            assert committed, name
    assert readers > 4


def test_products_are_finished_before_their_memory_is_written_again() -> None:
    """Matrix instructions run asynchronously and read shared memory until they are waited for. Interpreted, not."""
    kernel = functools.partial(mosaic_gpu.exit_step, eps=EPS)
    jaxpr = jax.make_jaxpr(kernel)(*abstract(64, 256, 128, jnp.bfloat16)).jaxpr
    running, waits = False, 0
    for name in (equation.primitive.name for equation in gpu_lowering.equations(jaxpr)):
        if name == "wgmma_ref":
            running = True
        elif name == "wgmma_wait":
            running, waits = False, waits + 1
        elif name in ("swap", "copy_gmem_to_smem", "copy_smem_to_gmem", "barrier_wait"):
            assert not running, name
    assert waits > 1
    assert not running


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_lowers_for_cuda(dtype: Any) -> None:
    for rows, size, hidden in ((1, 576, 128), (37, 4096, 96), (65536, 4096, 128), (4096, 8192, 16)):
        text = gpu_lowering.lower(
            functools.partial(mosaic_gpu.exit_step, eps=EPS), *abstract(rows, size, hidden, dtype)
        )
        assert text.count("mosaic_gpu_v2") == 1


def test_a_model_takes_it_for_the_exit_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "platform", lambda: "gpu")
    model = tiny_model(tiny_config(num_layers=3, hidden_size=64), dtype=jnp.bfloat16)
    routers = random_routers(model.config, interval=1)
    exits = Exits.uniform(routers, 0.5, implementation="mosaic_gpu")
    positions = jnp.arange(128, dtype=jnp.int32)[None]
    out = jax.eval_shape(lambda: run_depth(model, jnp.ones_like(positions), positions, None, exits))
    assert out.states.shape == (1, 128, 64)

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
from test_exit_step_kernel import abstract, arguments_of, assert_is_the_reference, settings_of

from pallas_kernels import gpu, selection
from pallas_kernels.exit_step import exit_step, mosaic_gpu

DTYPES = [jnp.bfloat16, jnp.float16]


def interpreted(arguments: tuple[Any, ...], **settings: Any) -> Any:
    return mosaic_gpu.exit_step(*arguments, **settings_of(settings), interpret=params.InterpretGPUParams())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows, size, hidden, splits", [(1, 64, 1, 1), (3, 192, 16, 1), (64, 256, 128, 2), (70, 384, 100, 3)]
)
def test_kernel_is_the_reference(dtype: Any, rows: int, size: int, hidden: int, splits: int) -> None:
    arguments = arguments_of(rows, size, hidden, dtype)
    assert_is_the_reference(arguments, interpreted(arguments, splits=splits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_lowers_for_cuda(dtype: Any) -> None:
    for rows, size, hidden in ((1, 576, 128), (37, 4096, 96), (65536, 4096, 128), (4096, 8192, 16)):
        text = gpu_lowering.lower(
            functools.partial(mosaic_gpu.exit_step, **settings_of({})), *abstract(rows, size, hidden, dtype)
        )
        assert text.count("mosaic_gpu_v2") == 1

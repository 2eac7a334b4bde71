"""What Triton's compiler makes of the kernels, in either language, for an A100 and an H100: registers, loads and matrix
instructions.

Needs the triton wheel, which has the compiler and NVIDIA's assembler, but no GPU.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from triton_compiler import ARCHITECTURES, Compiled, compiled, compiled_twins

from pallas_kernels.common import NormSettings, NormWeights
from pallas_kernels.exit_project import AffineHead
from pallas_kernels.exit_project import pallas_triton as exit_project
from pallas_kernels.exit_step import ExitRows, Gate, Router
from pallas_kernels.exit_step import pallas_triton as exit_step
from pallas_kernels.exit_step.plan import Blocks
from pallas_kernels.kv_fill import KVRows, KVWeights, Rotary, Settings
from pallas_kernels.kv_fill import pallas_triton as kv_fill

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def of(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def step(
    function: Callable[..., Any], rows: int, dtype: Any, size: int = 4096, hidden: int = 128, **settings: Any
) -> tuple[Any, ...]:
    """An exit step and its arguments."""
    kernel = functools.partial(function, eps=1e-5, **settings)
    state = ExitRows(of((rows,), jnp.bool_), of((rows,), jnp.bool_), of((rows,), jnp.int32))
    router = Router(of((size, hidden)), of((hidden,)), of((hidden,)), of(()))
    return kernel, of((rows, size), dtype), router, Gate(of(()), of((), jnp.int32), of((), jnp.int32)), state


def check_step(kernels: dict[str, Compiled], dtype: Any) -> Compiled:
    """What holds for every exit step; its kernel that multiplies."""
    assert not any(kernel.spilled or kernel.undefined_loads for kernel in kernels.values())
    projection = kernels.get("exit_step_whole") or kernels["exit_step_parts"]
    assert projection.count(r"ld\.global\.v4|cp\.async\.cg")  # 16 bytes at once
    # One number at a time come only those that a row or a hidden unit has one of.
    assert projection.count(r"ld\.global\.[bu]\d+$") <= (24 if "exit_step_whole" in kernels else 0)
    assert not projection.count(r".*tf32")
    products = {name for name in projection.instructions if "mma" in name and "f32" in name}
    kind = {"float32": None, "bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]
    assert bool(products) == (kind is not None)
    assert all(name.endswith((f"f32.{kind}.{kind}", f"f32.{kind}.{kind}.f32")) for name in products)
    return projection


@pytest.mark.matrix
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, size, hidden", [(1, 4096, 128), (65536, 4096, 128), (65536, 576, 200), (1, 8192, 200)])
def test_exit_step(tmp_path: Path, architecture: int, dtype: Any, rows: int, size: int, hidden: int) -> None:
    kernels = compiled(tmp_path, architecture, *step(exit_step.exit_step, rows, dtype, size, hidden))
    assert set(kernels) == ({"exit_step_whole"} if rows > 1 else {"exit_step_parts", "exit_step_finish"})
    projection = check_step(kernels, dtype)
    if dtype != jnp.float32 and rows > 1 and hidden == 128:  # blocks of 64 rows, as Hopper's instruction takes
        assert bool(projection.count("wgmma")) == (architecture == 90)


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 65536])
def test_exit_step_in_triton(tmp_path: Path, dtype: Any, rows: int) -> None:
    from pallas_kernels.exit_step import triton

    kernels = compiled_twins(tmp_path, 90, *step(triton.exit_step, rows, dtype))
    assert set(kernels) == ({"_whole"} if rows > 1 else {"_parts", "_finish"})
    check_step({f"exit_step{name}": kernel for name, kernel in kernels.items()}, dtype)
    assert all(kernel.wide_addresses for kernel in kernels.values())


@pytest.mark.matrix
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [1, 65536])
def test_exit_step_with_layer_norm_spills_nothing(tmp_path: Path, architecture: int, rows: int) -> None:
    kernels = compiled(tmp_path, architecture, *step(exit_step.exit_step, rows, jnp.bfloat16, norm="layer"))
    assert not any(kernel.spilled or kernel.count(r".*tf32") for kernel in kernels.values())


@pytest.mark.parametrize("rows", [1, 65536])
def test_exit_step_with_layer_norm_in_triton(tmp_path: Path, rows: int) -> None:
    from pallas_kernels.exit_step import triton

    kernels = compiled_twins(tmp_path, 90, *step(triton.exit_step, rows, jnp.bfloat16, norm="layer"))
    assert not any(k.spilled or k.undefined_loads or k.count(r".*tf32") for k in kernels.values())


@pytest.mark.slow
def test_blocks_that_are_too_tall_spill(tmp_path: Path) -> None:
    tall = step(exit_step.exit_step, 65536, jnp.bfloat16, blocks=Blocks(128, 64, 1, 4))
    assert compiled(tmp_path, 90, *tall)["exit_step_whole"].spilled


def projection(function: Callable[..., Any], dtype: Any, size: int) -> tuple[Any, ...]:
    """An exit projection and its arguments."""
    kernel = functools.partial(function, settings=NormSettings(1e-5, "layer"))
    head = AffineHead((of((size, 8), dtype), of((8, size), dtype)), of((size,), dtype))
    states, final_norm = of((64, size), dtype), NormWeights(of((size,), dtype), of((size,), dtype))
    return kernel, states, head, final_norm, of((64,), jnp.bool_), states


def check_projection(made: Compiled) -> None:
    assert not made.spilled
    assert not made.undefined_loads
    assert made.count(r"ld\.global\.v4")
    assert made.count(r"st\.global\.v4")
    assert made.count(r"ld\.global\.[bu](16|32|64)") == 0  # the flag that a row exits has 8
    assert made.count(r"st\.global\.[bu]") == 0


@pytest.mark.matrix(keep=6)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [576, 4096, 16384])
def test_exit_project(tmp_path: Path, architecture: int, dtype: Any, size: int) -> None:
    found = compiled(tmp_path, architecture, *projection(exit_project.exit_project, dtype, size))
    (made,) = found.values()
    check_projection(made)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [576, 4096])
def test_exit_project_in_triton(tmp_path: Path, dtype: Any, size: int) -> None:
    from pallas_kernels.exit_project import triton

    (made,) = compiled_twins(tmp_path, 90, *projection(triton.exit_project, dtype, size)).values()
    check_projection(made)
    assert made.wide_addresses


def fill(function: Callable[..., Any], dtype: Any, heads: int, channels: int, half: int) -> tuple[Any, ...]:
    """A cache fill with every parameter, and its arguments."""
    projection = of((heads, 2, channels, 32), dtype), of((heads, 2, channels), dtype), of((channels,), dtype)
    rows = of((2, heads, 64, channels), dtype)
    tables = Rotary(of((2, 64, half)), of((2, 64, half))) if half else None
    kernel = functools.partial(function, settings=Settings(NormSettings(1e-5)))
    weights = KVWeights(NormWeights(), *projection)
    return kernel, of((2, 64, 32), dtype), weights, tables, of((2, 64), jnp.bool_), KVRows(rows, rows)


@pytest.mark.matrix(keep=2)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, channels, half", [(3, 64, 32), (8, 128, 64), (32, 128, 64)])
def test_kv_fill(tmp_path: Path, architecture: int, dtype: Any, heads: int, channels: int, half: int) -> None:
    (made,) = compiled(tmp_path, architecture, *fill(kv_fill.kv_fill, dtype, heads, channels, half)).values()
    assert not made.spilled
    assert made.count(r"ld\.global\.v4")
    assert made.count(r"st\.global\.v4")


@pytest.mark.matrix(keep=3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, channels, half", [(3, 64, 32), (8, 128, 64), (8, 128, 0)])
def test_kv_fill_in_triton(tmp_path: Path, dtype: Any, heads: int, channels: int, half: int) -> None:
    from pallas_kernels.kv_fill import triton

    (made,) = compiled_twins(tmp_path, 90, *fill(triton.kv_fill, dtype, heads, channels, half)).values()
    assert not made.spilled
    assert not made.undefined_loads
    assert made.wide_addresses

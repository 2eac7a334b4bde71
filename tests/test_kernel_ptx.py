"""What Triton's compiler makes of the Pallas kernels for an A100 and an H100: registers, loads and matrix instructions.

Needs the triton wheel, which has the compiler and NVIDIA's assembler, but no GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import gpu_lowering
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.compact import Partition
from pallas_kernels.compact import pallas_triton as compact
from pallas_kernels.exit_project import AffineHead, FinalNorm
from pallas_kernels.exit_project import pallas_triton as exit_project
from pallas_kernels.exit_step import ExitRows
from pallas_kernels.exit_step import pallas_triton as exit_step
from pallas_kernels.exit_step.config import Blocks
from pallas_kernels.kv_fill import InputNorm, KVRows, Projection, Rotary, Settings
from pallas_kernels.kv_fill import pallas_triton as kv_fill

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
ARCHITECTURES = {80: "sm_80", 90: "sm_90a"}


class Compiled(NamedTuple):
    """A kernel's instructions, and the bytes that registers are spilled into."""

    instructions: Counter[str]
    spilled: int

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def compiled(folder: Path, architecture: int, function: Any, *arguments: Any) -> dict[str, Compiled]:
    """The kernels that a function calls, by name."""
    import triton
    from triton.backends.compiler import GPUTarget

    found = {}
    for kernel in gpu_lowering.kernel_texts(function, *arguments):
        source, assembly = folder / f"{kernel.name}.ttir", folder / f"{kernel.name}.ptx"
        source.write_text(kernel.text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = triton.compile(str(source), target=GPUTarget("cuda", architecture, 32), options=kernel.options)
        assembly.write_text(made.asm["ptx"])
        names = re.findall(r"^\s*(?:@%\w+ )?([a-z][\w.:]+)", made.asm["ptx"], re.MULTILINE)
        found[kernel.name] = Compiled(Counter(names), spilled(assembly, architecture))
    return found


def spilled(assembly: Path, architecture: int) -> int:
    """What NVIDIA's assembler says; the wheel's second one knows newer PTX."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    target = [f"-arch={ARCHITECTURES[architecture]}", "-v", str(assembly), "-o", str(assembly.with_suffix(".cubin"))]
    outputs = []
    for program in sorted(folder.glob("ptxas*")):
        result = subprocess.run([program, *target], capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return sum(int(n) for n in re.findall(r"(\d+) bytes spill", result.stderr))
        outputs.append(result.stderr)
    raise AssertionError("\n".join(outputs))


def of(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def step(
    folder: Path, architecture: int, rows: int, dtype: Any, size: int = 4096, hidden: int = 128, **settings: Any
) -> dict[str, Compiled]:
    kernel = functools.partial(exit_step.exit_step, layer=3, min_layers=jnp.int32(2), eps=1e-5, **settings)
    state = ExitRows(of((rows,), jnp.bool_), of((rows,), jnp.bool_), of((rows,), jnp.int32))
    router = of((size, hidden)), of((hidden,)), of((hidden,)), of(())
    return compiled(folder, architecture, kernel, of((rows, size), dtype), *router, of(()), state)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, size, hidden", [(1, 4096, 128), (65536, 4096, 128), (65536, 576, 200), (1, 8192, 200)])
def test_exit_step(tmp_path: Path, architecture: int, dtype: Any, rows: int, size: int, hidden: int) -> None:
    kernels = step(tmp_path, architecture, rows, dtype, size, hidden)
    assert set(kernels) == ({"exit_step_whole"} if rows > 1 else {"exit_step_parts", "exit_step_finish"})
    assert not any(kernel.spilled for kernel in kernels.values())
    projection = kernels.get("exit_step_whole") or kernels["exit_step_parts"]
    assert projection.count(r"ld\.global\.v4|cp\.async\.cg")  # 16 bytes at once
    assert not projection.count(r".*tf32")
    products = {name for name in projection.instructions if "mma" in name and "f32" in name}
    kind = {"float32": None, "bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]
    assert bool(products) == (kind is not None)
    assert all(name.endswith((f"f32.{kind}.{kind}", f"f32.{kind}.{kind}.f32")) for name in products)
    if kind and rows > 1 and hidden == 128:  # blocks of 64 rows, as Hopper's instruction takes
        assert any("wgmma" in name for name in products) == (architecture == 90)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [1, 65536])
def test_exit_step_with_layer_norm_spills_nothing(tmp_path: Path, architecture: int, rows: int) -> None:
    kernels = step(tmp_path, architecture, rows, jnp.bfloat16, norm="layer")
    assert not any(kernel.spilled or kernel.count(r".*tf32") for kernel in kernels.values())


def test_blocks_that_are_too_tall_spill(tmp_path: Path) -> None:
    kernels = step(tmp_path, 90, 65536, jnp.bfloat16, blocks=Blocks(128, 64, 1, 4))
    assert kernels["exit_step_whole"].spilled


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [576, 4096, 16384])
def test_exit_project(tmp_path: Path, architecture: int, dtype: Any, size: int) -> None:
    kernel = functools.partial(exit_project.exit_project, eps=1e-5, norm="layer")
    head = AffineHead((of((size, 8), dtype), of((8, size), dtype)), of((size,), dtype))
    states, final_norm = of((64, size), dtype), FinalNorm(of((size,), dtype), of((size,), dtype))
    found = compiled(tmp_path, architecture, kernel, states, head, final_norm, of((64,), jnp.bool_), states)
    (made,) = found.values()
    assert not made.spilled
    assert made.count(r"ld\.global\.v4")
    assert made.count(r"st\.global\.v4")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [576, 4096])
def test_compaction_copies_sixteen_bytes_at_once(tmp_path: Path, architecture: int, dtype: Any, size: int) -> None:
    rows = Partition(of((2, 64), jnp.int32), of((2, 64), jnp.int32), of((2,), jnp.int32))
    states, compacted = of((2, 64, size), dtype), of((2, 48, size), dtype)
    gather = functools.partial(compact.gather_rows, size=48)
    found = compiled(tmp_path, architecture, gather, states, rows)
    found |= compiled(tmp_path, architecture, compact.scatter_rows, compacted, rows, states)
    assert set(found) == {"compact_gather", "compact_scatter"}
    for made in found.values():
        assert not made.spilled
        assert made.count(r"ld\.global\.v4")
        assert made.count(r"st\.global\.v4")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, channels, half", [(3, 64, 32), (8, 128, 64), (32, 128, 64)])
def test_kv_fill(tmp_path: Path, architecture: int, dtype: Any, heads: int, channels: int, half: int) -> None:
    weights = of((heads, 2, channels, 32), dtype), of((heads, 2, channels), dtype), of((channels,), dtype)
    rows = of((2, heads, 64, channels), dtype)
    kernel = functools.partial(kv_fill.kv_fill, settings=Settings(1e-5))
    tables = Rotary(of((2, 64, half)), of((2, 64, half)))
    arguments = of((2, 64, 32), dtype), InputNorm(), Projection(*weights), tables, of((2, 64), jnp.bool_)
    (made,) = compiled(tmp_path, architecture, kernel, *arguments, KVRows(rows, rows)).values()
    assert not made.spilled
    assert made.count(r"ld\.global\.v4")
    assert made.count(r"st\.global\.v4")

"""Settings of the whole test run: no implicit promotion in JAX, no network. A checkpoint that many tests take."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One piece of machine code a program, not 32: each piece takes three memory mappings, and thousands of programs would
# take more than a process may have (65,530 on Linux), which ends it with SIGSEGV. And LLVM need not polish programs
# that run once on a few numbers. Both are for the process's own start and for those it starts.
os.environ["XLA_FLAGS"] = f"--xla_cpu_parallel_codegen_split_count=1 {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest
import tiny_llama

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def forget_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Drops a module's compiled programs after it: each holds memory mappings, of which a process may have so many."""
    yield
    for value in list(vars(request.module).values()):
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Llama checkpoint."""
    return tiny_llama.save(tmp_path / "source")

"""Settings of the whole test run: no implicit promotion in JAX, no network. A checkpoint that many tests take."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Compiling takes most of the tests' time, and programs here run once on a few numbers: LLVM need not polish them, and
# XLA's older emitters compile a third faster (a flag that later releases do not know, and die of). For this process and
# those that it starts.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_opt_preset=fast_compile")

import jax
import pytest
from jaxtyping import install_import_hook

CHECKED = (
    "tide_jax.exits.depth",
    "tide_jax.exits.queue",
    "tide_jax.generation.generate",
    "tide_jax.generation.logit_rules",
    "tide_jax.generation.outputs",
    "tide_jax.lossless",
    "tide_jax.model.cache",
)
"""Modules behind `tide_jax.functional`: every call in the tests checks shapes, dtypes and types against signatures.

Not `exits.exits` and `exits.router`, because JAX builds these pytrees with leaves that are no arrays. `TIDE` and its
like refuse wrong types themselves; tests/test_public_face.py checks their signatures with right ones."""
install_import_hook(CHECKED, "beartype.beartype")

import tiny_llama  # noqa: E402

from tide_jax.generation.programs import short_of_mappings  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `matrix`, marks all cases but the first and some between as slow: ``matrix(keep=3)``."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("matrix") is not None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for found in cases.values():
        keep = found[0].get_closest_marker("matrix").kwargs.get("keep", 1)  # type: ignore[union-attr]
        fast = {len(found) * number // keep for number in range(keep)}
        for number, item in enumerate(found):
            if number not in fast:
                item.add_marker("slow")


def pytest_runtest_teardown() -> None:
    """Drops compiled programs where they have taken too many of the memory mappings that a process may have."""
    if short_of_mappings():
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True, scope="module")
def forget_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Drops a module's models and compiled programs after it."""
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

"""Settings of the whole test run: no implicit promotion in JAX, no network. A checkpoint that many tests take."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest
import tiny_llama

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Llama checkpoint."""
    return tiny_llama.save(tmp_path / "source")

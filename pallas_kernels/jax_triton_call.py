"""Calls a Triton kernel through any release of jax_triton."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Array


def run(
    kernel: Any,
    inputs: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    warps: int,
    constants: Mapping[str, Any],
) -> Sequence[Array]:
    """Runs a kernel whose parameters are the inputs, the outputs, and the compile-time constants by name."""
    # Imported here because some releases can't be imported without a GPU, and importing changes TRITON_CACHE_DIR.
    import jax_triton

    # 0.4 renamed the argument and warns about the old name.
    out = {"out_type" if hasattr(jax_triton, "TensorDescriptor") else "out_shape": tuple(outputs)}
    return jax_triton.triton_call(*inputs, kernel=kernel, grid=grid, num_warps=warps, num_stages=2, **out, **constants)

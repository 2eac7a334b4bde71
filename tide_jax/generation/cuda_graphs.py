"""Whole decode loops as CUDA graphs, which XLA makes only if it is asked to.

By default XLA launches the turns of a loop from the host: for each group of layers it waits until the host has read
whether there is another one. With loops among its command buffers, a decode step, and even a whole generation, is one
graph on the device. Ahead-of-time compilation shows that for an H100; no GPU has run it here.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

logger = logging.getLogger(__name__)

OPTIONS: dict[str, Any] = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,WHILE",
    "xla_gpu_graph_min_graph_size": 1,
}
"""Compiler options for loops as graphs; XLA's own list, and loops."""
_RUNS = 3  # older releases of XLA failed at the second run of such a loop


def compiler_options(platform: str, wanted: bool | None) -> dict[str, Any] | None:
    """Options for programs on a platform, or None for the compiler's own.

    Args:
      platform: "cpu", "gpu" or "tpu".
      wanted: True and False decide; None asks for graphs on a GPU where `loops_run_as_graphs`.
    """
    if platform != "gpu" or wanted is False:
        return None
    return OPTIONS if wanted or loops_run_as_graphs() else None


@functools.cache
def loops_run_as_graphs() -> bool:
    """Whether a small loop of loops gives right answers as a graph, several times; checked once in a process."""

    def turns(x: jax.Array, most: jax.Array) -> jax.Array:
        def outer(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            number, x = state
            inner = lax.while_loop(lambda s: s[0] < number, lambda s: (s[0] + 1, s[1] @ s[1] * 0.5), (jnp.int32(0), x))
            return number + 1, lax.cond(number % 2 == 0, lambda: inner[1], lambda: inner[1] + 0.25)

        return lax.while_loop(lambda s: s[0] < most, outer, (jnp.int32(0), x))[1]

    x = jnp.eye(16, dtype=jnp.float32) * 0.5
    try:
        expected = np.asarray(jax.jit(turns)(x, jnp.int32(5)))
        program = jax.jit(turns).lower(x, jnp.int32(5)).compile(OPTIONS)
        found = [np.asarray(program(x, jnp.int32(5))) for _ in range(_RUNS)]
    except Exception as error:
        logger.warning("loops don't run as CUDA graphs here, and are launched from the host: %s", error)
        return False
    same = all(np.allclose(each, expected, rtol=1e-5, atol=1e-6) for each in found)
    if not same:
        logger.warning("loops that run as CUDA graphs give other numbers here, and are launched from the host")
    return same

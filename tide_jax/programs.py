"""Compilation ahead of time, so that compiling never counts as running, for one device or a mesh."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from tide_jax.sharding import mesh_context, replicate


class Programs:
    """Compiled programs of one engine by function and argument shapes, and by places on a mesh.

    Args:
      mesh: where they run; None for JAX's default device. Arguments that are not on it yet go to all of its devices.
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        self._mesh = mesh
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.compile_time = 0.0

    def run(
        self, function: Callable[..., Any], fixed: tuple, arguments: tuple, *, donate: int | None = None, **static: Any
    ) -> tuple[Any, float, float]:
        """Result, seconds of running, seconds of compiling.

        Args:
          fixed: leading arguments that are the same at every call (the model): left out of the shape key.
          arguments: the others.
          donate: index of an argument whose buffers the program may overwrite. On a mesh the result is laid out as it
            is, to be passed in next.
          static: compile-time keyword arguments.
        """
        arguments = replicate(arguments, self._mesh)
        leaves, structure = jax.tree.flatten(arguments)
        shapes = tuple((leaf.shape, leaf.dtype, self._split(leaf)) for leaf in leaves)
        key = (function.__name__, shapes, structure, tuple(sorted(static.items())))
        start = time.perf_counter()
        compiled = 0.0
        if key not in self._compiled:
            options: dict[str, Any] = {"static_argnames": tuple(static)}
            if donate is not None:
                options |= {"donate_argnums": (donate,)} | self._layout(arguments[donate - len(fixed)])
            with mesh_context(self._mesh):
                self._compiled[key] = jax.jit(function, **options).lower(*fixed, *arguments, **static).compile()
            compiled = time.perf_counter() - start
            self.compile_time += compiled
        start = time.perf_counter()
        result = jax.block_until_ready(self._compiled[key](*fixed, *arguments))
        return result, time.perf_counter() - start, compiled

    def _split(self, leaf: Any) -> Any:
        """How an argument is split over the mesh; None where it is not."""
        return None if self._mesh is None or leaf.sharding.is_fully_replicated else leaf.sharding

    def _layout(self, donated: Any) -> dict[str, Any]:
        return {} if self._mesh is None else {"out_shardings": jax.tree.map(lambda a: a.sharding, donated)}

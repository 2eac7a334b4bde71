"""Compilation ahead of time, so that compiling never counts as running."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax


class Programs:
    """Compiled programs of one engine by function and argument shapes."""

    def __init__(self) -> None:
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self.compile_time = 0.0

    def run(
        self, function: Callable[..., Any], fixed: tuple, arguments: tuple, *, donate: int | None = None, **static: Any
    ) -> tuple[Any, float, float]:
        """Result, seconds of running, seconds of compiling.

        Args:
          fixed: leading arguments that are the same at every call (the model): left out of the shape key.
          arguments: the others.
          donate: index of an argument whose buffers the program may overwrite.
          static: compile-time keyword arguments.
        """
        leaves, structure = jax.tree.flatten(arguments)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = (function.__name__, shapes, structure, tuple(sorted(static.items())))
        start = time.perf_counter()
        compiled = 0.0
        if key not in self._compiled:
            donated = () if donate is None else (donate,)
            jitted = jax.jit(function, static_argnames=tuple(static), donate_argnums=donated)
            self._compiled[key] = jitted.lower(*fixed, *arguments, **static).compile()
            compiled = time.perf_counter() - start
            self.compile_time += compiled
        start = time.perf_counter()
        result = jax.block_until_ready(self._compiled[key](*fixed, *arguments))
        return result, time.perf_counter() - start, compiled

"""Compilation ahead of time, so that compiling never counts as running, for one device or a mesh."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from tide_jax.checks import whole_number
from tide_jax.errors import out_of_memory
from tide_jax.model.sharding import mesh_context, replicate

MOST_PROGRAMS = 32
"""Programs that an engine keeps: of the kinds of call one makes, at several lengths and batch sizes. Each takes some
megabytes, hundreds for a deep model."""


class Programs:
    """Compiled programs of one engine by function and argument shapes, and by places on a mesh.

    Args:
      mesh: where they run; None for JAX's default device. Arguments that are not on it yet go to all of its devices.
      most: programs to keep; of more, the one that was not used for the longest time is dropped.
    """

    def __init__(self, mesh: Mesh | None = None, *, most: int = MOST_PROGRAMS) -> None:
        self._mesh = mesh
        self._most = whole_number("max_programs", most, 1)
        self._compiled: dict[Any, Callable[..., Any]] = {}  # in the order of their last use
        self.compile_time = 0.0

    def __len__(self) -> int:
        return len(self._compiled)

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

        Raises:
          TideError: the device has too little memory.
        """
        try:
            return self._run(function, fixed, arguments, donate, static)
        except Exception as error:
            if (reason := out_of_memory(error)) is not None:
                raise reason from error
            raise

    def _run(
        self, function: Callable[..., Any], fixed: tuple, arguments: tuple, donate: int | None, static: dict[str, Any]
    ) -> tuple[Any, float, float]:
        arguments = replicate(arguments, self._mesh)
        leaves, structure = jax.tree.flatten(arguments)
        shapes = tuple((leaf.shape, leaf.dtype, self._split(leaf)) for leaf in leaves)
        key = (function, shapes, structure, tuple(sorted(static.items())))
        start = time.perf_counter()
        compiled = 0.0
        program = self._compiled.pop(key, None)
        if program is None:
            program = self._compile(function, fixed, arguments, donate, static)
            compiled = time.perf_counter() - start
            self.compile_time += compiled
        self._compiled[key] = program
        start = time.perf_counter()
        result = jax.block_until_ready(program(*fixed, *arguments))
        return result, time.perf_counter() - start, compiled

    def _compile(
        self, function: Callable[..., Any], fixed: tuple, arguments: tuple, donate: int | None, static: dict[str, Any]
    ) -> Callable[..., Any]:
        while self._compiled and (len(self._compiled) >= self._most or short_of_mappings()):
            del self._compiled[next(iter(self._compiled))]
        options: dict[str, Any] = {"static_argnames": tuple(static)}
        if donate is not None:
            options |= {"donate_argnums": (donate,)} | self._layout(arguments[donate - len(fixed)])
        with mesh_context(self._mesh):
            program = jax.jit(_own(function), **options).lower(*fixed, *arguments, **static).compile()
        give_back_memory()
        return program

    def _split(self, leaf: Any) -> Any:
        """How an argument is split over the mesh; None where it is not."""
        return None if self._mesh is None or leaf.sharding.is_fully_replicated else leaf.sharding

    def _layout(self, donated: Any) -> dict[str, Any]:
        return {} if self._mesh is None else {"out_shardings": jax.tree.map(lambda a: a.sharding, donated)}


def _own(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under a name that dies with the compilation.

    JAX keeps what it has compiled for as long as the function lives, a dropped program too.
    """

    @functools.wraps(function)
    def own(*arguments: Any, **static: Any) -> Any:
        return function(*arguments, **static)

    return own


def short_of_mappings() -> bool:
    """Whether this process has half of the memory mappings that Linux allows it (``vm.max_map_count``, often 65,530).

    XLA's CPU programs take three for each of their kernels, more than a thousand for a model of 30 layers. One more
    than allowed ends the process. Other systems have no such limit.
    """
    try:
        allowed = int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
        with open("/proc/self/maps", "rb") as maps:
            return 2 * sum(1 for _ in maps) > allowed
    except (OSError, ValueError):
        return False


def give_back_memory() -> None:
    """Hands what a compilation has freed back to the system: glibc keeps it, up to hundreds of megabytes a program.

    Nothing that is in use is touched. It takes milliseconds, after seconds of compiling. Other C libraries have no such
    function, and mostly no need of it.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows has no main program's library
        ctypes.CDLL(None).malloc_trim(0)

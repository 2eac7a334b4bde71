"""Ahead-of-time compilation for one device or a mesh; compile time and run time are measured separately."""

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

from tide_jax.checks import instance_of, whole_number
from tide_jax.errors import reports_out_of_memory
from tide_jax.generation.cuda_graphs import compiler_options
from tide_jax.model.sharding import mesh_context, replicate

MOST_PROGRAMS = 32
"""Compiled programs that an engine keeps: enough for several kinds of call, lengths and batch sizes.

Each takes some megabytes, hundreds for a deep model."""


class Fixed:
    """Leading arguments that stay the same while a user's call runs: the model.

    They are flattened once: a model is hundreds of Python objects, and going through them takes longer than a pass of
    a small model. Make one for each call, because weights may change between calls.
    """

    def __init__(self, *objects: Any) -> None:
        self.leaves, self.structure = jax.tree.flatten(objects)
        self.count = len(objects)


class Programs:
    """Cache of compiled programs, keyed by function, argument shapes and placement on a mesh.

    Args:
      mesh: devices to run on; None for JAX's default device. Arguments not on the mesh are copied to all its devices.
      most: programs to keep; beyond that, the least recently used one is dropped.
      cuda_graphs: whether loops run as CUDA graphs on a GPU, see `tide_jax.generation.cuda_graphs`.
    """

    def __init__(self, mesh: Mesh | None = None, *, most: int = MOST_PROGRAMS, cuda_graphs: bool | None = None) -> None:
        self._mesh = mesh
        instance_of("cuda_graphs", cuda_graphs, bool, or_none=True)
        self._cuda_graphs = cuda_graphs
        self._most = whole_number("max_programs", most, 1)
        self._compiled: dict[Any, Callable[..., Any]] = {}  # least recently used first
        self.compile_time = 0.0

    def __len__(self) -> int:
        return len(self._compiled)

    def run(
        self,
        function: Callable[..., Any],
        fixed: tuple | Fixed,
        arguments: tuple,
        *,
        donate: int | None = None,
        **static: Any,
    ) -> tuple[Any, float, float]:
        """Compiles the function if needed and runs it.

        Args:
          function: the function to run.
          fixed: leading arguments that are the same at every call (the model); not part of the key.
          arguments: the other arguments.
          donate: index of an argument whose buffers the program may overwrite. On a mesh the result gets the layout of
            this argument, so that it can be passed in at the next call.
          static: compile-time keyword arguments.

        Returns:
          The result, seconds of running and seconds of compiling.

        Raises:
          TideError: the device has too little memory.
        """
        fixed = fixed if isinstance(fixed, Fixed) else Fixed(*fixed)
        with reports_out_of_memory():
            return self._run(function, fixed, arguments, donate, static)

    def _run(
        self, function: Callable[..., Any], fixed: Fixed, arguments: tuple, donate: int | None, static: dict[str, Any]
    ) -> tuple[Any, float, float]:
        arguments = replicate(arguments, self._mesh)
        leaves, structure = jax.tree.flatten(arguments)
        shapes = tuple((leaf.shape, leaf.dtype, self._split(leaf)) for leaf in leaves)
        key = (function, shapes, structure, tuple(sorted(static.items())))
        # Look up the program, and put it at the end: the dictionary is in order of last use.
        start = time.perf_counter()
        compiled = 0.0
        program = self._compiled.pop(key, None)
        if program is None:
            program = self._compile(function, fixed, arguments, donate, static)
            compiled = time.perf_counter() - start
            self.compile_time += compiled
        self._compiled[key] = program
        start = time.perf_counter()
        result = jax.block_until_ready(program(fixed.leaves, *arguments))
        return result, time.perf_counter() - start, compiled

    def _compile(
        self, function: Callable[..., Any], fixed: Fixed, arguments: tuple, donate: int | None, static: dict[str, Any]
    ) -> Callable[..., Any]:
        # Drop old programs first: one too many may exhaust the process's memory mappings.
        while self._compiled and (len(self._compiled) >= self._most or short_of_mappings()):
            del self._compiled[next(iter(self._compiled))]
        options: dict[str, Any] = {"static_argnames": tuple(static)}
        if donate is not None:
            given = donate - fixed.count
            options |= {"donate_argnums": (1 + given,)} | self._layout(arguments[given])
        with mesh_context(self._mesh):
            lowered = jax.jit(_own(function, fixed.structure), **options).lower(fixed.leaves, *arguments, **static)
            program = lowered.compile(self._options())
        give_back_memory()
        return program

    @property
    def loops_in_graphs(self) -> bool:
        """Whether loops run as CUDA graphs."""
        return self._options() is not None

    def _options(self) -> dict[str, Any] | None:
        return compiler_options(self._platform(), self._cuda_graphs)

    def _platform(self) -> str:
        return jax.default_backend() if self._mesh is None else self._mesh.devices.flat[0].platform

    def _split(self, leaf: Any) -> Any:
        """Sharding of an argument that is split over the mesh; None if it is not split."""
        return None if self._mesh is None or leaf.sharding.is_fully_replicated else leaf.sharding

    def _layout(self, donated: Any) -> dict[str, Any]:
        return {} if self._mesh is None else {"out_shardings": jax.tree.map(lambda a: a.sharding, donated)}


def _own(function: Callable[..., Any], structure: Any) -> Callable[..., Any]:
    """The function with its leading arguments flattened, as an object that lives only as long as its compiled program.

    JAX keeps compiled programs for as long as the function object lives, even programs dropped here.
    """

    @functools.wraps(function)
    def own(leaves: list[Any], *arguments: Any, **static: Any) -> Any:
        return function(*jax.tree.unflatten(structure, leaves), *arguments, **static)

    return own


def short_of_mappings() -> bool:
    """Whether this process uses over half of the memory mappings Linux allows (``vm.max_map_count``, often 65,530).

    XLA's CPU programs take three mappings for each kernel, more than a thousand for a model of 30 layers. Exceeding the
    limit kills the process. Other systems have no such limit.
    """
    try:
        allowed = int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
        with open("/proc/self/maps", "rb") as maps:
            return 2 * sum(1 for _ in maps) > allowed
    except (OSError, ValueError):
        return False


def give_back_memory() -> None:
    """Returns memory freed by a compilation to the system; glibc keeps it, up to hundreds of megabytes a program.

    Memory in use is not touched. The call takes milliseconds, after seconds of compiling. Other C libraries lack the
    function, and mostly don't need it.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: CDLL(None) fails on Windows
        ctypes.CDLL(None).malloc_trim(0)

"""Checks every operation x implementation x dtype x channels x rows.

Each case records whether it compiles, whether it is right, and its time beside jitted plain JAX and beside the bytes
that it must move.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.selection import ImplementationError
from scripts.gpu.op_table import Op, Shape
from scripts.gpu.timing import Budget, Noise, chained, per_call
from scripts.reporting import reason

Row = dict[str, Any]
OUT_OF_TIME = "not run: no time was left"


class Matrix(NamedTuple):
    """Shapes to run operations on, the most informative first; the last ones are dropped if time runs out.

    Attributes:
      sizes, rows, dtypes: of the shapes.
      repeats: measured runs of a program.
      calls: calls in a program.
      spread: bytes of arguments to go through before the first ones are used again.
    """

    sizes: Sequence[int] = (4096, 2048, 8192, 576)
    rows: Sequence[int] = (1, 16, 256, 4096)
    dtypes: Sequence[str] = ("bfloat16", "float32", "float16")
    repeats: int = 7
    calls: int = 32
    spread: int = 1 << 27  # more than twice the cache of an H100

    @classmethod
    def tiny(cls) -> Matrix:
        """Shapes for a processor that interprets kernels."""
        return cls(sizes=(64,), rows=(1, 16), dtypes=("float32", "bfloat16"), repeats=2, calls=2, spread=0)

    def batches(self, op: Op) -> Iterator[list[Shape]]:
        """Yields the shapes of one size and dtype at a time."""
        for size, dtype in itertools.product(self.sizes, self.dtypes):
            if shapes := [shape for rows in self.rows if op.only(shape := Shape(rows, size, dtype))]:
                yield shapes


class Roof(NamedTuple):
    """Measured limits of the device.

    Attributes:
      bandwidth: bytes per second.
      launch: seconds of a kernel that only copies a number; None if unknown.
    """

    bandwidth: float
    launch: float | None


class Case(NamedTuple):
    """An implementation on a shape, and its programs under compilation: that of the calls, and one without calls."""

    shape: Shape
    implementation: str
    sets: int
    programs: Future[tuple[Any, Any, float]]


def run_ops(
    ops: Sequence[Op],
    matrix: Matrix,
    roof: Roof,
    budget: Budget,
    progress: Callable[[str], None],
    keep: Callable[[list[Row]], None] = lambda rows: None,
    kernel: str | None = None,
) -> list[Row]:
    """Returns a row for each case, with the reason if it failed; `keep` gets the rows so far, after each batch.

    With `kernel`, only this implementation runs, and plain JAX to compare it with.
    """
    interpreted = jax.default_backend() == "cpu"
    rows: list[Row] = []
    # XLA compiles in parallel; nothing is timed meanwhile.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for op in ops:
            names = [name for name in op.choices.names if interpreted or name != "pallas_interpret"]
            names = [name for name in names if kernel is None or name in ("reference", kernel)]
            refused = {name: why for name in names if (why := _refusal(op, name, matrix)) is not None}
            rows += [{"op": op.name, "implementation": name, "refused": why} for name, why in refused.items()]
            keep(rows)
            runnable = [name for name in names if name not in refused]
            for shapes in matrix.batches(op):
                progress(f"{op.name} {shapes[0].dtype} D={shapes[0].size}")
                rows += _batch(op, shapes, runnable, matrix, roof, budget, pool)
                keep(rows)
    return rows


def _refusal(op: Op, name: str, matrix: Matrix) -> str | None:
    """Reason why an implementation can't run on this machine at all: it is not for it, or its compiler does not work.

    One small program tells, so that a package that does not fit the others is one line and not a failure of every case.
    """
    why = op.choices.refusal(name)
    if why is not None or name not in op.choices.on_gpu:
        return why
    shape = Shape(min(matrix.rows), min(matrix.sizes), matrix.dtypes[0])
    try:
        jax.jit(functools.partial(op.call, name)).lower(*_arguments(op, shape)).compile()
    except ImplementationError:
        return None  # not this shape
    except Exception as error:
        return f"{op.name}: {name!r} does not compile: {reason(error)}"
    return None


def _batch(
    op: Op,
    shapes: list[Shape],
    implementations: list[str],
    matrix: Matrix,
    roof: Roof,
    budget: Budget,
    pool: ThreadPoolExecutor,
) -> list[Row]:
    started = [_start(op, shape, name, matrix, roof, budget, pool) for shape in shapes for name in implementations]
    for found in started:
        if isinstance(found, Case):
            found.programs.exception()  # wait until all are compiled before timing anything
    rows, right = list[Row](), dict[Shape, Row]()
    for found in started:
        row = found if isinstance(found, dict) else _guarded(op, found, matrix, roof, budget, right)
        rows.append(row)
    return rows


def _start(
    op: Op, shape: Shape, name: str, matrix: Matrix, roof: Roof, budget: Budget, pool: ThreadPoolExecutor
) -> Case | Row:
    """Starts the compilation of a program; returns a row if that is impossible."""
    if budget.over("ops"):
        return _row(op, shape, name) | {"not_run": OUT_OF_TIME}
    try:
        start = time.perf_counter()
        arguments = _arguments(op, shape)
        sets = int(np.clip(-(-matrix.spread // op.floor(shape)), 1, matrix.calls))
        programs = (functools.partial(op.call, name), None)
        lowered = [jax.jit(chained(each, matrix.calls, op.in_place)).lower([arguments] * sets) for each in programs]
        spent = time.perf_counter() - start
    except ImplementationError as error:  # an argument that a kernel declares unsupported is not a failure
        return _row(op, shape, name) | {"refused": str(error)}
    except Exception as error:
        return _row(op, shape, name) | {"compiled": False, "error": reason(error)}
    return Case(shape, name, sets, pool.submit(_compile, lowered, spent))


def _compile(lowered: Sequence[Any], before: float) -> tuple[Any, Any, float]:
    """Both programs, and the seconds they took to build; on a GPU as graphs, however few their kernels are."""
    start, options = time.perf_counter(), {"xla_gpu_graph_min_graph_size": 1}
    program, empty = (each.compile(options if jax.default_backend() == "gpu" else None) for each in lowered)
    return program, empty, before + time.perf_counter() - start


def _arguments(op: Op, shape: Shape) -> tuple[Any, ...]:
    return op.make(shape, np.random.default_rng(zlib.crc32(f"{op.name} {shape}".encode())))


def _guarded(op: Op, case: Case, matrix: Matrix, roof: Roof, budget: Budget, right: dict[Shape, Row]) -> Row:
    """Returns a case's row, whatever happens."""
    row = _row(op, case.shape, case.implementation)
    try:
        *programs, row["compile_seconds"] = case.programs.result()
    except Exception as error:
        return row | {"compiled": False, "error": reason(error)}
    row["compiled"] = True
    if budget.over("ops"):
        return row | {"not_run": OUT_OF_TIME}
    try:
        return row | _measured(op, case, programs, matrix, roof, right)
    except Exception as error:
        return row | {"error": reason(error)}


def _row(op: Op, shape: Shape, name: str) -> Row:
    return {"op": op.name, "implementation": name, "dtype": shape.dtype, "D": shape.size, "N": shape.rows}


def _measured(op: Op, case: Case, programs: Sequence[Any], matrix: Matrix, roof: Roof, right: dict[Shape, Row]) -> Row:
    """Measures errors and times. Plain JAX runs first, and the others are compared with it."""
    arguments = _arguments(op, case.shape)
    sets = [arguments, *(jax.tree.map(jnp.array, arguments) for _ in range(case.sets - 1))]  # copies
    found, _ = programs[0](sets)
    row: Row = {"calls": matrix.calls, "sets": case.sets, "floor_us": 1e6 * op.floor(case.shape) / roof.bandwidth}
    try:
        spent = per_call(*(functools.partial(each, sets) for each in programs), matrix.calls, matrix.repeats)
        row |= {"us": 1e6 * spent.median, "us_least": 1e6 * spent.least, "us_most": 1e6 * spent.most}
        row["within_target"] = row["us"] <= 2 * row["floor_us"] + 1e6 * (roof.launch or 0.0)
    except Noise as error:
        row["not_timed"] = str(error)
    if case.implementation == "reference":
        right[case.shape] = {"result": found, "us": row.get("us")}
        wanted = _elsewhere(op, arguments) if case.shape.rows == 16 else None
    else:
        plain = right.get(case.shape, {})
        wanted = plain.get("result")
        row["speedup"] = plain["us"] / row["us"] if plain.get("us") and "us" in row else None
    if wanted is not None:
        error, flips = op.compare(found, wanted, arguments)
        limit = op.tolerance(case.shape.dtype)
        row |= {"max_error": error, "tolerance": limit, "flips": flips, "right": error <= limit and flips == 0}
    return row


def _elsewhere(op: Op, arguments: tuple[Any, ...]) -> Any:
    """The reference's result, computed on the processor to check a device; None without a processor backend."""
    try:
        processor = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
    with jax.default_device(processor):
        found = jax.jit(functools.partial(op.call, "reference"))(*jax.device_put(arguments, processor))
    return jax.device_put(found, jax.devices()[0])  # compared there

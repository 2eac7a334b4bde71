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
import numpy as np

from pallas_kernels.selection import ImplementationError
from scripts.gpu.op_table import Op, Shape
from scripts.gpu.timing import Budget, Overhead, Spread, looped, repeated
from scripts.reporting import reason

Row = dict[str, Any]
OUT_OF_TIME = "not run: no time was left"


class Matrix(NamedTuple):
    """Shapes to run operations on, the most informative first; the last ones are dropped if time runs out.

    Attributes:
      sizes, rows, dtypes: of the shapes.
      repeats: measured runs of a loop.
      loop_seconds: approximate duration of a loop.
    """

    sizes: Sequence[int] = (4096, 2048, 8192, 576)
    rows: Sequence[int] = (1, 16, 256, 4096)
    dtypes: Sequence[str] = ("bfloat16", "float32", "float16")
    repeats: int = 7
    loop_seconds: float = 2e-3

    @classmethod
    def tiny(cls) -> Matrix:
        """Shapes for a processor that interprets kernels."""
        return cls(sizes=(64,), rows=(1, 16), dtypes=("float32", "bfloat16"), repeats=2, loop_seconds=0.0)

    def batches(self, op: Op) -> Iterator[list[Shape]]:
        """Yields the shapes of one size and dtype at a time."""
        for size, dtype in itertools.product(self.sizes, self.dtypes):
            if shapes := [shape for rows in self.rows if op.only(shape := Shape(rows, size, dtype))]:
                yield shapes


class Roof(NamedTuple):
    """Measured limits of the device.

    Attributes:
      bandwidth: bytes per second.
      overhead: time of loops and launches.
    """

    bandwidth: float
    overhead: Overhead


class Case(NamedTuple):
    """An implementation on a shape, and its program under compilation."""

    shape: Shape
    implementation: str
    iterations: int
    program: Future[tuple[Any, float]]


def run_ops(
    ops: Sequence[Op], matrix: Matrix, roof: Roof, budget: Budget, progress: Callable[[str], None]
) -> list[Row]:
    """Returns a row for each case, with the reason if it failed."""
    interpreted = jax.default_backend() == "cpu"
    rows: list[Row] = []
    # XLA compiles in parallel; nothing is timed meanwhile.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for op in ops:
            names = [name for name in op.choices.names if interpreted or name != "pallas_interpret"]
            refused = {name: why for name in names if (why := op.choices.refusal(name)) is not None}
            rows += [{"op": op.name, "implementation": name, "refused": why} for name, why in refused.items()]
            runnable = [name for name in names if name not in refused]
            for shapes in matrix.batches(op):
                progress(f"{op.name} {shapes[0].dtype} D={shapes[0].size}")
                rows += _batch(op, shapes, runnable, matrix, roof, budget, pool)
    return rows


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
            found.program.exception()  # wait until all are compiled before timing anything
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
    expected = max(1e-5, 3 * op.floor(shape) / roof.bandwidth)
    iterations = int(np.clip(matrix.loop_seconds / expected, 4, 100))
    try:
        start = time.perf_counter()
        arguments = _arguments(op, shape)
        lowered = jax.jit(looped(functools.partial(op.call, name), iterations, op.in_place)).lower(*arguments)
        spent = time.perf_counter() - start
    except ImplementationError as error:  # an argument that a kernel declares unsupported is not a failure
        return _row(op, shape, name) | {"refused": str(error)}
    except Exception as error:
        return _row(op, shape, name) | {"compiled": False, "error": reason(error)}
    return Case(shape, name, iterations, pool.submit(_compile, lowered, spent))


def _compile(lowered: Any, before: float) -> tuple[Any, float]:
    """The program, and the seconds it took to build."""
    start = time.perf_counter()
    program = lowered.compile()
    return program, before + time.perf_counter() - start


def _arguments(op: Op, shape: Shape) -> tuple[Any, ...]:
    return op.make(shape, np.random.default_rng(zlib.crc32(f"{op.name} {shape}".encode())))


def _guarded(op: Op, case: Case, matrix: Matrix, roof: Roof, budget: Budget, right: dict[Shape, Row]) -> Row:
    """Returns a case's row, whatever happens."""
    row = _row(op, case.shape, case.implementation)
    try:
        program, row["compile_seconds"] = case.program.result()
    except Exception as error:
        return row | {"compiled": False, "error": reason(error)}
    row["compiled"] = True
    if budget.over("ops"):
        return row | {"not_run": OUT_OF_TIME}
    try:
        return row | _measured(op, case, program, matrix, roof, right)
    except Exception as error:
        return row | {"error": reason(error)}


def _row(op: Op, shape: Shape, name: str) -> Row:
    return {"op": op.name, "implementation": name, "dtype": shape.dtype, "D": shape.size, "N": shape.rows}


def _measured(op: Op, case: Case, program: Any, matrix: Matrix, roof: Roof, right: dict[Shape, Row]) -> Row:
    """Measures errors and times. Plain JAX runs first, and the others are compared with it."""
    arguments = _arguments(op, case.shape)
    found = jax.device_get(program(*arguments))
    spent = repeated(lambda: program(*arguments), matrix.repeats)
    # No operation takes zero time: after subtracting the noisy loop overhead, keep at least a nanosecond.
    net = Spread(*(max(s / case.iterations - roof.overhead.loop, 1e-9) for s in spent))
    floor = op.floor(case.shape) / roof.bandwidth
    row: Row = {
        "us": 1e6 * net.median,
        "us_least": 1e6 * net.least,
        "us_most": 1e6 * net.most,
        "floor_us": 1e6 * floor,
        "iterations": case.iterations,
        "within_target": net.median <= 2 * floor + (roof.overhead.launch or 0.0),
    }
    if case.implementation == "reference":
        right[case.shape] = {"result": found, "us": row["us"]}
        wanted = _elsewhere(op, arguments) if case.shape.rows == 16 else None
    else:
        wanted = right[case.shape]["result"] if case.shape in right else None
        row["speedup"] = right[case.shape]["us"] / row["us"] if case.shape in right else None
    if wanted is not None:
        error, flips = op.compare(found, wanted, jax.device_get(arguments))
        limit = op.tolerance(case.shape.dtype)
        row |= {"max_error": error, "tolerance": limit, "flips": flips, "right": error <= limit and flips == 0}
    return row


def _elsewhere(op: Op, arguments: tuple[Any, ...]) -> Any:
    """The reference's result on the processor, to check the reference on a device; None without a processor backend."""
    try:
        processor = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
    with jax.default_device(processor):
        return jax.device_get(jax.jit(functools.partial(op.call, "reference"))(*jax.device_put(arguments, processor)))

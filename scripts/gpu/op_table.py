"""The operations that verify_gpu.py checks.

A new one is an entry in `OPS`: how to make its arguments, run it, count the bytes it must move, and compare two
results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import exit_project as project
from pallas_kernels import exit_step as step
from pallas_kernels import kv_fill as fill
from pallas_kernels.common import NormSettings, NormWeights
from pallas_kernels.selection import Choices

HIDDEN = 128
"""Width of the routers."""
EPS, LAYER, MIN_LAYERS, THRESHOLD = 1e-5, 11, 8, 0.5
EXACT = 1e-5
"""Error up to which float32 numbers count as equal; scores this close to the threshold may fall on either side of
it."""


class Shape(NamedTuple):
    """Rows of one size in a dtype."""

    rows: int
    size: int
    dtype: str

    @property
    def bytes(self) -> int:
        """Bytes of one row."""
        return self.size * jnp.dtype(self.dtype).itemsize


class Difference(NamedTuple):
    """Difference between a result and the reference's.

    Attributes:
      error: the largest error, relative to the larger of 1 and the number's size; infinite if only one of them is NaN.
      flips: decisions that differ although nothing was close, and changed numbers that had to stay.
    """

    error: float
    flips: int


Arguments = tuple[Any, ...]


class Op(NamedTuple):
    """An operation to check.

    Attributes:
      name: name in results.
      choices: its implementations.
      make: makes arguments for a shape from a seeded generator; the first argument is the rows.
      call: runs an implementation, given its name and the arguments.
      floor: bytes that must be read and written for a shape, each once.
      compare: compares a result with the reference's, given the arguments.
      in_place: the argument whose place the result takes, as in an engine; None for new arrays.
      tolerance: largest error of a correct result, by dtype; None for `EXACT`.
      only: whether a shape is worth running.
    """

    name: str
    choices: Choices
    make: Callable[[Shape, np.random.Generator], Arguments]
    call: Callable[..., Any]
    floor: Callable[[Shape], int]
    compare: Callable[[Any, Any, Arguments], Difference]
    in_place: int | None = None
    tolerance: Callable[[str], float] = lambda dtype: EXACT
    only: Callable[[Shape], bool] = lambda shape: True


def rounding(dtype: str) -> float:
    """Error of a few roundings in a dtype."""
    return max(EXACT, 4 * float(jnp.finfo(dtype).eps))


def worst(found: Any, wanted: Any) -> float:
    """The largest error between two arrays, see `Difference`; computed on the device."""
    return float(_worst(found, wanted)) if found.size else 0.0


@jax.jit
def _worst(found: jax.Array, wanted: jax.Array) -> jax.Array:
    a, b = found.astype(jnp.float32), wanted.astype(jnp.float32)
    off = jnp.abs(a - b) / jnp.maximum(1.0, jnp.abs(b))
    both = jnp.isnan(a) & jnp.isnan(b)
    return jnp.max(jnp.where(both, 0.0, jnp.where(jnp.isnan(off), jnp.inf, off)))


@jax.jit
def _changed(found: jax.Array, before: jax.Array, stays: jax.Array) -> jax.Array:
    """Counts the numbers that changed in the rows, of the leading axis, that had to stay."""
    where = jnp.broadcast_to(stays.reshape(-1, *(1,) * (found.ndim - 1)), found.shape)
    return jnp.sum(where & (found != before), dtype=jnp.int32)


@functools.cache
def _normal(rows: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, size), np.float32)


def states(shape: Shape) -> jax.Array:
    """Rows of different scales that are not centred on zero."""
    scale = np.exp(np.linspace(-1.0, 1.0, shape.rows, dtype=np.float32))[:, None]
    return jnp.asarray(_normal(shape.rows, shape.size) * scale + np.float32(0.1), shape.dtype)


def _drawn(random: np.random.Generator, shape: tuple[int, ...], scale: float, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.float32(scale) * random.standard_normal(shape, np.float32), dtype)


# exit_step


def _step_arguments(shape: Shape, random: np.random.Generator) -> Arguments:
    down = _drawn(random, (shape.size, HIDDEN), 2 * shape.size**-0.5)
    up = _drawn(random, (HIDDEN,), 4 * HIDDEN**-0.5)
    masks = (jnp.asarray(random.random(shape.rows) < 0.9) for _ in range(2))
    rows = step.ExitRows(*masks, jnp.asarray(random.integers(0, LAYER, shape.rows), jnp.int32))
    router = step.Router(down, _drawn(random, (HIDDEN,), 0.1), up, jnp.float32(0.1))
    return states(shape), router, step.Gate(jnp.float32(THRESHOLD), LAYER, jnp.int32(MIN_LAYERS)), rows


def _step(
    implementation: str, x: jax.Array, router: step.Router, gate: step.Gate, rows: step.ExitRows
) -> step.ExitStep:
    gate = gate._replace(layer=LAYER)  # static, as in an engine
    return step.exit_step(x, router, gate, rows, eps=EPS, implementation=implementation)


def _step_bytes(shape: Shape) -> int:
    return shape.rows * shape.bytes + 4 * (shape.size + 2) * HIDDEN + 16 * shape.rows


def _step_difference(found: step.ExitStep, wanted: step.ExitStep, _: Arguments) -> Difference:
    clear = np.abs(np.asarray(wanted.scores) - THRESHOLD) > EXACT
    flips = sum(
        int(np.sum(clear & (np.asarray(getattr(found, name)) != np.asarray(getattr(wanted, name)))))
        for name in ("exits", "active", "exit_layers")
    )
    flips += bool(found.any_exits) != bool(np.any(found.exits))
    flips += bool(found.any_active) != bool(np.any(found.active))
    return Difference(worst(found.scores, wanted.scores), flips)


# exit_project


def _project_arguments(affine: bool, shape: Shape, random: np.random.Generator) -> Arguments:
    head = None
    if affine:
        factor = _drawn(random, (shape.size, shape.size), shape.size**-0.5, shape.dtype)
        head = project.AffineHead((factor,), _drawn(random, (shape.size,), 0.1, shape.dtype))
    norm = NormWeights(_drawn(random, (shape.size,), 0.1, shape.dtype) + jnp.asarray(1, shape.dtype))
    exits = jnp.arange(shape.rows) % 2 == 0
    return states(shape), head, norm, exits, jnp.full((shape.rows, shape.size), 0.5, shape.dtype)


def _project(implementation: str, *arguments: Any) -> jax.Array:
    return project.exit_project(*arguments, settings=NormSettings(EPS), implementation=implementation)


def _project_bytes(affine: bool, shape: Shape) -> int:
    exiting = -(-shape.rows // 2)
    head = (shape.rows + exiting + shape.size + 1) * shape.bytes if affine else 0
    return 2 * exiting * shape.bytes + shape.bytes + shape.rows + head


def _project_difference(found: jax.Array, wanted: jax.Array, given: Arguments) -> Difference:
    return Difference(worst(found, wanted), int(_changed(found, given[4], ~given[3])))


def _projection(name: str, affine: bool, only: Callable[[Shape], bool] = lambda shape: True) -> Op:
    return Op(
        name,
        project.IMPLEMENTATIONS,
        functools.partial(_project_arguments, affine),
        _project,
        functools.partial(_project_bytes, affine),
        _project_difference,
        in_place=4,
        tolerance=rounding,
        only=only,
    )


# kv_fill: one token in each of N rows; every other row is filled


_HEADS, _CHANNELS = 8, 128


def _left(shape: Shape) -> int:
    """Rows that the cache fill writes: every other one."""
    return -(-shape.rows // 2)


def _fill_arguments(shape: Shape, random: np.random.Generator) -> Arguments:
    norm = NormWeights(_drawn(random, (shape.size,), 0.1, shape.dtype) + jnp.asarray(1, shape.dtype))
    projection = _drawn(random, (_HEADS, 2, _CHANNELS, shape.size), shape.size**-0.5, shape.dtype)
    angles = jnp.asarray(random.uniform(0, 6, (shape.rows, 1, _CHANNELS // 2)), jnp.float32)
    buffer = jnp.full((shape.rows, _HEADS, 1, _CHANNELS), 0.5, shape.dtype)
    written = (jnp.arange(shape.rows) % 2 == 0)[:, None]
    rotary = fill.Rotary(jnp.cos(angles), jnp.sin(angles))
    weights = fill.KVWeights(norm, projection)
    return states(shape)[:, None], weights, rotary, written, fill.KVRows(buffer, buffer)


def _fill(implementation: str, *arguments: Any) -> fill.KVRows:
    return fill.kv_fill(*arguments, settings=fill.Settings(NormSettings(EPS)), implementation=implementation)


def _fill_bytes(shape: Shape) -> int:
    row = 2 * _HEADS * _CHANNELS * jnp.dtype(shape.dtype).itemsize
    return _left(shape) * (shape.bytes + row + 4 * _CHANNELS) + shape.size * row + shape.bytes + shape.rows


def _fill_difference(found: fill.KVRows, wanted: fill.KVRows, given: Arguments) -> Difference:
    *_, filled, before = given
    flips = sum(int(_changed(a, b, ~filled[:, 0])) for a, b in zip(found, before, strict=True))
    return Difference(max(worst(a, b) for a, b in zip(found, wanted, strict=True)), flips)


OPS = (
    Op("exit_step", step.IMPLEMENTATIONS, _step_arguments, _step, _step_bytes, _step_difference),
    _projection("exit_project", affine=False),
    Op(
        "kv_fill",
        fill.IMPLEMENTATIONS,
        _fill_arguments,
        _fill,
        _fill_bytes,
        _fill_difference,
        in_place=4,
        tolerance=rounding,
    ),
    _projection("exit_project, affine head", affine=True, only=lambda s: s.size <= 4096 and s.rows <= 256),
)
"""In the order of running."""

"""Timing for verify_gpu.py: loops inside one program, memory bandwidth, and the time budget."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

DATA_SHEET = {
    "NVIDIA H100 80GB HBM3": 3352,
    "NVIDIA H100 PCIe": 2039,
    "NVIDIA H200": 4800,
    "NVIDIA A100-SXM4-80GB": 2039,
    "NVIDIA A100-SXM4-40GB": 1555,
}
"""GB/s in the makers' data sheets, by `device_kind`."""


class Spread(NamedTuple):
    """Seconds: the median of several runs, and the extremes."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Median and extremes of some seconds."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])


def seconds(run: Callable[[], Any]) -> float:
    """Wall clock until a run's results are available."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def repeated(run: Callable[[], Any], repeats: int) -> Spread:
    """Times several runs after an uncounted one."""
    jax.block_until_ready(run())
    return Spread.of(seconds(run) for _ in range(repeats))


def looped(call: Callable[..., Any], iterations: int, in_place: int | None = None) -> Callable[..., Any]:
    """Returns a function that runs ``call(*arguments)`` `iterations` times on the device and returns the last result.

    Args:
      in_place: the argument whose place each result takes; None if results are new arrays.
    """

    def run(*arguments: Any) -> Any:
        def body(_: Any, carry: tuple[tuple[Any, ...], Any]) -> tuple[tuple[Any, ...], Any]:
            given, _ = carry
            result = call(*given)
            # Without this dependence on the results, a compiler would move the call out of the loop.
            given = (touched(given[0], result), *given[1:])
            if in_place is None:
                return given, result
            return (*given[:in_place], result, *given[in_place + 1 :]), ()

        shapes = jax.eval_shape(call, *arguments) if in_place is None else ()
        given, result = lax.fori_loop(0, iterations, body, (arguments, _zeros(shapes)))
        return result if in_place is None else given[in_place]

    return run


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def touched(x: jax.Array, result: Any) -> jax.Array:
    """Returns `x` unchanged, but for a compiler it depends on the first number of every result."""
    spoilt = jnp.isnan(sum((_first(leaf) for leaf in jax.tree.leaves(result)), jnp.float32(0)))
    number = jnp.where(spoilt, jnp.nan, _first(x)).astype(x.dtype)
    return lax.dynamic_update_slice(x, number.reshape((1,) * x.ndim), (0,) * x.ndim)


def _first(x: jax.Array) -> jax.Array:
    return lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(()).astype(jnp.float32)


class Overhead(NamedTuple):
    """Seconds that don't belong to an operation.

    Attributes:
      loop: one iteration of `looped` around almost nothing: counting, and the number that `touched` writes.
      launch: one kernel that copies a number; None if it can't be measured.
    """

    loop: float
    launch: float | None


def overhead(iterations: int, repeats: int) -> Overhead:
    """Measures both, with loops like those around operations."""
    x, chain = jnp.ones((1, 128), jnp.float32), 8

    def spent(call: Callable[[jax.Array], jax.Array]) -> float:
        program = jax.jit(looped(call, iterations))
        return repeated(lambda: program(x), repeats).median / iterations

    def kernels(x: jax.Array) -> jax.Array:
        for _ in range(chain):
            x = _copy_a_number(x)
        return x

    loop = spent(lambda x: x[:, :1])
    try:
        return Overhead(loop, max(0.0, spent(kernels) - loop) / chain)
    except Exception:  # no Pallas for this device
        return Overhead(loop, None)


def _copy_a_number(x: jax.Array) -> jax.Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plt

    def kernel(x_ref: Any, out_ref: Any) -> None:
        at = pl.ds(0, 1)
        plt.store(out_ref.at[at], plt.load(x_ref.at[at]))

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((1,), x.dtype),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=jax.default_backend() == "cpu",
    )(x.reshape(-1)).reshape(1, 1)


def bandwidth(size: int, repeats: int) -> float:
    """Bytes per second read by sums over rows of a float32 array of `size` bytes; the best of three shapes."""
    summed, count = jax.jit(lambda x: jnp.sum(x, axis=1)), 8

    def rate(columns: int) -> float:
        x = jax.random.normal(jax.random.key(0), (max(1, size // (4 * columns)), columns), jnp.float32)
        return count * x.nbytes / repeated(lambda: [summed(x) for _ in range(count)], repeats).median

    return max(rate(columns) for columns in (1 << 10, 1 << 13, 1 << 16))


class Budget:
    """Seconds for all sections, and the share of them by the end of each section."""

    ENDS = {"ops": 0.36, "decode": 0.7, "prefill": 0.92, "smollm2": 1.0}  # noqa: RUF012

    def __init__(self, minutes: float, sections: Iterable[str]) -> None:
        self.start, self.seconds = time.monotonic(), 60 * minutes
        self._sections = list(sections)

    def over(self, section: str) -> bool:
        """Whether a section has used its time. The last section that runs may use up what the others left."""
        share = 1.0 if section == self._sections[-1] else self.ENDS[section]
        return self.spent > share * self.seconds

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

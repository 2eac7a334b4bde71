"""How verify_gpu.py measures: loops inside one program, what memory gives, and how long it may all take."""

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
"""GB/s that makers promise, by `device_kind`."""


class Spread(NamedTuple):
    """Seconds: the median of several runs, and the extremes."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of seconds."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])


def seconds(run: Callable[[], Any]) -> float:
    """Wall clock until a run's results are there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def repeated(run: Callable[[], Any], repeats: int) -> Spread:
    """After one run that is not counted."""
    jax.block_until_ready(run())
    return Spread.of(seconds(run) for _ in range(repeats))


def looped(call: Callable[..., Any], iterations: int, in_place: int | None = None) -> Callable[..., Any]:
    """A function that runs ``call(*arguments)`` so many times on the device and returns the last result.

    Args:
      in_place: the argument that each result takes the place of; None where results are new arrays.
    """

    def run(*arguments: Any) -> Any:
        def body(_: Any, carry: tuple[tuple[Any, ...], Any]) -> tuple[tuple[Any, ...], Any]:
            given, _ = carry
            result = call(*given)
            # A compiler would take the call out of the loop if its arguments did not depend on its results.
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
    """`x` as it is, as far as anybody can see; to a compiler it depends on every first number of the result."""
    spoilt = jnp.isnan(sum((_first(leaf) for leaf in jax.tree.leaves(result)), jnp.float32(0)))
    number = jnp.where(spoilt, jnp.nan, _first(x)).astype(x.dtype)
    return lax.dynamic_update_slice(x, number.reshape((1,) * x.ndim), (0,) * x.ndim)


def _first(x: jax.Array) -> jax.Array:
    return lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(()).astype(jnp.float32)


class Overhead(NamedTuple):
    """Seconds that are no operation's own.

    Attributes:
      loop: an iteration of `looped` around next to nothing: counting, and the number that `touched` writes.
      launch: one kernel that copies a number; None where it can't be had.
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
    """Bytes a second that summing up rows of a float32 array of `size` bytes reads; the best of three shapes."""
    summed, count = jax.jit(lambda x: jnp.sum(x, axis=1)), 8

    def rate(columns: int) -> float:
        x = jax.random.normal(jax.random.key(0), (max(1, size // (4 * columns)), columns), jnp.float32)
        return count * x.nbytes / repeated(lambda: [summed(x) for _ in range(count)], repeats).median

    return max(rate(columns) for columns in (1 << 10, 1 << 13, 1 << 16))


class Budget:
    """Seconds that all may take, and the share of them by the end of each section."""

    ENDS = {"ops": 0.36, "decode": 0.7, "prefill": 0.92, "smollm2": 1.0}  # noqa: RUF012

    def __init__(self, minutes: float, sections: Iterable[str]) -> None:
        self.start, self.seconds = time.monotonic(), 60 * minutes
        self._sections = list(sections)

    def over(self, section: str) -> bool:
        """Whether a section has had its time. The last of those that run may use up what the others left."""
        share = 1.0 if section == self._sections[-1] else self.ENDS[section]
        return self.spent > share * self.seconds

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.start

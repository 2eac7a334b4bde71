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


def looped(
    call: Callable[..., Any], feed: Callable[[tuple[Any, ...], Any], tuple[Any, ...]], iterations: int
) -> Callable[..., Any]:
    """A function that runs ``call(*arguments)`` so many times on the device and returns the last result.

    Args:
      feed: the arguments of the next run, from this one's and its result. They have to depend on the result, or a
        compiler may take the call out of the loop.
    """

    def run(*arguments: Any) -> Any:
        empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(call, *arguments))

        def body(_: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            result = call(*carry[0])
            return feed(carry[0], result), result

        return lax.fori_loop(0, iterations, body, (arguments, empty))[1]

    return run


def touched(x: jax.Array, result: Any) -> jax.Array:
    """`x` as it is, as far as anybody can see; to a compiler it depends on every first number of the result."""
    numbers = [jnp.ravel(leaf)[0].astype(jnp.float32) for leaf in jax.tree.leaves(result)]
    at = (0,) * x.ndim
    spoilt = jnp.isnan(sum(numbers, jnp.float32(0)))
    return x.at[at].set(jnp.where(spoilt, jnp.nan, x[at].astype(jnp.float32)).astype(x.dtype))


def launch_seconds(iterations: int, repeats: int) -> float:
    """A run of the loop with nothing in it but the one number that `touched` writes: an almost empty kernel."""
    x = jnp.ones((16, 128), jnp.float32)
    program = jax.jit(looped(lambda x: x[0, 0], lambda given, result: (touched(given[0], result),), iterations))
    return repeated(lambda: program(x), repeats).median / iterations


def bandwidth(size: int, repeats: int) -> float:
    """Bytes a second that summing up rows of a float32 array of `size` bytes reads; the best of three shapes."""
    summed, count = jax.jit(lambda x: jnp.sum(x, axis=1)), 8

    def rate(columns: int) -> float:
        x = jax.random.normal(jax.random.key(0), (max(1, size // (4 * columns)), columns), jnp.float32)
        return count * x.nbytes / repeated(lambda: [summed(x) for _ in range(count)], repeats).median

    return max(rate(columns) for columns in (1 << 10, 1 << 13, 1 << 16))


class Budget:
    """Seconds that all may take, and the share of them by the end of each section."""

    ENDS = {"ops": 0.4, "decode": 0.78, "prefill": 0.93, "smollm2": 1.0}  # noqa: RUF012

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

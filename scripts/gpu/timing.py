"""Timing for verify_gpu.py: many calls in one program, memory bandwidth, and the time budget."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
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


class Noise(Exception):
    """What was timed takes no longer than nothing at all, in at least one run."""


def chained(call: Callable[..., Any] | None, calls: int, in_place: int | None = None) -> Callable[..., Any]:
    """Returns a program of `calls` calls, one after the other and without a loop.

    It returns the last result, and a number of every other one: what nobody reads, compilers remove. Results in place
    are read by the next call; reading them later would make a compiler copy them.

    It takes several tuples of arguments and uses them in turn. With enough of them, a call finds nothing of the one
    before in the device's cache, as in a model, where all other weights are read between two uses. Without a call, the
    same program does nothing: what it takes does not belong to the calls.

    Args:
      in_place: the argument whose place each result takes; None if results are new arrays.
    """

    def run(sets: Sequence[tuple[Any, ...]]) -> Any:
        result, numbers = () if in_place is None else sets[0][in_place], []
        for number in range(calls):
            given = list(sets[number % len(sets)])
            # The barrier makes every call wait for the one before.
            given[0], result = lax.optimization_barrier((given[0], result))
            if in_place is None:
                numbers.append(sum((_first(leaf) for leaf in jax.tree.leaves(result)), jnp.float32(0)))
            else:
                given[in_place] = result
            result = given[in_place or 0] if call is None else call(*given)
        return result, jnp.stack(numbers) if numbers else ()

    return run


def _first(x: jax.Array) -> jax.Array:
    return lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(()).astype(jnp.float32)


def per_call(run: Callable[[], Any], empty: Callable[[], Any], calls: int, repeats: int) -> Spread:
    """Seconds of one of `calls` calls: runs less runs of the program without calls, in turn.

    Raises:
      Noise: a run took no longer than one without calls.
    """
    for program in (run, empty, run, empty):  # XLA makes a graph at the second run
        jax.block_until_ready(program())
    found = Spread.of((seconds(run) - seconds(empty)) / calls for _ in range(repeats))
    if found.least <= 0:
        raise Noise(
            f"{1e6 * found.median:.2f} µs is within the noise, {1e6 * found.least:.2f} to {1e6 * found.most:.2f}"
        )
    return found


def launch_seconds(repeats: int) -> float | None:
    """Seconds that one kernel in a program takes if it only copies a number; None if that can't be measured."""
    x, calls = jnp.ones((1, 128), jnp.float32), 64
    try:
        programs = [jax.jit(chained(call, calls)) for call in (_copy_a_number, None)]
        return per_call(*(functools.partial(program, [(x,)]) for program in programs), calls, repeats).median
    except Exception:  # noise, or no Pallas for this device
        return None


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
    )(x.reshape(-1))


def bandwidth(size: int, repeats: int) -> float:
    """Bytes per second read by sums over rows of a float32 array of `size` bytes; the best of three shapes."""
    summed, count = jax.jit(lambda x: jnp.sum(x, axis=1)), 8

    def rate(columns: int) -> float:
        x = jax.random.normal(jax.random.key(0), (max(1, size // (4 * columns)), columns), jnp.float32)
        return count * x.nbytes / repeated(lambda: [summed(x) for _ in range(count)], repeats).median

    return max(rate(columns) for columns in (1 << 10, 1 << 13, 1 << 16))


class Budget:
    """Seconds for all sections, and the share of them by the end of each section."""

    ENDS = {"decode": 0.35, "prefill": 0.5, "ops": 0.95, "smollm2": 1.0}  # noqa: RUF012

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

"""The time that memory takes: all cores together read as many bytes as a step does."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_MOST = 256e6  # bytes of a core's own array; more are read by going through it again


def reader(count: float) -> Callable[[], float]:
    """Seconds in which `count` bytes are read, each core its part, by looking for the largest number."""
    cores = os.cpu_count() or 1
    size = min(count / cores, _MOST)
    parts = [np.ones(int(size / 4), np.float32) for _ in range(cores)]
    pool = ThreadPoolExecutor(cores)

    def run() -> float:
        list(pool.map(np.max, parts))  # what nobody touched for a while may be far away
        start = time.perf_counter()
        list(pool.map(np.max, parts))
        return (time.perf_counter() - start) * count / sum(part.nbytes for part in parts)

    return run

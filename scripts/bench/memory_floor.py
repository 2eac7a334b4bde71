"""The time that memory takes: all cores together read as many bytes as a step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_MOST = 256e6  # largest array per core in bytes; larger counts are read by repeated passes


def reader(count: float) -> Callable[[], float]:
    """Returns a function that measures the seconds to read `count` bytes on all cores, with a maximum over arrays."""
    cores = os.cpu_count() or 1
    size = min(count / cores, _MOST)
    parts = [np.ones(int(size / 4), np.float32) for _ in range(cores)]
    pool = ThreadPoolExecutor(cores)

    def run() -> float:
        list(pool.map(np.max, parts))  # warm up: data that was not used recently may be far away
        start = time.perf_counter()
        list(pool.map(np.max, parts))
        return (time.perf_counter() - start) * count / sum(part.nbytes for part in parts)

    return run

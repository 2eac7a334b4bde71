"""Progress bars on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bars(**options: Any) -> Iterator[Callable[[str, int, int], None]]:
    """A callback ``progress(stage, done, total)`` that draws a bar for each stage, by default only on a terminal.

    If the total is known, the bar shows the time left. The rate counts from the stage's first report, because earlier
    work (of an interrupted run, for example) took no time in this run.

    Args:
      options: tqdm's, such as ``unit="B"``, or ``disable=False`` to draw bars always.
    """
    from tqdm import tqdm

    bars: dict[str, tqdm] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            _close(bars)
            settings: dict[str, Any] = {"disable": None} | options
            bars[stage] = tqdm(total=total or None, initial=done, desc=stage, **settings)
        bars[stage].update(done - bars[stage].n)

    try:
        yield progress
    finally:
        _close(bars)


def _close(bars: dict[str, Any]) -> None:
    for bar in bars.values():
        bar.close()

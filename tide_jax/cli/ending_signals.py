"""SIGTERM and SIGHUP in the project's commands: they clean up as after Ctrl-C, and end with the signal's exit code."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tide_jax.cli.interrupts import leave

_NAMES = ("SIGTERM", "SIGHUP")  # docker stop, kill, batch systems; a terminal that is closed


class Ended(KeyboardInterrupt):
    """The process was asked to end. Whatever cleans up after an interrupt cleans up after it."""


def until_ended(run: Callable[[], int], *, as_program: bool) -> int:
    """Runs a command; returns its exit code, or 128 and the signal's number where one ended it.

    Args:
      as_program: the process is the command's: it ends here after a signal, without the interpreter's shutdown, which
        would take XLA's client from under its compiler's threads.
    """
    came = list[int]()
    try:
        with _raising(came):
            return run()
    except BaseException:  # libraries make other exceptions of it
        if not came:
            raise
    with contextlib.suppress(OSError):
        sys.stderr.write(f"ended by {signal.Signals(came[0]).name}\n")
        sys.stderr.flush()
    code = 128 + came[0]
    if as_program:
        leave(code)
    return code


@contextlib.contextmanager
def _raising(came: list[int]) -> Iterator[None]:
    """Has signals raise `Ended` once, and end the process at once if they come again. Ignored ones (nohup) stay so."""
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():  # others can't take signals
        numbers = []
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: Any) -> None:
        came.append(number)
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise Ended

    try:
        for number in numbers:
            signal.signal(number, end)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

"""SIGTERM and SIGHUP in the project's commands: clean up as for Ctrl-C, then exit with the signal's code."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tide_jax.cli.interrupts import end_process

_NAMES = ("SIGTERM", "SIGHUP")  # SIGTERM: docker stop, kill, batch systems; SIGHUP: a closed terminal


class EndingSignal(KeyboardInterrupt):
    """A signal asked the process to end; a KeyboardInterrupt, so code that cleans up after one handles it."""


def run_with_signals(run: Callable[[], int], *, as_program: bool) -> int:
    """Runs a command; returns its exit code, or 128 plus the number of the signal that ended it.

    Args:
      as_program: the process belongs to the command. After a signal it ends here, without the interpreter's shutdown,
        which would destroy XLA's client while its compiler's threads still use it.
    """
    received = list[int]()
    try:
        with _raise_on_signals(received):
            return run()
    except BaseException:  # libraries may turn it into other exceptions
        if not received:
            raise
    with contextlib.suppress(OSError):
        sys.stderr.write(f"ended by {signal.Signals(received[0]).name}\n")
        sys.stderr.flush()
    code = 128 + received[0]
    if as_program:
        end_process(code)
    return code


@contextlib.contextmanager
def _raise_on_signals(received: list[int]) -> Iterator[None]:
    """Makes the first signal raise `EndingSignal` and a second one end the process.

    Ignored signals (nohup) stay ignored.
    """
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        numbers = []
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: Any) -> None:
        received.append(number)
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        raise EndingSignal

    try:
        for number in numbers:
            signal.signal(number, end)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

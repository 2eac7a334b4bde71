"""Ctrl-C in the project's commands: one line and exit code 130, whenever it comes.

Python's KeyboardInterrupt alone does not do: extension modules that are being imported turn it into ImportError, and
what is raised in a destructor is printed and dropped.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from typing import NoReturn

INTERRUPTED = 130  # as of a program that the signal ends


_PATIENCE = 1.0  # seconds in which a second signal is taken for the first: keys bounce, shells repeat


class Interrupts:
    """The handler of SIGINT in a process that runs one of the commands.

    Until `begin_work` a signal ends the process at once: only modules are imported by then, and there is nothing to
    clean up. From then on the first signal raises KeyboardInterrupt, again where that gets lost, and a later one ends
    the process at once.
    """

    def __init__(self) -> None:
        self._working = False
        self._came: float | None = None

    @classmethod
    def install(cls) -> None:
        """Takes the signal over, but where it is ignored, as under nohup."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, cls())

    @classmethod
    def installed(cls) -> Interrupts | None:
        """The handler that `install` left, if it did."""
        found = signal.getsignal(signal.SIGINT)
        return found if isinstance(found, cls) else None

    @property
    def came(self) -> bool:
        """Whether there was a signal. Libraries may have made another exception of it."""
        return self._came is not None

    def __call__(self, number: int, frame: object) -> None:
        if not self._working:
            leave_interrupted()
        if self._came is None:
            self._came = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self._came > _PATIENCE:
            leave_interrupted()

    def begin_work(self) -> None:
        """From now on there are files to clean up after an interrupt."""
        report = sys.unraisablehook

        def raise_again(what: sys.UnraisableHookArgs) -> None:
            if not issubclass(what.exc_type, KeyboardInterrupt):
                report(what)
                return
            self._came = None
            # Raised at once it would be raised in this function, and dropped again.
            again = threading.Timer(0.05, _thread.interrupt_main)
            again.daemon = True
            again.start()

        sys.unraisablehook = raise_again
        self._working = True

    def end_work(self) -> None:
        """What a signal would interrupt from now on is the interpreter's shutdown."""
        self._working = False


def leave_interrupted() -> NoReturn:
    """Ends the process here, with one line on standard error."""
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    leave(INTERRUPTED)


def leave(code: int) -> NoReturn:
    """Ends the process without the interpreter's shutdown.

    An interrupt stops waiting for XLA's compiler, but not its threads: they go on, and the shutdown takes XLA's client
    from under them, which ends in SIGSEGV. There is no way to wait for them.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)

"""Ctrl-C in the project's commands: one line and exit code 130, at any time.

Python's KeyboardInterrupt alone is not enough. Extension modules turn it into ImportError while they are imported, and
an exception raised in a destructor is printed and dropped.
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

INTERRUPTED = 130  # as for a program that SIGINT ends


_REPEAT_SECONDS = 1.0  # seconds in which a second signal counts as the first: keys bounce, shells repeat signals


class Interrupts:
    """The handler of SIGINT in a process that runs one of the commands.

    Before `begin_work`, a signal ends the process at once: only imports have run, and there is nothing to clean up.
    After it, the first signal raises KeyboardInterrupt, again if the exception gets lost. A later signal ends the
    process at once.
    """

    def __init__(self) -> None:
        self._working = False
        self._received_at: float | None = None

    @classmethod
    def install(cls) -> None:
        """Handles SIGINT, unless it is ignored, as under nohup."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, cls())

    @classmethod
    def current(cls) -> Interrupts | None:
        """The handler that `install` set, or None."""
        handler = signal.getsignal(signal.SIGINT)
        return handler if isinstance(handler, cls) else None

    @property
    def has_signal(self) -> bool:
        """Whether there was a signal; libraries may have turned its exception into another one."""
        return self._received_at is not None

    def __call__(self, number: int, frame: object) -> None:
        if not self._working:
            end_interrupted_process()
        if self._received_at is None:
            self._received_at = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self._received_at > _REPEAT_SECONDS:
            end_interrupted_process()

    def begin_work(self) -> None:
        """From now on, an interrupt must clean up files."""
        report = sys.unraisablehook

        def raise_again(unraisable: sys.UnraisableHookArgs) -> None:
            if not issubclass(unraisable.exc_type, KeyboardInterrupt):
                report(unraisable)
                return
            self._received_at = None
            # Raising it now would raise it inside this hook, where it would be dropped again.
            again = threading.Timer(0.05, _thread.interrupt_main)
            again.daemon = True
            again.start()

        sys.unraisablehook = raise_again
        self._working = True

    def end_work(self) -> None:
        """From now on, a signal would only interrupt the interpreter's shutdown."""
        self._working = False


def end_interrupted_process() -> NoReturn:
    """Ends the process here, with one line on standard error."""
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    end_process(INTERRUPTED)


def end_process(code: int) -> NoReturn:
    """Ends the process without the interpreter's shutdown.

    An interrupt ends the wait for XLA's compiler but not the compiler's threads. They continue, and the shutdown
    destroys XLA's client while they use it, which ends in SIGSEGV. There is no way to wait for them.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)

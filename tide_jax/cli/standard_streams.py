"""Standard output and standard error of a program that somebody else started: closed, full, or of another encoding."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from tide_jax.errors import TideError


def prepare_streams() -> None:
    """Makes the process's streams fit for text.

    Characters that standard output's encoding lacks come out as question marks. A closed standard error swallows what
    is written to it. The numbers of closed streams are taken, so that no file opened later gets a stream's number and
    with it what libraries print.

    Raises:
      TideError: standard output is closed.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    if sys.stdout is None:
        raise TideError("standard output is closed: send it to a file, or to /dev/null if nobody reads it")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def say(text: str) -> None:
    """Prints to standard error, if somebody can read it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # full, or its reader has gone: no reason to lose the result
        drop(sys.stderr)


def drop(stream: TextIO) -> None:
    """Gives up what could not be written: the interpreter would try again as it ends, and complain."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())

"""Standard output and error may be closed, full or of another encoding when someone else starts the program."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from tide_jax.errors import TideError


def prepare_streams() -> None:
    """Prepares the process's streams for text.

    Characters that standard output's encoding lacks are printed as question marks. A closed standard error discards its
    output. The numbers of closed streams are occupied; otherwise a file opened later could get such a number, and then
    receive what libraries print.

    Raises:
      TideError: standard output is closed.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 open as long as the process lives
    if sys.stdout is None:
        raise TideError("standard output is closed: send it to a file, or to /dev/null if nobody reads it")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def print_to_stderr(text: str) -> None:
    """Prints to standard error, if it can be written."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # full or closed by its reader: no reason to lose the result
        discard_output(sys.stderr)


def discard_output(stream: TextIO) -> None:
    """Discards what could not be written; otherwise the interpreter would retry at exit and complain."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())

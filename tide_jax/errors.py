"""Exceptions for a user's mistakes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

_MAX_PROBLEMS = 3
_PROBLEM_WIDTH = 80
_MAX_LENGTH = 300
_SEARCHED_LENGTH = 2000  # longer messages are cut anyway
_FOLDERS = re.compile(r"/(?:[^/\s]+/)+(?=[^/\s])")  # the folders before the last name of a path


class TideError(ValueError):
    """Bad input: one line that says what was wrong, what was expected and what to do.

    The command line prints it without a traceback and exits with status 2. A message of more than 300 characters first
    loses the folders of the files that it names, then its middle, because the start says what was wrong and the end
    what to do.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        if len(text) > _MAX_LENGTH:
            text = _FOLDERS.sub(".../", text[:_SEARCHED_LENGTH]) + text[_SEARCHED_LENGTH:]
        if len(text) > _MAX_LENGTH:
            end = _MAX_LENGTH // 3
            text = f"{shorten(text, _MAX_LENGTH - end - 1)} {' '.join(text[-end:].split())}"
        super().__init__(text)


class GuaranteeError(TideError):
    """No setting qualifies for the promise: there are too few texts, or none passed the test."""


def join_problems(problems: Sequence[str], count: int = _MAX_PROBLEMS, width: int = _PROBLEM_WIDTH) -> str:
    """The first `count` problems, each cut to `width` characters, and the number of further ones, on one line."""
    more = len(problems) - count
    problems_shown = "; ".join(shorten(problem, width) for problem in problems[:count])
    return f"{problems_shown}; and {more} more" if more > 0 else problems_shown


def shorten(text: object, width: int = _PROBLEM_WIDTH) -> str:
    """`text` on one line of at most `width` characters."""
    # A message may contain a whole file, so only the start, which can be shown, is processed.
    line = " ".join(str(text)[: 20 * width].split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


def out_of_memory(error: BaseException) -> TideError | None:
    """The error to report if memory ran out, Python's or a device's; None for other errors."""
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error)[:1000]:
        return None
    reason = shorten(error) or "no more to allocate"
    return TideError(
        f"out of memory ({reason}): use fewer or shorter rows at once, fewer new tokens, a smaller dtype, or a "
        "machine with more memory"
    )


@contextlib.contextmanager
def reports_out_of_memory() -> Iterator[None]:
    """Raises `out_of_memory`'s TideError in place of the error if memory runs out inside."""
    try:
        yield
    except Exception as error:
        if (reason := out_of_memory(error)) is not None:
            raise reason from error
        raise


def available_memory() -> int | None:
    """Bytes that this machine can still give to programs; None where it doesn't say (all but Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class if the message is empty."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__

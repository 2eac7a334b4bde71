"""Checks of a user's arguments: text, paths, and numbers of Python, numpy or JAX."""

from __future__ import annotations

import numbers
import os
from typing import Any

from tide_jax.errors import TideError

INT32_MAX = 2**31 - 1


def whole_number(name: str, value: Any, low: int = 0, high: int = INT32_MAX) -> int:
    """`value` as an int. Raises TideError, with `name` in its message, unless it is an integer in [low, high]."""
    number = _to_python(value)
    if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
        raise TideError(f"{name}={_show(value)} must be a whole number from {low} to {high}")
    return number


def real_number(name: str, value: Any) -> float:
    """`value` as a float. Raises TideError, with `name` in its message, unless it is a number."""
    number = _to_python(value)
    if not isinstance(number, numbers.Real) or isinstance(number, bool):
        raise TideError(f"{name}={_show(value)} must be a number")
    try:
        return float(number)
    except OverflowError:
        raise TideError(f"{name}={_show(value)} must be a number that fits a float") from None


def share(name: str, value: Any) -> float:
    """`value` as a float. Raises TideError, with `name` in its message, unless it is a number in [0, 1]."""
    number = real_number(name, value)
    if not 0.0 <= number <= 1.0:
        raise TideError(f"{name}={_show(value)} is outside [0, 1]")
    return number


def open_share(name: str, value: Any) -> float:
    """`value` as a float. Raises TideError, with `name` in its message, unless it is between 0 and 1, both excluded."""
    number = real_number(name, value)
    if not 0.0 < number < 1.0:
        raise TideError(f"{name}={_show(value)} must lie between 0 and 1")
    return number


def instance_of(name: str, value: Any, kind: type, *, or_none: bool = False) -> None:
    """Raises TideError, with `name` in its message, unless `value` is an instance of `kind`, or an allowed None."""
    if not isinstance(value, kind) and not (or_none and value is None):
        raise TideError(f"{name}={_show(value)} must be a {kind.__name__}{' or None' if or_none else ''}")


def path_like(name: str, value: Any) -> None:
    """Raises TideError, with `name` in its message, unless `value` is a path."""
    if not isinstance(value, (str, os.PathLike)) or not str(value) or "\0" in str(value):
        raise TideError(f"{name}={_show(value)} must be a path: a string that is not empty, or a pathlib.Path")


def _to_python(value: Any) -> Any:
    """The Python number in a numpy scalar or an array without axes; other values unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _show(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def unicode_text(what: str, text: str) -> str:
    """Returns `text` if a tokenizer can read it.

    Raises:
      TideError: it contains half of a surrogate pair, which a command line contains for bytes that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TideError(
            f"{what} is not valid text: its character {error.start}, {text[error.start]!a}, is not Unicode; pass UTF-8"
        ) from error
    return text

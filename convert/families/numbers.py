"""Reads numbers of a configuration. One that makes no sense is refused under its name in config.json."""

from __future__ import annotations

from typing import Any

from tide_jax.errors import TideError, shorten
from tide_jax.model.architecture_parts import check_multiple


def count(hf: Any, name: str) -> int:
    """A number of heads, channels or tokens. Raises TideError unless it is whole and at least 1."""
    value = getattr(hf, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _refusal(hf, name, "a whole number, 1 or more")
    return value


def share(hf: Any, name: str, others: str) -> int:
    """How many of the count `name` belong to each of the count `others`. Raises TideError if some are left over."""
    whole, parts = count(hf, name), count(hf, others)
    check_multiple(name, whole, others, parts)
    return whole // parts


def positive(hf: Any, name: str) -> float:
    """A factor. Raises TideError unless it is a number above 0."""
    value = getattr(hf, name)
    if not _is_number(value) or not value > 0:
        raise _refusal(hf, name, "a number above 0")
    return float(value)


def several(hf: Any, name: str, length: int, *, zero: bool = False) -> tuple[float, ...]:
    """A list of factors. Raises TideError unless it has this length, and each is above 0, or with `zero` may be 0."""
    values = getattr(hf, name)
    fits = isinstance(values, list | tuple) and len(values) == length
    if not fits or not all(_is_number(value) and (value > 0 or (zero and value == 0)) for value in values):
        raise _refusal(hf, name, f"{length} numbers, none below 0" if zero else f"{length} numbers above 0")
    return tuple(float(value) for value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refusal(hf: Any, name: str, expected: str) -> TideError:
    found = shorten(repr(getattr(hf, name)))
    return TideError(f"{hf.model_type} with {name}={found} makes no sense, expected {expected}; correct config.json")

"""Reads frozen dataclasses from JSON: lists the problems of values, and builds instances from correct ones.

The classes have ranges in their annotations (see `tide_jax.ranges`) and a `__pydantic_config__`; pydantic checks them.
pydantic is only imported for a check, because the import takes a fraction of a second.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from tide_jax.checks import INT32_MAX
from tide_jax.errors import shorten

if TYPE_CHECKING:
    import pydantic

T = TypeVar("T")
STRICT = {"strict": True, "extra": "forbid", "allow_inf_nan": False, "revalidate_instances": "always"}
"""Rules of the checks: no type conversion, no unknown fields, only finite numbers."""
_SHORT_FORMS = {
    "Value error, ": "",
    "Input should": "should",
    "Unexpected keyword argument": "is not a known field",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "be a valid": "be a",
}
"""Shorter forms of pydantic's messages, for errors with little room."""


def json_problems(kind: type, values: Any) -> list[str]:
    """Reasons why values from JSON do not form a `kind`: missing fields, or if none is missing, the wrong ones."""
    missing = [f"{name} is missing" for name in _missing_fields(kind, values, "")]
    return missing or _problems(kind, lambda schema: schema.validate_json(json.dumps(values)))


def instance_problems(value: Any) -> list[str]:
    """Problems of an instance's fields."""
    return _problems(type(value), lambda schema: schema.validate_python(value))


def from_json(kind: type[T], values: dict[str, Any]) -> T:
    """The instance of `kind` with these values, which must have no `json_problems`.

    Whole numbers in float fields stay int, so digests of the values do not change; except those beyond int32, which
    become float because JAX rejects them as int.
    """
    return _build(kind, values)


def _problems(kind: type, validate: Callable[[pydantic.TypeAdapter[Any]], object]) -> list[str]:
    from pydantic import ValidationError

    try:
        validate(_schema(kind))
    except ValidationError as error:
        found = _of_tagged_members(error.errors(include_url=False))
        return [_problem(problem) for problem in found]
    return []


def _of_tagged_members(problems: list[Any]) -> list[Any]:
    """Problems without those of union members that the value's class or `kind` rules out; pydantic lists them all."""
    ruled_out = {problem["loc"][:-1] for problem in problems if problem["loc"][-1:] == ("kind",)}
    ruled_out |= {problem["loc"] for problem in problems if problem["type"] == "dataclass_exact_type"}
    kept = [p for p in problems if not any(p["loc"][:n] in ruled_out for n in range(1, len(p["loc"]) + 1))]
    return kept or problems[:1]


def _problem(problem: Any) -> str:
    """One line with the place, the value there, and what was expected."""
    place, message = ".".join(map(str, problem["loc"])), problem["msg"]
    for long, short in _SHORT_FORMS.items():
        message = message.replace(long, short)
    if problem["type"] == "value_error":  # fields contradict each other, and the message names them
        return f"{place}: {message}" if place else message
    return f"{place}={shorten(repr(problem['input']), 20)} {message}"


@functools.cache
def _schema(kind: type) -> pydantic.TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


_hints = functools.cache(typing.get_type_hints)


def _missing_fields(kind: Any, value: Any, place: str) -> Iterator[str]:
    """Missing fields at any depth; values that are present may have any type."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        yield from _missing_fields(_member(kind, value), value, place) if value is not None else ()
    elif typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _missing_fields(get_args(kind)[0], item, f"{place}{i}.")
    elif dataclasses.is_dataclass(kind) and isinstance(value, dict):
        for name, hint in _fields(kind).items():
            yield from _missing_fields(hint, value[name], f"{place}{name}.") if name in value else (f"{place}{name}",)


def _member(union: Any, value: Any) -> Any:
    """The member of a union that a value is meant for: the dataclass with its `kind`, else the first member."""
    tag = value.get("kind") if isinstance(value, dict) else None
    tagged = (m for m in get_args(union) if dataclasses.is_dataclass(m) and tag in get_args(_fields(m).get("kind")))
    return next(tagged, get_args(union)[0])


def _fields(kind: Any) -> dict[str, Any]:
    """The annotated type of each field of a dataclass."""
    return {field.name: _hints(kind)[field.name] for field in dataclasses.fields(kind)}


def _build(kind: Any, value: Any) -> Any:
    """Converts a value to its annotated type, with nested dataclasses and tuples."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return None if value is None else _build(_member(kind, value), value)
    if typing.get_origin(kind) is tuple:
        return tuple(_build(get_args(kind)[0], item) for item in value)
    if dataclasses.is_dataclass(kind):
        return typing.cast(Any, kind)(**{name: _build(hint, value[name]) for name, hint in _fields(kind).items()})
    return float(value) if kind is float and isinstance(value, int) and abs(value) > INT32_MAX else value

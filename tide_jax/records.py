"""Frozen dataclasses read from JSON: what is wrong with the values, and the instance where nothing is.

The classes carry their ranges in their annotations (see `tide_jax.ranges`) and `__pydantic_config__`; pydantic checks
them. It is imported when something is checked, as that takes a fraction of a second.
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
from tide_jax.errors import shortened

if TYPE_CHECKING:
    import pydantic

T = TypeVar("T")
STRICT = {"strict": True, "extra": "forbid", "allow_inf_nan": False, "revalidate_instances": "always"}
"""How records are checked: nothing is converted, nothing unknown is passed over, numbers are finite."""
_SHORTER = {
    "Value error, ": "",
    "Input should": "should",
    "Unexpected keyword argument": "is no known field",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "be a valid": "be a",
}
"""How pydantic's messages are said in an error that has room for few words."""


def json_problems(kind: type, values: Any) -> list[str]:
    """What keeps values read from JSON from being a `kind`: missing fields, or else what is wrong with those there."""
    missing = [f"{name} is missing" for name in _missing(kind, values, "")]
    return missing or _problems(kind, lambda schema: schema.validate_json(json.dumps(values)))


def instance_problems(value: Any) -> list[str]:
    """What is wrong with the fields of an instance."""
    return _problems(type(value), lambda schema: schema.validate_python(value))


def from_json(kind: type[T], values: dict[str, Any]) -> T:
    """The instance of `kind` with these values, which have no `json_problems`.

    Whole numbers in the place of others stay as they are, and with them whatever is a digest of the values; but for
    those that are no int32, which JAX would not take.
    """
    return _build(kind, values)


def _problems(kind: type, validate: Callable[[pydantic.TypeAdapter[Any]], object]) -> list[str]:
    from pydantic import ValidationError

    try:
        validate(_schema(kind))
    except ValidationError as error:
        return [_problem(found["loc"], found["msg"], found["input"]) for found in error.errors(include_url=False)]
    return []


def _problem(place: tuple[int | str, ...], message: str, value: Any) -> str:
    """One line: the place, the value there, and what was expected."""
    for long, short in _SHORTER.items():
        message = message.replace(long, short)
    if not place:  # fields that contradict each other, which the message names
        return message
    return f"{'.'.join(map(str, place))}={shortened(repr(value), 20)} {message}"


@functools.cache
def _schema(kind: type) -> pydantic.TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


_hints = functools.cache(typing.get_type_hints)


def _missing(kind: Any, value: Any, place: str) -> Iterator[str]:
    """Fields that are not there, at any depth; what is there may be of any type."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        yield from _missing(get_args(kind)[0], value, place) if value is not None else ()
    elif typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _missing(get_args(kind)[0], item, f"{place}{i}.")
    elif dataclasses.is_dataclass(kind) and isinstance(value, dict):
        for name, hint in _fields(kind).items():
            yield from _missing(hint, value[name], f"{place}{name}.") if name in value else (f"{place}{name}",)


def _fields(kind: Any) -> dict[str, Any]:
    """The annotated type of each field of a dataclass."""
    return {field.name: _hints(kind)[field.name] for field in dataclasses.fields(kind)}


def _build(kind: Any, value: Any) -> Any:
    """A value as the annotated type: nested dataclasses and tuples."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return None if value is None else _build(get_args(kind)[0], value)
    if typing.get_origin(kind) is tuple:
        return tuple(_build(get_args(kind)[0], item) for item in value)
    if dataclasses.is_dataclass(kind):
        return typing.cast(Any, kind)(**{name: _build(hint, value[name]) for name, hint in _fields(kind).items()})
    return float(value) if kind is float and isinstance(value, int) and abs(value) > INT32_MAX else value

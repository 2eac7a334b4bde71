"""Types and ranges of `quantization_config`, checked before any value is used."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from tide_jax.checks import INT32_MAX
from tide_jax.errors import shorten

Bits = Annotated[int, Field(ge=1, le=32)]
Size = Annotated[int, Field(ge=1, le=INT32_MAX)]
GroupSize = Size | Literal[-1] | None
Block = Annotated[list[Size], Strict(False), Field(min_length=2, max_length=2)]
_STRICT = ConfigDict(strict=True)


class Weights(TypedDict, total=False):
    """compressed-tensors: storage of the weights in a group of layers."""

    __pydantic_config__ = _STRICT  # pyright: ignore[reportGeneralTypeIssues]
    num_bits: Bits
    strategy: str | None
    group_size: GroupSize
    block_structure: Block | None


class Group(TypedDict, total=False):
    """compressed-tensors: a group of layers."""

    __pydantic_config__ = _STRICT  # pyright: ignore[reportGeneralTypeIssues]
    format: str | None
    weights: Weights | None


class QuantisationSettings(TypedDict, total=False):
    """The keys of `quantization_config` that any method reads; other keys may hold anything."""

    __pydantic_config__ = _STRICT  # pyright: ignore[reportGeneralTypeIssues]
    quant_method: str | None
    load_in_4bit: bool | None
    load_in_8bit: bool | None
    format: str | None
    checkpoint_format: str | None
    is_marlin_format: bool | None
    bits: Bits | None
    w_bit: Bits | None
    sym: bool | None
    group_size: GroupSize
    version: str | None
    weight_block_size: Block | None
    config_groups: dict[str, Group] | None
    sparsity_config: dict[str, Any] | None
    transform_config: dict[str, Any] | None


_SETTINGS = TypeAdapter(QuantisationSettings)


def describe_problem(settings: dict[str, Any]) -> str | None:
    """Describes the first invalid setting in a few words; None if all are valid."""
    try:
        _SETTINGS.validate_python(settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        return shorten(f"{shorten(place, 60)}={shorten(repr(first['input']), 60)}: {first['msg']}", 200)
    return None

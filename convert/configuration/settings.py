"""Builds the transformers configuration object with only those settings that its model reads."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from convert.configuration.undeclared import (
    HEAD_DIM,
    HEAD_DIM_OF_ROTATION,
    PARTIAL_ROTARY,
    PER_LAYER,
    WHOLE_ROTARY,
)
from tide_jax.errors import TideError, join_problems, shorten


def read_settings(kind: Any, values: Mapping[str, Any]) -> Any:
    """Builds an object of transformers' configuration class `kind`, without keys that its model does not read.

    Args:
      values: the contents of a config.json. Keys that would replace a method or a constant of the class are left out.

    Raises:
      TideError: a setting asks for something that no decoder here implements.
      Exception: any other class, from the validators of `kind`.
    """
    hf = build_configuration(kind, values)
    _check_supported(hf, values)
    # transformers keeps every key it finds; remove those that the model never reads.
    _drop_unread_keys(hf, values, kind(), _undeclared_keys(kind))
    if kind.model_type in HEAD_DIM_OF_ROTATION:
        _check_head_dim(hf)
    for rope in _rotary_settings(hf):
        _resolve_partial_rotation(hf, rope)
    return hf


def build_configuration(kind: Any, values: Mapping[str, Any]) -> Any:
    """Builds a configuration object the way transformers reads a file. Raises what its validators raise."""
    names = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    return kind.from_dict(
        _decode_floats({n: value for n, value in values.items() if n in names or not _is_reserved(kind, n)})
    )


def _decode_floats(value: Any) -> Any:
    """Replaces ``{"__float__": "Infinity"}`` by the number. transformers writes infinities and NaN that way in JSON."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {name: _decode_floats(item) for name, item in value.items()}
    return [_decode_floats(item) for item in value] if isinstance(value, list) else value


def _is_reserved(kind: Any, name: str) -> bool:
    """Whether a key is private or names a method or constant of the class. Properties may be set."""
    return name.startswith("_") or (
        name != "model_type"  # several types may share a class
        and hasattr(kind, name)
        and not isinstance(inspect.getattr_static(kind, name), property)
    )


def _check_supported(hf: Any, values: Mapping[str, Any]) -> None:
    """Raises TideError for unsupported keys that transformers obeys in every model type."""
    if "is_causal" in values and not values["is_causal"]:
        raise TideError(f"{hf.model_type} with is_causal={values['is_causal']!r} is not supported, only is_causal=True")
    layers = values.get("per_layer_config") or {}
    layer_keys = {name for layer in layers.values() for name in layer}
    if unknown := layer_keys - PER_LAYER.get(hf.model_type, frozenset()):
        raise TideError(
            f"{hf.model_type} with per_layer_config of {join_problems(sorted(unknown))} is not "
            "supported, only equal layers"
        )


def _undeclared_keys(kind: Any) -> set[str]:
    """Keys that models read although the class does not declare them."""
    return {"tie_word_embeddings", "model_type"} | (
        {"head_dim"} if kind.model_type in HEAD_DIM | HEAD_DIM_OF_ROTATION else set()
    )


def _drop_unread_keys(hf: Any, values: Mapping[str, Any], default: Any, undeclared: set[str]) -> None:
    """Removes keys that the class neither declares nor sets itself, also in its sub-configurations."""
    names = {field.name for field in dataclasses.fields(hf)} | set(vars(default)) | undeclared
    for name in set(values) & set(vars(hf)) - names:
        delattr(hf, name)
    for name in type(hf).sub_configs:
        part, part_values = getattr(hf, name, None), values.get(name)
        if part is not None and isinstance(part_values, Mapping):
            _drop_unread_keys(part, part_values, type(part)(), set())


def _check_head_dim(hf: Any) -> None:
    found, width = getattr(hf, "head_dim", None), hf.hidden_size // hf.num_attention_heads
    if found and found != width:
        raise TideError(f"{hf.model_type} with head_dim={found!r} is not supported, only head_dim={width}")


def _rotary_settings(hf: Any) -> Iterator[dict[str, Any]]:
    """Yields the rotary settings of a configuration: one for each layer type, or one for all."""
    settings = getattr(hf, "rope_parameters", None)
    if not isinstance(settings, dict):
        return
    nested = [settings[name] for name in hf.nested_rope_parameter_keys(settings)]
    yield from (rope for rope in nested or [settings] if isinstance(rope, dict))


def _resolve_partial_rotation(hf: Any, rope: dict[str, Any]) -> None:
    """Drops `partial_rotary_factor` if the model doesn't read it. Raises TideError if transformers fails on it."""
    kind, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor")
    if hf.model_type in PARTIAL_ROTARY or kind == "proportional" or share is None:
        return
    if share != 1 and (kind != "default" or hf.model_type in WHOLE_ROTARY):
        raise TideError(
            f"{hf.model_type} with partial_rotary_factor={shorten(share)} is not supported for rope_type {kind!r}: "
            "its heads are rotated as a whole"
        )
    del rope["partial_rotary_factor"]

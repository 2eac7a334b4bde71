"""From a source's config.json to its family and decoder configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from convert.families import FAMILIES, Family
from convert.reader import Source
from convert.rules import Rule
from tide_jax.config import DecoderConfig
from tide_jax.errors import TideError


def family_of(source: Source) -> Family:
    """The table entry of a source's model type. Raises TideError, naming the supported ones, without one."""
    model_type = source.config.get("model_type")
    supported = f"supported are {', '.join(FAMILIES)}"
    if model_type is None:
        raise TideError(f"{source.description}: config.json has no model_type; {supported}")
    if model_type not in FAMILIES:
        raise TideError(f"{source.description}: model_type {model_type!r} is not supported; {supported}")
    if method := source.config.get("quantization_config"):
        raise TideError(
            f"{source.description}: weights quantised with {method.get('quant_method', 'an unknown method')} are not "
            "supported: convert the unquantised checkpoint, or a GGUF file"
        )
    return FAMILIES[model_type]


def decoder_config(source: Source) -> DecoderConfig:
    """The architecture of a source. Raises TideError where it is unknown or asks for what is not implemented."""
    family = family_of(source)
    hf = _transformers_config(source)
    config = family.config(hf)
    if config.tie_embeddings and _has_own_head(source, family.rules):
        config = dataclasses.replace(config, tie_embeddings=False)
    eos, pad = (_token_setting(source, hf, name) for name in ("eos_token_id", "pad_token_id"))
    return dataclasses.replace(
        config,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        pad_token_id=pad if pad is not None and pad >= 0 else None,
    )


def _token_setting(source: Source, hf: Any, name: str) -> Any:
    """A token id: generation_config.json's word counts before config.json's."""
    value = source.generation_config.get(name)
    return getattr(hf, name, None) if value is None else value


def _transformers_config(source: Source) -> Any:
    """The transformers class knows the defaults of its fields and their older names."""
    from transformers import CONFIG_MAPPING

    model_type = source.config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise TideError(f"the installed transformers does not know {model_type!r}: upgrade transformers")
    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(source.config))
    except Exception as error:  # its validators raise several unrelated classes
        reason = " ".join(str(error).split())
        raise TideError(f"{source.description}: config.json is not a valid {model_type} one: {reason}") from error


def _has_own_head(source: Source, rules: Sequence[Rule]) -> bool:
    """Whether a head is stored that differs from the embedding; then transformers does not tie the two either."""
    heads, embeddings = _stored(source, rules, "head.kernel"), _stored(source, rules, "embed.kernel")
    return bool(heads) and _digests(source, heads) != _digests(source, embeddings)


def _stored(source: Source, rules: Sequence[Rule], path: str) -> list[str]:
    patterns = [rule.pattern for rule in rules if any(target.path == path for target in rule.targets)]
    return [name for name in source.tensors if any(re.fullmatch(pattern, name) for pattern in patterns)]


def _digests(source: Source, names: Sequence[str]) -> set[bytes]:
    return {hashlib.sha256(source.read(name).reshape(-1).view(np.uint8).data).digest() for name in names}

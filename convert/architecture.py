"""From a source's config.json to its family and decoder configuration."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convert.families import FAMILIES, REFUSED, Family
from convert.reader import Source
from convert.rules import Rule
from tide_jax.architecture import DecoderConfig
from tide_jax.errors import TideError

logger = logging.getLogger(__name__)
_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "max_position_embeddings", "num_local_experts", "num_experts_per_tok"),
    *("n_embd", "n_layer", "n_head", "n_inner", "n_positions"),  # GPT-2's names
)


def family_of(source: Source) -> Family:
    """The table entry of a source's model type. Raises TideError, with the reason, without one."""
    model_type = source.config.get("model_type")
    if model_type is None:
        raise TideError(f"{source.description}: config.json has no model_type, expected one such as 'llama'; add it")
    if model_type in REFUSED:
        raise TideError(f"{source.description}: model_type {model_type!r} does not convert: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        raise TideError(f"{source.description}: {_unknown(model_type)}")
    return FAMILIES[model_type]


def _unknown(model_type: str) -> str:
    close = difflib.get_close_matches(model_type, FAMILIES, n=3)
    listed = f"close are {', '.join(close)}" if close else "docs/families.md lists them"
    return f"model_type {model_type!r} is none of the {len(FAMILIES)} that convert by table ({listed})"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a source is, and how its tensors convert.

    Attributes:
      config: its architecture.
      rules: its weight map.
      probed: what probing found, JSON-ready, where the model type is in no table.
      overflows_float16: as in `Family`.
    """

    config: DecoderConfig
    rules: tuple[Rule, ...]
    probed: dict[str, Any] | None = None
    overflows_float16: bool = False


def architecture_of(source: Source, *, trust_remote_code: bool = False) -> Architecture:
    """The architecture of a source: from the table of families, or else by probing (see `convert.probe`).

    Args:
      trust_remote_code: run the Python code the checkpoint brings, to probe a model type transformers does not know.

    Raises:
      TideError: the model type is refused, or cannot be probed, or asks for what is not implemented.
    """
    model_type = source.config.get("model_type")
    if model_type is None or model_type in FAMILIES or model_type in REFUSED:
        family = family_of(source)
        return Architecture(decoder_config(source), family.rules, overflows_float16=family.overflows_float16)
    _check_decoder(source)
    from convert.probe import probe

    try:
        probed = probe(source, trust_remote_code=trust_remote_code)
    except TideError as error:
        raise TideError(f"{_unknown(model_type)}; {error}") from error
    return Architecture(_with_token_ids(source, source.config, probed.config), probed.rules, probed.report)


def _check_decoder(source: Source) -> None:
    """Raises TideError for an encoder-decoder, without loading anything."""
    from transformers import CONFIG_MAPPING

    model_type = source.config["model_type"]
    known = model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type]().is_encoder_decoder
    if source.config.get("is_encoder_decoder", known):
        raise TideError(
            f"{source.description}: model_type {model_type!r} is an encoder and a decoder that reads the encoder's "
            "output; only decoders that stand alone convert"
        )


def decoder_config(source: Source) -> DecoderConfig:
    """The architecture of a source. Raises TideError where it is unknown or asks for what is not implemented."""
    family = family_of(source)
    _check_sizes(source)
    hf = _transformers_config(source)
    try:
        config = family.config(hf)
    except TideError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # more heads than channels
        raise TideError(
            f"{source.description}: config.json's values do not fit together ({_line(error)}); correct it"
        ) from error
    if config.tie_embeddings and _has_own_head(source, family.rules):
        config = dataclasses.replace(config, tie_embeddings=False)
    return _with_token_ids(source, hf.to_dict(), config)


def _with_token_ids(source: Source, settings: Mapping[str, Any], config: DecoderConfig) -> DecoderConfig:
    names = ("eos_token_id", "pad_token_id")
    eos, pad = (_token_ids(source, settings.get(name), name, config.vocab_size) for name in names)
    return dataclasses.replace(config, eos_token_ids=eos, pad_token_id=pad[0] if pad else None)


def _check_sizes(source: Source) -> None:
    for name in _SIZES:
        value = source.config.get(name)
        if isinstance(value, int) and value < 1:
            raise TideError(f"{source.description}: config.json has {name}={value!r}, expected 1 or more; correct it")


def _token_ids(source: Source, default: Any, name: str, vocab_size: int) -> tuple[int, ...]:
    """Token ids inside the vocabulary; generation_config.json's word counts before config.json's."""
    value = source.generation_config.get(name)
    value = default if value is None else value
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise TideError(f"{source.description}: {name} is {value!r}, expected a token id or a list of them; correct it")
    # Published checkpoints write -1 or the vocabulary's size for "none"; the model can produce neither.
    if outside := [i for i in ids if not 0 <= i < vocab_size]:
        logger.warning("%s=%s is outside the vocabulary of %d tokens and left out", name, outside, vocab_size)
    return tuple(i for i in ids if 0 <= i < vocab_size)


def _transformers_config(source: Source) -> Any:
    """The transformers class knows the defaults of its fields and their older names."""
    from transformers import CONFIG_MAPPING

    model_type = source.config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise TideError(f"the installed transformers does not know {model_type!r}: upgrade transformers")
    try:
        return CONFIG_MAPPING[model_type].from_dict(dict(source.config))
    except Exception as error:  # its validators raise several unrelated classes
        raise TideError(f"{source.description}: config.json is not a valid {model_type} one: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _has_own_head(source: Source, rules: Sequence[Rule]) -> bool:
    """Whether a head is stored that differs from the embedding; then transformers does not tie the two either."""
    heads, embeddings = _stored(source, rules, "head.kernel"), _stored(source, rules, "embed.kernel")
    return bool(heads) and _digests(source, heads) != _digests(source, embeddings)


def _stored(source: Source, rules: Sequence[Rule], path: str) -> list[str]:
    patterns = [rule.pattern for rule in rules if any(target.path == path for target in rule.targets)]
    return [name for name in source.tensors if any(re.fullmatch(pattern, name) for pattern in patterns)]


def _digests(source: Source, names: Sequence[str]) -> set[bytes]:
    return {hashlib.sha256(source.read(name).reshape(-1).view(np.uint8).data).digest() for name in names}

"""Finds the family and decoder configuration for a source's config.json."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Mapping
from typing import Any

from convert.configuration.settings import read_settings
from convert.configuration.sizes import check_sizes
from convert.families import FAMILIES, REFUSED, Family
from convert.sources.base import Source
from convert.tied import resolve_tied_head, rules_for
from convert.weights.rules import Rule
from tide_jax.errors import TideError, shorten
from tide_jax.model.architecture import DecoderConfig
from tide_jax.model.generation_settings import settings_from

logger = logging.getLogger(__name__)


def family_of(source: Source) -> Family:
    """Returns the family of a source's model type. Raises TideError with the reason if there is none."""
    model_type = source.config.get("model_type")
    if model_type is None:
        raise TideError(f"{source.description}: config.json has no model_type, expected one such as 'llama'; add it")
    if model_type in REFUSED:
        raise TideError(f"{source.description}: model_type {model_type!r} is not supported: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        raise TideError(f"{source.description}: {_describe_unknown_type(model_type)}")
    return FAMILIES[model_type]


def _describe_unknown_type(model_type: str) -> str:
    close = difflib.get_close_matches(model_type, FAMILIES, n=3)
    hint = f"similar are {', '.join(close)}" if close else "docs/families.md lists them"
    return f"model_type {shorten(repr(model_type))} is in no table ({hint})"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Architecture of a source and the rules that convert its tensors.

    Attributes:
      config: the decoder configuration.
      rules: the weight map.
      probed: JSON-ready result of probing, for model types in no table; else None.
      overflows_float16: as in `Family`.
    """

    config: DecoderConfig
    rules: tuple[Rule, ...]
    probed: dict[str, Any] | None = None
    overflows_float16: bool = False


def architecture_of(source: Source, *, trust_remote_code: bool = False) -> Architecture:
    """Returns the architecture of a source, from the table of families or by probing (see `convert.probe.run`).

    Args:
      trust_remote_code: run the Python code in the checkpoint, to probe a model type that transformers doesn't know.

    Raises:
      TideError: the model type is refused or can't be probed, or the model needs something that is not implemented.
    """
    model_type = source.config.get("model_type")
    if model_type is None or model_type in FAMILIES or model_type in REFUSED:
        config, family = decoder_config(source), family_of(source)
        rules = rules_for(source, config, family.rules)
        return Architecture(config, rules, overflows_float16=family.overflows_float16)
    _check_decoder(source)
    from convert.probe.run import probe

    try:
        probed = probe(source, trust_remote_code=trust_remote_code)
    except TideError as error:
        raise TideError(f"{_describe_unknown_type(model_type)}; {error}") from error
    return Architecture(_with_token_ids(source, source.config, probed.config), probed.rules, probed.report)


def _check_decoder(source: Source) -> None:
    """Raises TideError for an encoder-decoder, without loading anything."""
    from transformers import CONFIG_MAPPING

    model_type = source.config["model_type"]
    known = model_type in CONFIG_MAPPING and CONFIG_MAPPING[model_type]().is_encoder_decoder
    if source.config.get("is_encoder_decoder", known):
        raise TideError(
            f"{source.description}: model_type {model_type!r} is an encoder and a decoder that reads the encoder's "
            "output; only stand-alone decoders can be converted"
        )


def decoder_config(source: Source) -> DecoderConfig:
    """Returns the decoder configuration. Raises TideError if the model type or one of its settings isn't supported."""
    family = family_of(source)
    hf = _transformers_config(source)
    try:
        config = family.config(hf)
    except TideError as error:
        raise TideError(f"{source.description}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # too many heads, ...
        raise TideError(
            f"{source.description}: config.json's values do not fit together ({shorten(error)}); correct it"
        ) from error
    try:
        config.check()
    except TideError as error:
        raise TideError(f"{source.description}: config.json gives {error}; correct it") from error
    config = resolve_tied_head(source, config, family.rules)
    return _with_token_ids(source, hf.to_dict(), config)


def _with_token_ids(source: Source, settings: Mapping[str, Any], config: DecoderConfig) -> DecoderConfig:
    """Adds the token ids and generation settings of generation_config.json to the configuration."""
    names = ("eos_token_id", "pad_token_id")
    eos, pad = (_token_ids(source, settings.get(name), name, config.vocab_size) for name in names)
    generation = settings_from(source.generation_config, f"{source.description}: generation_config.json")
    return dataclasses.replace(config, eos_token_ids=eos, pad_token_id=pad[0] if pad else None, generation=generation)


def _token_ids(source: Source, default: Any, name: str, vocab_size: int) -> tuple[int, ...]:
    """Returns the token ids inside the vocabulary; generation_config.json overrides config.json."""
    value = source.generation_config.get(name)
    value = default if value is None else value
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        shown = shorten(repr(value))
        raise TideError(f"{source.description}: {name} is {shown}, expected a token id or a list of them; correct it")
    # Published checkpoints write -1 or the vocabulary size for "none". The model can produce neither.
    if outside := [i for i in ids if not 0 <= i < vocab_size]:
        logger.warning("%s=%s is outside the vocabulary of %d tokens and is ignored", name, outside, vocab_size)
    return tuple(i for i in ids if 0 <= i < vocab_size)


def _transformers_config(source: Source) -> Any:
    """Reads config.json with its transformers class, which knows the default and older names of each field."""
    from transformers import CONFIG_MAPPING

    model_type = source.config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise TideError(f"the installed transformers does not know {model_type!r}: upgrade transformers")
    try:
        check_sizes(source.config)
        return read_settings(CONFIG_MAPPING[model_type], source.config)
    except TideError as error:
        raise TideError(f"{source.description}: {error}") from error
    except Exception as error:  # the validators raise several unrelated classes
        raise TideError(
            f"{source.description}: config.json is not valid for {model_type}: {shorten(error, 120)}; correct it"
        ) from error

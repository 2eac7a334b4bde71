"""A checkpoint's settings for choosing tokens: the part of generation_config.json that `TIDE.generate` follows.

There are two kinds of settings. Rules apply to every generation, even greedy: penalties, forbidden tokens, minimum
lengths. Sampling dials apply only when the caller asks for sampling; greedy is the default here, whatever the file's
`do_sample` says. The caller chooses how many tokens to generate; a file's `max_length` and `max_new_tokens` are not
read.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

from tide_jax.checks import real_number, whole_number
from tide_jax.errors import TideError
from tide_jax.records import STRICT

logger = logging.getLogger(__name__)

SAMPLING_DIALS = ("temperature", "top_k", "top_p", "min_p")

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "guidance_scale": (1,),
    "max_time": (),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False,),
    "sequence_bias": (),
    "stop_strings": (),
    "token_healing": (False,),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}
"""Unsupported transformers settings that change tokens, with the values at which they have no effect."""


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """Generation settings with transformers' names and meanings; None if not given.

    Rows of a batch are independent: lengths count a row's own tokens, without padding.

    Attributes:
      temperature, top_k, top_p, min_p: sampling dials, see `tide_jax.generation.sampling`. Only used when the caller
        asks for sampling.
      repetition_penalty: penalty on tokens that are already in the row, prompt included.
      no_repeat_ngram_size: n-grams of this length occur only once, prompt included; 0 for no such rule.
      bad_words_ids: token sequences that are never completed. A sequence of a single end-of-sequence token is ignored.
      min_length: no end-of-sequence token is chosen before this many tokens, prompt included; `min_new_tokens`
        overrides it.
      min_new_tokens: the same without the prompt.
      forced_bos_token_id: the first new token after a prompt of one token; -1 for none.
      forced_eos_token_id: the last token within `max_new_tokens` is one of these.
      suppress_tokens: tokens that are never chosen.
      begin_suppress_tokens: tokens that are not chosen as the first new token.
      unsupported: settings that are ignored, as "name=value", for the warning.

    Raises:
      TideError: a value has a wrong type or is out of range.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    unsupported: tuple[str, ...] = ()

    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check(name, value))

    def override(self, over: GenerationSettings) -> GenerationSettings:
        """These settings, overridden by those that `over` gives."""
        said = {name: value for name in _CHECKS if (value := getattr(over, name)) is not None}
        return dataclasses.replace(self, **said)

    def warn(self, where: str) -> None:
        """Logs the unsupported settings in one line."""
        if self.unsupported:
            logger.warning("%s: generation settings not supported and ignored: %s", where, ", ".join(self.unsupported))


def settings_from(values: Mapping[str, Any], where: str) -> GenerationSettings:
    """The settings in a generation_config.json, or in the dictionary of a transformers `GenerationConfig`.

    A sampling dial outside its range counts as unsupported instead of an error, because nothing uses it until the
    caller asks for sampling.

    Args:
      where: names the source in errors.

    Raises:
      TideError: a value has the wrong type, or a rule's value is out of range.
    """
    found: dict[str, Any] = {}
    unsupported = [f"{name}={_shown(values[name])}" for name in _NEUTRAL if _matters(name, values.get(name))]
    for name, check in _CHECKS.items():
        if (value := values.get(name)) is None:
            continue
        try:
            found[name] = check(name, value)
        except TideError as error:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name not in SAMPLING_DIALS or not number:
                raise TideError(f"{where}: {error}; correct it") from error
            unsupported.append(f"{name}={_shown(value)}")
    return GenerationSettings(**found, unsupported=tuple(unsupported))


def sampling_dial(name: str, value: Any) -> float:
    """A dial as a float. Raises TideError, which names the dial, for a value out of range."""
    number = real_number(name, value)
    good, expected = {
        "temperature": (0 <= number < math.inf, "0 or more and finite"),
        "top_p": (0 < number <= 1, "above 0 and at most 1"),
        "min_p": (0 <= number <= 1, "between 0 and 1"),
        "repetition_penalty": (0 < number < math.inf, "above 0 and finite"),
    }[name]
    if not good:
        raise TideError(f"{name}={number} must be {expected}")
    return number


def _matters(name: str, value: Any) -> bool:
    return value is not None and value not in _NEUTRAL[name] and value != [] and value != {}


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def _ids(name: str, value: Any) -> tuple[int, ...]:
    """A list of token ids. Drops -1, transformers' value for "none"."""
    if not isinstance(value, (list, tuple)):
        value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)):
        raise TideError(f"{name}={_shown(value)} must be a list of token ids")
    return tuple(whole_number(name, i, low=-1) for i in value if i != -1)


def _id(name: str, value: Any) -> int:
    return whole_number(name, value, low=-1)


def _one_or_more_ids(name: str, value: Any) -> tuple[int, ...]:
    return _ids(name, value if isinstance(value, (list, tuple)) or hasattr(value, "tolist") else [value])


def _words(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, (list, tuple)):
        raise TideError(f"{name}={_shown(value)} must be a list of lists of token ids")
    if not all(isinstance(word, (list, tuple)) and len(word) for word in value):
        raise TideError(f"{name}={_shown(value)} must be a list of lists of at least one token id")
    return tuple(tuple(whole_number(name, i) for i in word) for word in value)


_CHECKS: dict[str, Any] = {
    "temperature": sampling_dial,
    "top_k": whole_number,
    "top_p": sampling_dial,
    "min_p": sampling_dial,
    "repetition_penalty": sampling_dial,
    "no_repeat_ngram_size": whole_number,
    "bad_words_ids": _words,
    "min_length": whole_number,
    "min_new_tokens": whole_number,
    "forced_bos_token_id": _id,
    "forced_eos_token_id": _one_or_more_ids,
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
}
NOTHING_SAID = GenerationSettings()
SETTINGS = tuple(_CHECKS)
"""Names of the supported settings."""

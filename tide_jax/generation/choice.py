"""Generation settings of one call: its arguments, else its generation_config, else the checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tide_jax.errors import TideError
from tide_jax.generation.sampling import Sampling, make_sampling
from tide_jax.generation.stop_strings import Stops, make_stops
from tide_jax.model.generation_settings import NOTHING_SAID, SETTINGS, GenerationSettings, settings_from

NEW_TOKENS = 128
_OF_THE_CALL = ("do_sample", "eos_token_id", "max_length", "max_new_tokens", "pad_token_id", "stop_strings")
"""Arguments and fields of a generation_config that a checkpoint's file does not set here."""


class Choice(NamedTuple):
    """Resolved settings of one generation.

    Attributes:
      settings: settings of the call, with the checkpoint's for those it leaves out.
      sampling: the resulting sampling settings.
      eos_token_id, pad_token_id: as given by the call; None for the model's.
      max_new_tokens: most tokens to generate; None if only `max_length` limits them.
      max_length: most tokens of a row, prompt included; None for the context.
      stops: stop strings; None for none.
    """

    settings: GenerationSettings
    sampling: Sampling
    eos_token_id: Any
    pad_token_id: Any
    max_new_tokens: Any
    max_length: Any
    stops: Stops | None


def choose(
    checkpoint: GenerationSettings, *, generation_config: Any = None, tokenizer: Any = None, **arguments: Any
) -> Choice:
    """Resolves settings: arguments override `generation_config`, which overrides the checkpoint's settings.

    Args:
      checkpoint: settings from the checkpoint's generation_config.json.
      generation_config: transformers' `GenerationConfig` or a dictionary of its fields.
      tokenizer: decodes tokens where stop strings end rows.
      arguments: other arguments of `TIDE.generate`; None for those not given.

    Raises:
      TideError: an argument or a field is unknown, has the wrong type or is outside its range.
    """
    if unknown := sorted(set(arguments) - {*SETTINGS, *_OF_THE_CALL}):
        raise TideError(
            f"generate has no argument {', '.join(unknown)}; settings of generation are {', '.join(SETTINGS)}"
        )
    # Settings of the call: `generation_config`, overridden by the arguments.
    config = _config_values(generation_config)
    given = GenerationSettings(**{name: arguments.get(name) for name in SETTINGS})
    named = NOTHING_SAID
    if config:
        named = settings_from({**config, "stop_strings": None}, "generation_config")
        named.warn("generation_config")
    of_call = {name: config.get(name) if arguments.get(name) is None else arguments[name] for name in _OF_THE_CALL}
    own = named.override(given)
    # The checkpoint's settings fill in the rest.
    settings = checkpoint.override(own)
    sampling = _sampling(settings, own, _samples(of_call["do_sample"], arguments.get("temperature"), own))
    # As in transformers, `max_new_tokens` wins over `max_length`.
    new_tokens, length = of_call["max_new_tokens"], of_call["max_length"]
    return Choice(
        settings,
        sampling,
        of_call["eos_token_id"],
        of_call["pad_token_id"],
        max_new_tokens=NEW_TOKENS if new_tokens is None and length is None else new_tokens,
        max_length=length if new_tokens is None else None,
        stops=make_stops(of_call["stop_strings"], tokenizer),
    )


def _samples(do_sample: Any, temperature: Any, own: GenerationSettings) -> bool:
    """Whether the call asks for sampling."""
    if not isinstance(do_sample, bool | None):
        raise TideError(f"do_sample={do_sample!r} must be True or False")
    if do_sample and own.temperature == 0:
        raise TideError("do_sample=True samples and temperature=0 is greedy; leave one of them out")
    # Only a temperature argument implies sampling. In a generation_config it needs do_sample, as in transformers.
    return bool(own.temperature) and temperature is not None if do_sample is None else do_sample


def _sampling(settings: GenerationSettings, own: GenerationSettings, samples: bool) -> Sampling:
    penalty = 1.0 if settings.repetition_penalty is None else settings.repetition_penalty
    if not samples:
        dials = {"top_k": own.top_k, "top_p": own.top_p, "min_p": own.min_p}  # unused by greedy decoding, but checked
        temperature = 0.0
    else:
        dials = {"top_k": settings.top_k, "top_p": settings.top_p, "min_p": settings.min_p}
        temperature = settings.temperature or 1.0
    said = {name: value for name, value in dials.items() if value is not None}
    return make_sampling(temperature, repetition_penalty=penalty, **said)


def _config_values(generation_config: Any) -> Mapping[str, Any]:
    if generation_config is None:
        return {}
    values = generation_config.to_dict() if hasattr(generation_config, "to_dict") else generation_config
    if not isinstance(values, Mapping):
        raise TideError(
            f"generation_config is {type(generation_config).__name__}, expected transformers' GenerationConfig or a "
            "dictionary of its fields"
        )
    return values

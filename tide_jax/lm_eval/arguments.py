"""Translates the arguments of lm-eval's model "tide", and a task's generation arguments, for an engine."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from lm_eval.models.utils import normalize_gen_kwargs

from tide_jax.config import ExitConfig
from tide_jax.engine import TIDE
from tide_jax.errors import TideError
from tide_jax.exits.router import Routers
from tide_jax.model.files.checkpoint import load
from tide_jax.model.generation_settings import SAMPLING_DIALS, SETTINGS
from tide_jax.risk.promise import exit_settings

logger = logging.getLogger(__name__)

_TOP_K = 50  # transformers' default for sampling, and so that of lm-eval's model "hf"


class GenerationArguments(NamedTuple):
    """A task's generation arguments.

    Attributes:
      until: stop strings.
      max_new_tokens: most new tokens.
      settings: arguments of `TIDE.generate`.
    """

    until: list[str]
    max_new_tokens: int
    settings: dict[str, Any]


def open_engine(
    pretrained: Any, routers: Any, settings: dict[str, Any], mode: Any, dtype: Any = None, weights: Any = None
) -> TIDE:
    """The engine to evaluate. Raises TideError if arguments do not go together or files can't be loaded."""
    if mode not in (None, "exit", "lossless", "full"):
        raise TideError(f"mode={mode!r} is not known; choose 'exit', 'lossless' or 'full'")
    if isinstance(pretrained, TIDE):
        if any(option is not None for option in (routers, dtype, weights)):
            raise TideError(
                "an engine already has its routers, dtype and weights; pass them when you create the engine"
            )
        engine = pretrained.with_config(**settings)
    else:
        ExitConfig(**settings)  # before the model is loaded, so that bad settings fail at once
        if mode == "exit" and routers is None:
            raise TideError("mode=exit needs routers=FILE, from 'tide-jax calibrate'")
        if routers is None and (unused := [name for name in ("threshold_tilt", "kv_strategy") if name in settings]):
            raise TideError(f"{unused[0]} says how tokens exit; it needs routers=FILE")
        model = load(str(pretrained), dtype, weights=weights)
        loaded_routers = None if routers is None else Routers.load(str(routers), model=model)
        if loaded_routers is None:
            settings.setdefault("min_layers", min(ExitConfig.min_layers, model.config.num_layers))
            engine = TIDE(model, None, ExitConfig(**settings))
        else:
            config, promise = exit_settings(model, loaded_routers, **settings)
            logger.info("exits: %s", promise)
            engine = TIDE(model, loaded_routers, config)
    if mode == "exit" and engine.routers is None:
        raise TideError("mode=exit needs an engine with routers")
    return engine


def generation_arguments(engine: TIDE, arguments: dict[str, Any], default: int) -> GenerationArguments:
    """A task's generation arguments, interpreted as lm-eval's model "hf" does.

    Args:
      arguments: the arguments of a request.
      default: number of new tokens if the arguments give none.

    Raises:
      TideError: an argument is unknown.
    """
    remaining: dict[str, Any] = dict(normalize_gen_kwargs(arguments, default))
    until, max_new_tokens, do_sample = remaining.pop("until"), remaining.pop("max_gen_toks"), remaining.pop("do_sample")
    settings = {name: remaining.pop(name) for name in SETTINGS if name in remaining}
    if remaining.pop("num_beams", 1) != 1:
        raise TideError("num_beams must be 1; there is no beam search")
    if remaining:
        raise TideError(
            f"the generation arguments hold {', '.join(sorted(remaining))}; expected some of until, max_gen_toks, "
            f"do_sample, {', '.join(SETTINGS)}"
        )
    if not do_sample:
        settings = {name: value for name, value in settings.items() if name not in SAMPLING_DIALS}
    elif engine.model.config.generation.top_k is None:
        settings.setdefault("top_k", _TOP_K)
    stop_strings = [until] if isinstance(until, str) else list(until)
    return GenerationArguments(stop_strings, max_new_tokens, settings | {"do_sample": bool(do_sample)})


def parse_number(value: Any) -> Any:
    """Converts a string of digits from the command line to a number; returns anything else unchanged."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value

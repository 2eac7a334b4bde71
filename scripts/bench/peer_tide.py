"""tide_jax's side of scripts.bench.peers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import tide_jax
from scripts.bench.peer_measures import Run, Variant
from tide_jax.config import Mode
from tide_jax.functional import Decoder
from tide_jax.risk.promise import exit_settings


class Settings(NamedTuple):
    """Settings of exits.

    Attributes:
      routers: router file; None for no exits.
      dials: fields of `tide_jax.ExitConfig`; None uses the file's promised setting, or the default.
    """

    routers: Path | None
    dials: dict[str, Any]


def make_engine(model: Decoder, settings: Settings) -> tuple[tide_jax.TIDE, str | None]:
    """Returns an engine and the promise for its exits."""
    if settings.routers is None:
        return tide_jax.TIDE(model), None
    routers = tide_jax.Routers.load(settings.routers, model=model)
    config, promise = exit_settings(model, routers, **settings.dials)
    return tide_jax.TIDE(model, routers, config), promise


def tide_variant(engine: tide_jax.TIDE, mode: Mode) -> Variant:
    """Returns tide_jax in one of its modes."""

    def run(ids: list[int], count: int) -> Run:
        start = time.perf_counter()
        out = engine.generate(ids, max_new_tokens=count, mode=mode, eos_token_id=[])
        seconds = time.perf_counter() - start - out.stats.compile_time
        tokens = [int(t) for t in out.tokens[0, : out.lengths[0]]]
        found = out.stats.drafts
        drafts = None if found is None else {name: getattr(found, name) for name in ("passes", "drafted", "accepted")}
        return Run(tokens, seconds, out.stats.layers_executed / len(tokens), drafts)

    return run

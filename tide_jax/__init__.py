"""tide_jax: language models that spend depth only where a token needs it.

>>> import tide_jax
>>> model = tide_jax.load("path, hub id or file.gguf")                      # doctest: +SKIP
>>> tokenizer = tide_jax.load_tokenizer("the same")                         # doctest: +SKIP
>>> routers = tide_jax.calibrate(model, tokenizer, texts)                   # doctest: +SKIP
>>> engine = tide_jax.TIDE(model, routers, tide_jax.ExitConfig(exit_threshold=0.85, min_layers=8))  # doctest: +SKIP
>>> out = engine.generate(tokenizer("Once upon a time")["input_ids"])       # doctest: +SKIP
>>> print(tokenizer.batch_decode(out.sequences)[0])                         # doctest: +SKIP
>>> print(out.stats.summary())                                              # doctest: +SKIP

The pure functions below are in `tide_jax.functional`.
"""

TYPE_CHECKING = False  # importing `typing` for it takes longer than all of this file
if TYPE_CHECKING:
    from tide_jax.calibration.calibrate import calibrate
    from tide_jax.config import CalibrationConfig, ExitConfig
    from tide_jax.drift.monitor import DriftMonitor
    from tide_jax.engine import TIDE
    from tide_jax.errors import TideError
    from tide_jax.exits.router import Routers
    from tide_jax.model.files.checkpoint import load, load_tokenizer
    from tide_jax.model.sharding import make_mesh, shard
    from tide_jax.risk.guarantee import guarantee

__version__ = "0.1.0"

_HOMES = {
    "CalibrationConfig": "config",
    "DriftMonitor": "drift.monitor",
    "ExitConfig": "config",
    "Routers": "exits.router",
    "TIDE": "engine",
    "TideError": "errors",
    "calibrate": "calibration.calibrate",
    "guarantee": "risk.guarantee",
    "load": "model.files.checkpoint",
    "load_tokenizer": "model.files.checkpoint",
    "make_mesh": "model.sharding",
    "shard": "model.sharding",
}
"""The module of each public name. They are imported when they are first asked for: this package's commands answer
Ctrl-C from their first moment, and ``tide-jax --help`` does not wait for JAX."""

__all__ = [
    "TIDE",
    "CalibrationConfig",
    "DriftMonitor",
    "ExitConfig",
    "Routers",
    "TideError",
    "calibrate",
    "guarantee",
    "load",
    "load_tokenizer",
    "make_mesh",
    "shard",
]


def __getattr__(name: str) -> object:
    """A public name, or a module of this package."""
    import importlib

    if name in _HOMES:
        found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = found
        return found
    try:
        if not name.startswith("_"):
            return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

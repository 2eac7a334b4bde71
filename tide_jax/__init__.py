"""tide_jax: language models that spend depth only where a token needs it.

>>> import tide_jax
>>> model = tide_jax.load("path, hub id or file.gguf")                      # doctest: +SKIP
>>> tokenizer = tide_jax.load_tokenizer("the same")                         # doctest: +SKIP
>>> routers = tide_jax.calibrate(model, tokenizer, texts)                   # doctest: +SKIP
>>> engine = tide_jax.TIDE(model, routers, tide_jax.ExitConfig(exit_threshold=0.85, min_layers=8))  # doctest: +SKIP
>>> out = engine.generate(tokenizer("Once upon a time")["input_ids"])       # doctest: +SKIP
>>> print(out.stats.summary())                                              # doctest: +SKIP
"""

TYPE_CHECKING = False  # importing `typing` for it takes longer than all of this file
if TYPE_CHECKING:
    from tide_jax.calibration.calibrate import calibrate
    from tide_jax.config import CalibrationConfig, ExitConfig, RiskGuarantee
    from tide_jax.drift.monitor import DriftMonitor
    from tide_jax.engine import TIDE
    from tide_jax.errors import TideError
    from tide_jax.exits.queue import init_cache
    from tide_jax.exits.router import Routers
    from tide_jax.generation.generate import decode_step, generate_tokens, prefill
    from tide_jax.generation.outputs import GenerateOutput, ScoreOutput
    from tide_jax.generation.stats import DraftStats, DriftReport, ExitStats
    from tide_jax.lossless.control import DraftControl, PassCosts
    from tide_jax.lossless.costs import measure_pass_costs
    from tide_jax.lossless.speculate import generate_lossless
    from tide_jax.model.architecture import DecoderConfig
    from tide_jax.model.cache import KVCache
    from tide_jax.model.decoder import Decoder
    from tide_jax.model.files.checkpoint import load, load_tokenizer
    from tide_jax.model.sharding import make_mesh, shard
    from tide_jax.risk.guarantee import guarantee
    from tide_jax.risk.statistics import GuaranteeError

__version__ = "0.1.0"

_HOMES = {
    "CalibrationConfig": "config",
    "Decoder": "model.decoder",
    "DecoderConfig": "model.architecture",
    "DraftControl": "lossless.control",
    "DraftStats": "generation.stats",
    "DriftMonitor": "drift.monitor",
    "DriftReport": "generation.stats",
    "ExitConfig": "config",
    "ExitStats": "generation.stats",
    "GenerateOutput": "generation.outputs",
    "GuaranteeError": "risk.statistics",
    "KVCache": "model.cache",
    "PassCosts": "lossless.control",
    "RiskGuarantee": "config",
    "Routers": "exits.router",
    "ScoreOutput": "generation.outputs",
    "TIDE": "engine",
    "TideError": "errors",
    "calibrate": "calibration.calibrate",
    "decode_step": "generation.generate",
    "generate_lossless": "lossless.speculate",
    "generate_tokens": "generation.generate",
    "guarantee": "risk.guarantee",
    "init_cache": "exits.queue",
    "load": "model.files.checkpoint",
    "load_tokenizer": "model.files.checkpoint",
    "make_mesh": "model.sharding",
    "measure_pass_costs": "lossless.costs",
    "prefill": "generation.generate",
    "shard": "model.sharding",
}
"""The module of each public name. They are imported when they are first asked for: this package's commands answer
Ctrl-C from their first moment, and ``tide-jax --help`` does not wait for JAX."""

__all__ = [
    "TIDE",
    "CalibrationConfig",
    "Decoder",
    "DecoderConfig",
    "DraftControl",
    "DraftStats",
    "DriftMonitor",
    "DriftReport",
    "ExitConfig",
    "ExitStats",
    "GenerateOutput",
    "GuaranteeError",
    "KVCache",
    "PassCosts",
    "RiskGuarantee",
    "Routers",
    "ScoreOutput",
    "TideError",
    "calibrate",
    "decode_step",
    "generate_lossless",
    "generate_tokens",
    "guarantee",
    "init_cache",
    "load",
    "load_tokenizer",
    "make_mesh",
    "measure_pass_costs",
    "prefill",
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

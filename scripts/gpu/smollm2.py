"""Runs a model end to end in float32 and checks that greedy tokens don't depend on the implementation.

Equal tokens need no trained weights, so without a model a random one of the same shape will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tide_jax
from pallas_kernels.exit_step import IMPLEMENTATIONS
from scripts.gpu.model import config_smollm2, config_tiny
from scripts.gpu.ops import OUT_OF_TIME, Row
from scripts.gpu.timing import Budget
from scripts.reporting import reason
from tide_jax.config import KVStrategy
from tide_jax.functional import Decoder
from tide_jax.model.files.checkpoint import is_converted
from tide_jax.testing import random_routers

THRESHOLD = {"trained": 0.7, "random": 0.5}
"""Thresholds at which some tokens exit."""


def run_model(
    source: Path | None,
    routers: Path | None,
    tokens: int,
    budget: Budget,
    progress: Callable[[str], None],
    *,
    tiny: bool = False,
) -> Row:
    """Runs a converted model, or random weights of SmolLM2-135M's shape (or a tiny one); returns why it can't."""
    if source is None:
        return _run_random(tokens, budget, progress, tiny=tiny)
    if not is_converted(source):
        return {"skipped": f"{source} is no converted model, as tide-jax convert writes it"}
    if routers is not None and not routers.is_file():
        return {"skipped": f"no router file at {routers}"}
    progress(f"{source.name}, float32")
    try:
        from scripts.bench.peer_prompts import prompt_sets

        model = tide_jax.load(source, "float32")
        prompts = prompt_sets(tide_jax.load_tokenizer(source), [], 4)[0].prompts
        made = (
            random_routers(model.config, interval=5) if routers is None else tide_jax.Routers.load(routers, model=model)
        )
    except Exception as error:
        return {"model": source.name, "error": reason(error)}
    kind = "random" if routers is None else "trained"
    rows = compare(model, made, prompts, THRESHOLD[kind], tokens, budget)
    return {"model": source.name, "dtype": "float32", "routers": kind, "threshold": THRESHOLD[kind], "rows": rows}


def _run_random(tokens: int, budget: Budget, progress: Callable[[str], None], *, tiny: bool) -> Row:
    config = config_tiny() if tiny else config_smollm2()
    progress("random weights, float32")
    try:
        model = Decoder(config, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
        routers = random_routers(config, interval=1 if tiny else 5)
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, config.vocab_size, length).tolist() for length in (7, 19, 40)]
        rows = compare(model, routers, prompts, THRESHOLD["random"], tokens, budget)
    except Exception as error:
        return {"model": "random weights", "error": reason(error)}
    return {
        "model": "random weights of the shape of " + ("a tiny model" if tiny else "SmolLM2-135M"),
        "dtype": "float32",
        "routers": "random",
        "threshold": THRESHOLD["random"],
        "rows": rows,
    }


def compare(
    model: Decoder,
    routers: tide_jax.Routers,
    prompts: Sequence[Sequence[int]],
    threshold: float,
    tokens: int,
    budget: Budget,
    strategies: Sequence[KVStrategy] = ("propagate", "recompute"),
) -> list[Row]:
    """Returns a row for each implementation and cache policy; all are compared with plain JAX."""
    config = tide_jax.ExitConfig(exit_threshold=threshold, min_layers=min(8, model.config.num_layers // 2))
    on_gpu = jax.default_backend() != "cpu"
    names = [n for n in IMPLEMENTATIONS.names if not (on_gpu and n == "pallas_interpret")]
    rows, wanted = list[Row](), dict[KVStrategy, Any]()
    for strategy in strategies:
        for name in names:
            row: Row = {"implementation": name, "kv_strategy": strategy, "prompts": len(prompts), "new_tokens": tokens}
            rows.append(row)
            if budget.over("smollm2"):
                row["not_run"] = OUT_OF_TIME
                continue
            try:
                engine = tide_jax.TIDE(model, routers, config, implementation=name)
                engine = engine.with_config(kv_strategy=strategy)
                engine.generate(prompts, max_new_tokens=tokens, eos_token_id=[])
                out = engine.generate(prompts, max_new_tokens=tokens, eos_token_id=[])
            except Exception as error:
                row["error"] = reason(error)
                continue
            wanted.setdefault(strategy, out if name == "reference" else None)
            row |= {"tokens_per_second": out.stats.tokens_per_second, "mean_depth": out.stats.depth}
            row["tokens_that_exit"] = float(np.mean(out.exit_layers < model.config.num_layers - 1))
            row |= _same(out, wanted[strategy])
    return rows


def _same(out: Any, wanted: Any) -> Row:
    """Whether tokens and exits equal those of plain JAX."""
    if wanted is None:
        return {}
    return {
        "same_tokens": bool(np.array_equal(out.tokens, wanted.tokens)),
        "same_exits": bool(np.array_equal(out.exit_layers, wanted.exit_layers)),
    }

"""Measures a whole pass over several tokens of one row, as verification runs it: layers, cache writes, head and argmax.

  python -m scripts.bench.passes MODEL [MODEL ...] --out scripts/results/passes.json

MODEL is anything tide_jax.load takes. Each model runs with its floats and with int8 weights, in one process on the same
threads. A round runs all widths in turn, as float32 and as int8; reported are medians over the rounds, and ratios to
the pass over one token of the same round. Every pass starts from the same cache and throws its rows away, as a rejected
draft does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import tide_jax
from scripts.bench.decode import random_prompts
from scripts.reporting import machine, save
from tide_jax.exits.depth import run_depth
from tide_jax.functional import Decoder, KVCache, init_cache, prefill
from tide_jax.generation.generate import Prompt
from tide_jax.model.ops import likeliest

WIDTHS = (1, 2, 3, 4, 5, 6, 8)
PROMPT, PASSES = 64, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="+")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()

    report: dict[str, Any] = {
        "machine": machine(),
        "method": {"rounds": args.rounds, "prompt": PROMPT, "passes": PASSES},
        "models": [bench_model(source, args.rounds) for source in args.models],
    }
    for row in report["models"]:
        show(row)
    save(args.out, report)


def bench_model(source: str, rounds: int) -> dict[str, Any]:
    """Times every width with floats and with int8 weights."""
    variants: dict[tuple[str, int], Callable[[], float]] = {}
    for weights in ("float", "int8"):
        model = tide_jax.load(source, "float32", weights=weights)
        variants |= {(weights, width): pass_variant(model, width) for width in WIDTHS}
    times: dict[tuple[str, int], list[float]] = {name: [] for name in variants}
    for _ in tqdm(range(rounds), desc=source):
        for name, run in variants.items():
            times[name].append(1e3 * run())
    rows = []
    for (weights, width), found in times.items():
        ratio = statistics.median(t / one for t, one in zip(found, times[weights, 1], strict=True))
        rows.append({"weights": weights, "tokens": width, "ms": statistics.median(found), "ratio": ratio})
    return {"model": Path(source).name, "hidden_size": model.config.hidden_size, "passes": rows}


def pass_variant(model: Decoder, width: int) -> Callable[[], float]:
    """Seconds of one pass over `width` tokens; every pass reads what the one before answered."""
    tokens = jnp.asarray(random_prompts(model.config.vocab_size, 1, PROMPT), jnp.int32)
    prompt = Prompt(tokens, jnp.full((1,), PROMPT, jnp.int32))
    positions = PROMPT + jnp.arange(width, dtype=jnp.int32)[None]

    @jax.jit
    def start(model: Decoder) -> KVCache:
        return prefill(model, prompt, init_cache(model.config, 1, PROMPT + 2 * max(WIDTHS), model.dtype)).cache

    @jax.jit
    def loop(model: Decoder, cache: KVCache, tokens: jax.Array) -> jax.Array:
        def body(_: Any, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
            tokens, cache = carry
            out = run_depth(model, tokens, positions, cache)
            answers = likeliest(model.logits(out.states))
            return answers, cache.append(out.new, jnp.full_like(positions, -1), model.layers)._replace(
                length=cache.length
            )

        return lax.fori_loop(0, PASSES, body, (tokens, cache))[0]

    cache, first = start(model), tokens[:, :width]

    def run() -> float:
        begin = time.perf_counter()
        loop(model, cache, first).block_until_ready()
        return (time.perf_counter() - begin) / PASSES

    run()
    return run


def show(report: dict[str, Any]) -> None:
    table = Table("weights", "tokens", "ms", "ratio", title=f"passes of {report['model']}")
    for row in report["passes"]:
        table.add_row(row["weights"], str(row["tokens"]), f"{row['ms']:.1f}", f"{row['ratio']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

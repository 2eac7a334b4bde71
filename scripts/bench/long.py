"""Measures the time per token along one long generation, at full depth and batch 1.

  python -m scripts.bench.long MODEL --out scripts/results/long.json

MODEL is anything tide_jax.load takes. Tokens are streamed, so that each has its own time. Reported are medians over
windows, the number of compilations, and the expected cost of attention over the tokens so far: the bytes of their keys
and values over the bytes of the weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import tide_jax
from scripts.bench.decode import PROMPT, random_prompts
from scripts.reporting import machine, save
from tide_jax.functional import Decoder
from tide_jax.model.decoder import stored_parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--tokens", type=int, default=4000, help="tokens to generate (4000)")
    parser.add_argument("--window", type=int, default=500, help="tokens in a window (500)")
    args = parser.parse_args()
    model = tide_jax.load(args.model)
    times, compiled = token_times(model, args.tokens)
    report = {
        "model": {"layers": model.config.num_layers, "hidden_size": model.config.hidden_size},
        "method": {"prompt": PROMPT, "tokens": args.tokens, "window": args.window},
        "machine": machine(),
        "compilations_after_first_step": compiled,
        "windows": windows(model, times, args.window),
    }
    show(report)
    save(args.out, report)


def token_times(model: Decoder, count: int) -> tuple[list[float], int]:
    """Seconds of each token after the first two, and whether anything was compiled among them."""
    engine = tide_jax.TIDE(model)
    prompt = random_prompts(model.config.vocab_size, 1)
    times, known, last = [], None, time.perf_counter()
    stream = engine.stream(prompt, max_new_tokens=count, eos_token_id=[])
    for number, _ in enumerate(tqdm(stream, total=count, unit="token")):
        now = time.perf_counter()
        if number >= 2:  # prefill and the first step compile
            times.append(now - last)
        if number == 1:
            known = engine.programs.compile_time
        last = now
    return times, int(engine.programs.compile_time != known)


def windows(model: Decoder, times: list[float], size: int) -> list[dict[str, Any]]:
    weights = sum(p.value.nbytes for p in stored_parameters(model))
    heads, keys, values = model.config.cache_shape
    slot = model.config.num_layers * heads * (keys + values) * model.dtype.itemsize
    first = statistics.median(times[:size])
    rows = []
    for begin in range(0, len(times), size):
        part = times[begin : begin + size]
        middle = PROMPT + begin + len(part) // 2
        rows.append(
            {
                "tokens": [begin, begin + len(part)],
                "ms_per_token": 1e3 * statistics.median(part),
                "ratio_to_first": statistics.median(part) / first,
                "cache_bytes_over_weight_bytes": middle * slot / weights,
            }
        )
    return rows


def show(report: dict[str, Any]) -> None:
    table = Table(title=f"one generation, compilations after the first step: {report['compilations_after_first_step']}")
    for name in ("tokens so far", "ms/token", "over the first window", "cache bytes / weight bytes"):
        table.add_column(name, justify="right")
    for row in report["windows"]:
        table.add_row(
            f"{row['tokens'][0]} to {row['tokens'][1]}",
            f"{row['ms_per_token']:.1f}",
            f"{row['ratio_to_first']:.2f}",
            f"{row['cache_bytes_over_weight_bytes']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()

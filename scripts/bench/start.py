"""Measures `tide-jax generate` from the call to its first words, with and without cached programs, and its memory.

  python -m scripts.bench.start MODEL --routers routers.safetensors --out scripts/results/start.json

MODEL is a converted directory; compile times are those of random models. Every mode starts --warm + 1 times, the first
time with an empty program cache. Words are shown when they are complete, so the first takes two tokens or more. Memory
is the peak of resident pages, including those of the mapped file; its bound is 1.25 times the weights' bytes (routers
included) plus 500 MiB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

import tide_jax
from scripts.reporting import machine, save
from tide_jax.testing import random_routers, tiny_config, tiny_decoder

PROMPT = "Tell me about volcanoes and how they form."
TOKENS = 16


class Start(NamedTuple):
    """Seconds to the first words and to the end, and peak MiB."""

    first: float
    whole: float
    peak: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--routers", type=Path, help="for the modes with exits")
    parser.add_argument("--warm", type=int, default=3, help="starts after the first (3)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    exits = [] if args.routers is None else ["--routers", str(args.routers)]
    modes = {"full": ["--mode", "full"], "lossless": ["--mode", "lossless"]}
    if exits:
        modes["exits, propagate"] = [*exits, "--kv-strategy", "propagate"]
        modes["exits, recompute"] = [*exits, "--kv-strategy", "recompute"]
    rows = [measure(name, args.model, options, args.warm) for name, options in modes.items()]
    report = {
        "method": {"prompt": PROMPT, "tokens": TOKENS, "warm": args.warm},
        "machine": machine(),
        "modes": rows,
        "compile": [compile_times(layers) for layers in (16, 32)],
    }
    show(rows)
    Console().print(report["compile"])
    save(args.out, report)


def measure(name: str, model: Path, options: list[str], warm: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        cold, *later = (start(model, options, cache) for _ in range(warm + 1))
    files = [*model.glob("*.safetensors"), *(Path(o) for o in options if o.endswith(".safetensors"))]
    return {
        "name": name,
        "first": cold._asdict(),
        "later": Start(*(statistics.median(column) for column in zip(*later, strict=True)))._asdict(),
        "bound": 1.25 * sum(file.stat().st_size for file in files) / 2**20 + 500,
    }


def start(model: Path, options: list[str], cache: str) -> Start:
    command = [sys.executable, "-m", "tide_jax.cli", "generate", str(model), "--prompt", PROMPT]
    command += ["--max-new-tokens", str(TOKENS), *options]
    began = time.perf_counter()
    environment = os.environ | {"XDG_CACHE_HOME": cache}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        first = time.perf_counter() - began
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"tide-jax generate failed: {' '.join(command)}")
    return Start(first, time.perf_counter() - began, usage.ru_maxrss / 1024)


def compile_times(layers: int) -> dict[str, Any]:
    """Seconds to trace and compile a whole generation of a random model; the width hardly matters for that."""
    config = tiny_config(num_layers=layers)
    model, routers = tiny_decoder(config), random_routers(config, interval=4)
    seconds = {"layers": layers}
    for name, strategy in {"full": None, "exits, propagate": "propagate", "exits, recompute": "recompute"}.items():
        exits = None if strategy is None else tide_jax.ExitConfig(min_layers=1, kv_strategy=strategy)
        engine = tide_jax.TIDE(model, None if exits is None else routers, exits)
        seconds[name] = engine.generate([[1, 2, 3]], max_new_tokens=4).stats.compile_time
    return seconds


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="tide-jax generate")
    for name in ("mode", "first words, s", "later starts, s", "ratio", "peak MiB", "later", "bound"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for row in rows:
        cold, later = row["first"], row["later"]
        seconds = f"{cold['first']:.1f}", f"{later['first']:.1f}", f"{later['first'] / cold['first']:.2f}"
        table.add_row(row["name"], *seconds, f"{cold['peak']:.0f}", f"{later['peak']:.0f}", f"{row['bound']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()

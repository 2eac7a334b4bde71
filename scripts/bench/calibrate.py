"""Compares the time of calibration with a bare forward pass over the same tokens.

  python -m scripts.bench.calibrate MODEL --text texts.txt --out scripts/results/calibrate.json

MODEL is anything tide_jax.load takes, texts anything tide_jax.texts reads. One process runs tide_jax.calibrate from the
texts to trained routers, compilation included. Then it runs a jitted forward pass, compiled before its clock starts,
with every token's logits and their argmax, in batches of the same texts and widths. Results are in seconds of wall
clock and of processor time (over all cores); if other programs run, processor time is more reliable. A stage's time
runs from the last report of the previous stage to its own last report.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it reports a missing torch on standard error

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import tide_jax
from scripts.reporting import machine
from tide_jax.calibration.collect import Sample, tokenise
from tide_jax.calibration.data_parallel import Placement
from tide_jax.calibration.reading_plan import pad_texts
from tide_jax.cli.progress import progress_bars
from tide_jax.functional import Decoder
from tide_jax.texts import load_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--text", required=True, help="a .txt, .jsonl or .parquet file, or hub:NAME[:CONFIG[:SPLIT]]")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--save", type=Path, metavar="ROUTERS", help="keep the routers in this file")
    parser.add_argument("--samples", type=int, default=2000, help="texts to read (2000)")
    parser.add_argument("--batch-size", type=int, default=8, help="texts at once (8)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of each text (256)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default float32 on a CPU")
    args = parser.parse_args()

    model, tokenizer = tide_jax.load(args.model, args.dtype), tide_jax.load_tokenizer(args.model)
    texts = list(itertools.islice(load_texts(args.text), args.samples))
    config = tide_jax.CalibrationConfig(
        calibration_samples=args.samples,
        batch_size=args.batch_size,
        max_length=min(args.max_length, model.config.context_length),
        min_layers=min(tide_jax.CalibrationConfig.min_layers, model.config.num_layers),
    )
    samples = list(tokenise(tokenizer, texts, config, model.config.vocab_size))
    batches = forward_batches(samples, config)
    tokens, run = sum(len(s.ids) for s in samples), sum(batch[0].size for batch in batches)
    loaded = peak_memory()
    calibration, routers = time_calibration(model, tokenizer, texts, config, Path(args.text).name)
    if args.save:
        routers.save(args.save)
    calibrated = peak_memory()
    bare = time_forward(model, batches)
    report = {
        "model": {
            "layers": model.config.num_layers,
            "hidden_size": model.config.hidden_size,
            "dtype": str(model.dtype),
        },
        "text": {"name": Path(args.text).name, "texts": len(samples), "tokens": tokens, "tokens_with_padding": run},
        "forward": bare._asdict(),
        "calibration": calibration,
        "ratio": {name: calibration["total"][name] / getattr(bare, name) for name in Clock._fields},
        "peak_memory": {"loaded": loaded, "calibrated": calibrated, "with_forward": peak_memory()},
        "machine": machine("jaxlib", "optax"),
    }
    show(report)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")


class Clock(NamedTuple):
    """Seconds of wall clock and of processor time."""

    seconds: float
    cpu_seconds: float

    @classmethod
    def now(cls) -> Clock:
        """The current time of both clocks."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Clock) -> Clock:
        """Time since `start`."""
        return Clock(self.seconds - start.seconds, self.cpu_seconds - start.cpu_seconds)

    def plus(self, other: Clock) -> Clock:
        """The sum of both times."""
        return Clock(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)


def forward_batches(samples: list[Sample], config: tide_jax.CalibrationConfig) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of texts with similar length, padded like in the calibration's reading pass."""
    ordered, size = sorted(samples, key=lambda sample: len(sample.ids)), config.batch_size
    groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    widths = Placement().widths
    return [pad_texts(group, size, config.max_length, widths=widths)[:2] for group in groups]


def time_forward(model: Decoder, batches: list[tuple[np.ndarray, np.ndarray]]) -> Clock:
    @jax.jit
    def forward(model: Decoder, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return jnp.argmax(model(tokens, positions), axis=-1)

    for batch in {tokens.shape: (tokens, positions) for tokens, positions in batches}.values():
        forward(model, *batch).block_until_ready()
    start = Clock.now()
    with progress_bars() as progress:
        for done, batch in enumerate(batches, 1):
            np.asarray(forward(model, *batch))
            progress("bare forward pass", done, len(batches))
    return Clock.now().since(start)


def time_calibration(model: Decoder, *arguments: Any) -> tuple[dict[str, Any], tide_jax.Routers]:
    """Returns the total time, the time of each stage, and the routers."""
    tokenizer, texts, config, source = arguments
    stages, last = dict[str, Clock](), Clock.now()
    start = last
    with progress_bars() as bars:

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal last
            name = "tokenising and planning" if not stages else stage
            now = Clock.now()
            stages[name] = stages.get(name, Clock(0.0, 0.0)).plus(now.since(last))
            last = now
            bars(stage, done, total)

        routers = tide_jax.calibrate(model, tokenizer, texts, config, source=source, progress=progress)
    end = Clock.now()
    stages["report"] = end.since(last)
    report = {
        "total": end.since(start)._asdict(),
        "stages": {name: clock._asdict() for name, clock in stages.items()},
        "kept": {name: count for name, count in routers.report["counts"].items() if name.endswith("_tokens")},
    }
    return report, routers


def peak_memory() -> dict[str, int]:
    """Peak memory of this process so far, in bytes, and of the device if it reports that."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = jax.devices()[0].memory_stats() or {}
    return found | ({"device": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {})


def show(report: dict[str, Any]) -> None:
    console, text, ratio = Console(), report["text"], report["ratio"]
    calibration, forward = report["calibration"], report["forward"]
    rows = [(name, clock) for name, clock in calibration["stages"].items()]
    rows += [("calibration", calibration["total"]), ("bare forward pass", forward)]
    table = Table(title=f"{text['texts']} texts, {text['tokens']} tokens")
    fill(table, ("stage", "seconds", "CPU seconds"), rows, lambda row: [f"{row[n]:.1f}" for n in Clock._fields])
    console.print(table)
    memory = report["peak_memory"]
    console.print(
        f"calibration takes {ratio['seconds']:.2f} x the forward pass ({ratio['cpu_seconds']:.2f} x its CPU time); "
        f"memory rises from {memory['loaded']['process'] / 1e6:.0f} to {memory['calibrated']['process'] / 1e6:.0f} MB"
    )


def fill(table: Table, header: tuple[str, ...], rows: list[Any], cells: Callable[[Any], list[str]]) -> None:
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    for name, row in rows:
        table.add_row(name, *cells(row))


if __name__ == "__main__":
    main()

"""Demonstrates drift: makes a promise on one kind of text, and watches it on that kind and then on another.

  python -m scripts.bench.drift MODEL ROUTERS --calibrated-on wiki.txt --text gsm8k.jsonl --out drift.json

Texts of the first file that routers were not trained on (--skip) are split at random. Some certify a threshold
(`tide_jax.guarantee`; --exit-threshold sets one instead), the others are the control. One monitor watches scoring
calls over the control texts and then over the second file; another one watches only the second file. The JSON has both
running intervals of the disagreement beside the promised risk. This script measures no time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it reports a missing torch on standard error

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import tide_jax
from tide_jax.cli.progress import progress_bars
from tide_jax.texts import load_texts

Rows = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("routers", metavar="ROUTERS")
    parser.add_argument("--calibrated-on", required=True, metavar="FILE", help="text of the kind that is promised for")
    parser.add_argument("--text", required=True, metavar="FILE", help="text to run on then")
    parser.add_argument("--skip", type=int, default=0, help="texts of the first file that routers were trained on (0)")
    parser.add_argument("--risk", type=float, default=0.02)
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--certify", type=int, default=300, help="texts to certify a threshold with (300)")
    parser.add_argument("--exit-threshold", type=float, help="exit threshold to take as given; certifies none")
    parser.add_argument("--watch", type=int, default=200, help="texts of each kind to watch (200)")
    parser.add_argument("--rate", type=float, default=1.0, help="share of them to audit (all)")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--min-layers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default float32 on a CPU")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    model, tokenizer = tide_jax.load(args.model, args.dtype), tide_jax.load_tokenizer(args.model)
    engine = tide_jax.TIDE(
        model, tide_jax.Routers.load(args.routers, model=model), tide_jax.ExitConfig(min_layers=args.min_layers)
    )
    certify, control, other = read_texts(args, tokenizer)
    engine = settle(engine, certify, args)
    report = describe(args, engine) | {
        "switch": watch(engine, [("control", control), ("other", other)], args),
        "other alone": watch(engine, [("other", other)], args),
    }
    show(Console(), report)
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def read_texts(args: argparse.Namespace, tokenizer: Any) -> tuple[Rows, Rows, Rows]:
    """Token ids of the certifying texts, of the control texts, and of the other kind."""

    def rows(source: str, skip: int) -> Rows:
        texts = itertools.islice(load_texts(source), skip, None)
        ids = (list(tokenizer(text)["input_ids"])[: args.max_length] for text in texts)
        return [row for row in ids if len(row) > 1]

    random = np.random.default_rng(args.seed)
    known, other = rows(args.calibrated_on, args.skip), rows(args.text, 0)
    known, other = ([kind[i] for i in random.permutation(len(kind))] for kind in (known, other))
    count = 0 if args.exit_threshold is not None else args.certify
    return known[:count], known[count : count + args.watch], other[: args.watch]


def settle(engine: tide_jax.TIDE, certify: Rows, args: argparse.Namespace) -> tide_jax.TIDE:
    """Sets the engine to the threshold to watch."""
    if args.exit_threshold is not None:
        return engine.with_config(exit_threshold=args.exit_threshold)
    with progress_bars() as progress:
        config = tide_jax.guarantee(
            engine,
            certify,
            risk=args.risk,
            delta=args.delta,
            max_length=args.max_length,
            batch_size=args.batch_size,
            progress=progress,
        )
    return engine.with_config(exit_threshold=config.exit_threshold, guarantee=config.guarantee)


def describe(args: argparse.Namespace, engine: tide_jax.TIDE) -> dict[str, Any]:
    """Origin of the numbers, without local folder names."""
    promise = engine.config.guarantee
    return {
        "model": Path(args.model).name,
        "routers": Path(args.routers).name,
        "calibrated_on": Path(args.calibrated_on).name,
        "text": Path(args.text).name,
        "max_length": args.max_length,
        "seed": args.seed,
        "rate": args.rate,
        "risk": args.risk,
        "delta": args.delta,
        "exit_threshold": engine.config.exit_threshold,
        "min_layers": engine.config.min_layers,
        "guarantee": None if promise is None else promise.to_dict(),
        "device": str(jax.devices()[0]),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def watch(engine: tide_jax.TIDE, kinds: list[tuple[str, Rows]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Scores texts of each kind in turn; returns the monitor's report after each batch, as disagreement."""
    monitor = tide_jax.DriftMonitor(args.rate, seed=args.seed, risk=args.risk, delta=args.delta)
    history = []
    for kind, rows in kinds:
        for start in tqdm(range(0, len(rows), args.batch_size), desc=f"watching {kind}"):
            drift = engine(rows[start : start + args.batch_size], monitor=monitor).stats.drift
            assert drift is not None
            history.append(
                {
                    "kind": kind,
                    "sequences": drift.sequences,
                    "audited": drift.audited,
                    "tokens": drift.tokens,
                    "disagreement": None if drift.agreement is None else 1.0 - drift.agreement,
                    "lower": 1.0 - drift.upper,
                    "upper": 1.0 - drift.lower,
                    "status": drift.status,
                }
            )
    return history


def show(console: Console, report: dict[str, Any]) -> None:
    """Prints each monitor's state at the end of each kind of text, and when it first reported "exceeded"."""
    table = Table(title=f"promised risk {report['risk']:.2%}, threshold {report['exit_threshold']}")
    for column in ("monitor", "after", "audited", "disagreement", "interval", "status", "first exceeded"):
        table.add_column(column)
    for name in ("switch", "other alone"):
        history = report[name]
        exceeded = next((str(row["audited"]) for row in history if row["status"] == "exceeded"), "-")
        for _, rows in itertools.groupby(history, key=lambda row: row["kind"]):
            last = list(rows)[-1]
            mean = "-" if last["disagreement"] is None else f"{last['disagreement']:.2%}"
            interval = f"{last['lower']:.2%} to {last['upper']:.2%}"
            table.add_row(name, last["kind"], str(last["audited"]), mean, interval, last["status"], exceeded)
    console.print(table)


if __name__ == "__main__":
    main()

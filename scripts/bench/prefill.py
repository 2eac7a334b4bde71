"""Measures prompts whose tokens may exit: time of a pass against full depth, and the layers that tokens run.

  python -m scripts.bench.prefill MODEL ROUTERS --text FILE --out scripts/results/prefill.json

MODEL and ROUTERS are what tide_jax.load and tide_jax.Routers.load take, FILE is a text to cut prompts from. Each
threshold is measured in two ways. "masked" runs every layer for all tokens until the last one has exited; "survivors"
runs deep layers only for the tokens that have not exited. Each run is paired with one at full depth. Times are those of
the pass and the last token's logits, medians over prompts and rounds; ratios are computed within a pair.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import tide_jax
from scripts.reporting import machine, save
from tide_jax.exits.depth import run_depth
from tide_jax.exits.exits import Exits
from tide_jax.functional import Decoder
from tide_jax.texts import load_texts

WAYS = ("masked", "survivors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("routers", metavar="ROUTERS")
    parser.add_argument(
        "--text", required=True, metavar="FILE", help="what prompts are cut from (.txt, .jsonl, .parquet)"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a prompt (512)")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.5, 0.3])
    parser.add_argument("--min-layers", type=int, default=8)
    args = parser.parse_args()

    model = tide_jax.load(args.model)
    routers = tide_jax.Routers.load(args.routers, model=model)
    prompts = cut_prompts(tide_jax.load_tokenizer(args.model), args.text, args.tokens, args.prompts)
    report = {
        "model": {
            "layers": model.config.num_layers,
            "hidden_size": model.config.hidden_size,
            "dtype": str(model.dtype),
        },
        "method": {name: getattr(args, name) for name in ("tokens", "prompts", "rounds", "min_layers")},
        "machine": machine(),
        **measure(model, routers, prompts, args),
    }
    show(report)
    save(args.out, report)


def cut_prompts(tokenizer: Any, source: str, tokens: int, count: int) -> Int[Array, "N 1 T"]:
    """Cuts the beginning of a text into prompts of `tokens` tokens."""
    ids: list[int] = []
    for text in load_texts(source):
        ids += tokenizer.encode(text + "\n", add_special_tokens=False)
        if len(ids) >= tokens * count:
            return jnp.asarray(np.reshape(ids[: tokens * count], (count, 1, tokens)), jnp.int32)
    raise SystemExit(f"{source} has {len(ids)} tokens, {count} prompts of {tokens} need {tokens * count}")


class Pass(NamedTuple):
    """One prompt's pass: its seconds, the layers that each token ran, and the token it predicts."""

    seconds: float
    layers: np.ndarray
    following: int


class Variant:
    """One compiled way to run a prompt; its dials are arguments."""

    def __init__(self, model: Decoder, tokens: int, exits: Exits | None, survivors: bool) -> None:
        positions = jnp.arange(tokens, dtype=jnp.int32)[None]

        def run(
            model: Decoder, ids: Int[Array, "1 T"], exits: Exits | None
        ) -> tuple[Int[Array, "1 T"], Float[Array, " V"], Any]:
            out = run_depth(model, ids, positions, None, exits, survivors=survivors)
            return out.exit_layers, model.logits(out.states[:, -1:])[0, 0], out.new

        start = time.perf_counter()
        self._model = model
        self._run = jax.jit(run).lower(model, jnp.zeros((1, tokens), jnp.int32), exits).compile()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self, ids: Int[Array, "1 T"], exits: Exits | None) -> Pass:
        start = time.perf_counter()
        layers, logits, _ = jax.block_until_ready(self._run(self._model, ids, exits))
        return Pass(time.perf_counter() - start, np.asarray(layers[0]) + 1, int(jnp.argmax(logits)))


def measure(
    model: Decoder, routers: tide_jax.Routers, prompts: Int[Array, "N 1 T"], args: argparse.Namespace
) -> dict[str, Any]:
    """Measures full depth, and both ways at every threshold."""
    weights = routers.without_metadata()

    def exits(threshold: float) -> Exits:
        return Exits.uniform(weights, threshold, args.min_layers, prompt=True)

    full = Variant(model, args.tokens, None, False)
    ways = {way: Variant(model, args.tokens, exits(1.0), way == "survivors") for way in WAYS}
    found: dict[tuple[str, float], list[Pass]] = {(way, t): [] for way in WAYS for t in args.thresholds}
    beside: dict[tuple[str, float], list[Pass]] = {key: [] for key in found}
    for turn in tqdm(range(args.rounds + 1), desc="rounds"):  # the first round warms up
        for ids in prompts:
            for way, threshold in found:
                runs = full(ids, None), ways[way](ids, exits(threshold))
                if turn:
                    beside[way, threshold].append(runs[0])
                    found[way, threshold].append(runs[1])
    everything = [run.seconds for runs in beside.values() for run in runs]
    return {
        "compile_seconds": {"full": full.compile_seconds} | {way: ways[way].compile_seconds for way in WAYS},
        "full_seconds": statistics.median(everything),
        "passes": [summary(model, *key, found[key], beside[key]) for key in found],
    }


def summary(model: Decoder, way: str, threshold: float, found: list[Pass], full: list[Pass]) -> dict[str, Any]:
    layers = float(np.mean([run.layers for run in found]))
    return {
        "way": way,
        "threshold": threshold,
        "seconds": statistics.median(run.seconds for run in found),
        "time_over_full": statistics.median(a.seconds / b.seconds for a, b in zip(found, full, strict=True)),
        "layers_per_token": layers,
        "depth": layers / model.config.num_layers,
        "same_next_token": float(np.mean([a.following == b.following for a, b in zip(found, full, strict=True)])),
    }


def show(report: dict[str, Any]) -> None:
    compiled = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report["compile_seconds"].items())
    tokens = report["method"]["tokens"]
    table = Table(title=f"{tokens} tokens at full depth: {report['full_seconds']:.3f} s; compiled in: {compiled}")
    for name in ("way", "threshold", "seconds", "time / full", "layers / token", "depth", "same next token"):
        table.add_column(name, justify="right")
    for row in report["passes"]:
        table.add_row(
            row["way"],
            f"{row['threshold']:.2f}",
            f"{row['seconds']:.3f}",
            f"{row['time_over_full']:.3f}",
            f"{row['layers_per_token']:.2f}",
            f"{row['depth']:.3f}",
            f"{row['same_next_token']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()

"""Measures weight products on a CPU: XLA's and our own, alone by rows, and inside decoding at full depth.

  python -m scripts.bench.products MODEL --out scripts/results/products.json

MODEL is anything tide_jax.load takes. All variants run in one process on the same threads, one round of all after the
other; reported are medians and spreads over the rounds. "bytes alone" is the floor: all cores read as many bytes of
weights as a step, and do nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import tide_jax
from pallas_kernels.weight_product import kernel_off
from scripts.bench.decode import engine_variant
from scripts.bench.memory_floor import reader
from scripts.reporting import machine, save
from tide_jax.cli.inspection import bytes_read
from tide_jax.functional import Decoder
from tide_jax.model.ops import times_rows

SHAPES = ((576, 1536), (576, 576), (896, 4864), (1536, 576), (4864, 896))
"""Depth and outputs of the products that are timed alone: those of SmolLM2-135M and of Qwen2.5-0.5B."""
ROWS = (1, 2, 4, 8, 16)
LOOP_BYTES = 200e6
"""float32 weights that a loop reads: more than any cache holds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?", help="left out: only products alone")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=32, help="tokens generated per row (32)")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    report: dict[str, Any] = {
        "machine": machine(),
        "method": {"rounds": args.rounds, "steps": args.steps},
        "products": [bench_product(*shape, args.rounds) for shape in SHAPES],
    }
    show_products(report)
    if args.model is not None:
        report |= bench_model(args.model, args)
        show_decoding(report)
    save(args.out, report)


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, minimum and maximum in milliseconds."""
    return {"ms": 1e3 * statistics.median(seconds), "min": 1e3 * min(seconds), "max": 1e3 * max(seconds)}


def alternate(variants: dict[str, Callable[[], float]], rounds: int, about: str) -> dict[str, dict[str, float]]:
    """Runs the variants in turn and collects the seconds that each reports."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in tqdm(range(rounds), desc=about):
        for name, run in variants.items():
            times[name].append(run())
    return {name: summary(seconds) for name, seconds in times.items()}


def bench_product(depth: int, outputs: int, rounds: int) -> dict[str, Any]:
    """Times a loop over many matrices of one shape: milliseconds by rows and kind."""
    count = int(LOOP_BYTES / (4 * depth * outputs))
    rng = np.random.default_rng(0)
    whole = jnp.asarray(rng.integers(-127, 128, (count, outputs, depth), np.int8))
    weights = {"float32": whole.astype(jnp.float32), "int8": whole}
    scale = jnp.full((outputs,), 1e-2, jnp.float32)
    variants = {
        f"{name}, {rows}": product_variant(weights[kind], scale, rows, own=own)
        for rows in ROWS
        for name, kind, own in (("XLA", "float32", False), ("float32", "float32", True), ("int8", "int8", True))
    }
    times = alternate(variants, rounds, f"{depth} x {outputs}")
    return {"depth": depth, "outputs": outputs, "matrices": count, "times": times}


def product_variant(weights: jax.Array, scale: jax.Array, rows: int, *, own: bool) -> Callable[[], float]:
    """One pass over all matrices; each product depends on the previous one."""

    @jax.jit
    def loop(weights: jax.Array, x: jax.Array) -> jax.Array:
        def body(x: jax.Array, matrix: jax.Array) -> tuple[jax.Array, None]:
            out = times_rows(x, matrix, scale if matrix.dtype == jnp.int8 else None)
            return x + 1e-9 * jnp.tanh(out[:, :1]), None

        return lax.scan(body, x, weights)[0]

    x = jnp.ones((rows, weights.shape[-1]), jnp.float32)
    with contextlib.nullcontext() if own else kernel_off():
        program = loop.lower(weights, x).compile()

    def run() -> float:
        start = time.perf_counter()
        program(weights, x).block_until_ready()
        return time.perf_counter() - start

    run()
    return run


def bench_model(source: str, args: argparse.Namespace) -> dict[str, Any]:
    """Times decoding at full depth: milliseconds per step by batch size."""
    models = {"float32": tide_jax.load(source, "float32"), "int8": tide_jax.load(source, "float32", weights="int8")}
    read = {name: bytes_read(model.config)[model.precision] for name, model in models.items()}
    batches = []
    for batch in args.batch:
        variants = {"XLA": without_own(models["float32"], batch, args.steps)}
        variants |= {name: engine_variant(model, None, batch, args.steps) for name, model in models.items()}
        variants |= {f"{name}, bytes alone": reader(count) for name, count in read.items()}
        batches.append({"batch": batch, "times": alternate(variants, args.rounds, f"batch {batch}")})
    return {"bytes_of_a_token": read, "decoding": batches}


def without_own(model: Decoder, batch: int, steps: int) -> Callable[[], float]:
    """Decoding with XLA's products. Every run must stay inside `kernel_off`; otherwise the program is traced again."""
    with kernel_off():
        inside = engine_variant(model, None, batch, steps)

    def run() -> float:
        with kernel_off():
            return inside()

    return run


def show_products(report: dict[str, Any]) -> None:
    for product in report["products"]:
        table = Table("", *map(str, ROWS), title=f"{product['matrices']} x [{product['depth']}, {product['outputs']}]")
        for name in ("XLA", "float32", "int8"):
            table.add_row(name, *(f"{product['times'][f'{name}, {rows}']['min']:.1f}" for rows in ROWS))
        Console().print(table)


def show_decoding(report: dict[str, Any]) -> None:
    names = list(report["decoding"][0]["times"])
    table = Table("batch", *names, title="ms a step at full depth")
    for row in report["decoding"]:
        table.add_row(str(row["batch"]), *(f"{row['times'][name]['ms']:.1f}" for name in names))
    Console().print(table)


if __name__ == "__main__":
    main()

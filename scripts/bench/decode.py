"""Measures time against depth: decoding at full depth, with routers that never exit, at forced depths; transformers.

  python -m scripts.bench.decode MODEL --out scripts/results/decode.json

MODEL is anything tide_jax.load takes. Everything runs in one process on the same weights and threads. Each round runs
all variants, each followed by a full-depth run for comparison; reported are medians and spreads over the rounds. A
variant's time per token is the time of a long generation minus that of a one-token generation by the same compiled
program, which excludes prefill and start-up.

"weights read once" is the floor: all cores together read as many bytes as the model's weights, and do nothing else.

Skip efficiency = (time saved / layer time at full depth) / (share of layers skipped), where layer time is full-depth
time minus the time of embedding, output head and argmax alone; computed within each pair, median over the rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it reports a missing torch on standard error

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import tide_jax
from scripts.bench.float_copy import load_reference
from scripts.bench.memory_floor import reader
from scripts.reporting import machine, save
from tide_jax.cli.inspection import bytes_read
from tide_jax.exits.deferred_fill import is_faster
from tide_jax.exits.exits import Exits
from tide_jax.functional import Decoder, generate_tokens
from tide_jax.generation.generate import Prompt, Request
from tide_jax.generation.sampling import make_sampling
from tide_jax.testing import constant_routers

PROMPT = 32
Variant = Callable[[], float]
"""Runs once and returns seconds per decode step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=48, help="tokens generated per row (48)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--interval", type=int, default=5, help="layers in a group (5)")
    parser.add_argument(
        "--transformers", metavar="SOURCE", help="the same weights as transformers loads them (needs torch)"
    )
    args = parser.parse_args()

    model = tide_jax.load(args.model)
    reference = load_reference(args.transformers)
    batches = [bench_batch(model, reference, batch, args) for batch in args.batch]
    report = {
        "model": {
            "layers": model.config.num_layers,
            "hidden_size": model.config.hidden_size,
            "dtype": str(model.dtype),
        },
        "method": {"prompt": PROMPT, "steps": args.steps, "rounds": args.rounds, "interval": args.interval},
        "machine": machine(),
        "batches": batches,
    }
    for row in batches:
        show(row, model.config.num_layers)
    save(args.out, report)


def bench_batch(model: Decoder, reference: Any, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measures all variants at one batch size."""
    interval = args.interval
    routers = constant_routers(model.config, interval=interval, bottleneck=128)
    never = constant_routers(model.config, interval=interval, exits=False, bottleneck=128)
    variants: dict[str, Variant] = {
        "full": engine_variant(model, None, batch, args.steps),
        "full, routers on": engine_variant(model, forced(model, never, interval, batch), batch, args.steps),
        "head only": head_variant(model, batch, args.steps),
    }
    if batch == 1:
        variants["weights read once"] = reader(bytes_read(model.config)[model.precision])
    for exit_point in routers.exit_points:
        exits = forced(model, routers, exit_point + 1, batch)
        variants[f"forced {exit_point + 1}"] = engine_variant(model, exits, batch, args.steps)
    middle = min(routers.exit_points, key=lambda c: abs(2 * (c + 1) - model.config.num_layers)) + 1
    recomputed = dataclasses.replace(forced(model, routers, middle, batch), kv_strategy="recompute")
    variants[f"forced {middle} recompute"] = engine_variant(model, recomputed, batch, args.steps)
    if reference is not None:
        variants["transformers"] = reference_variant(reference, model.config.vocab_size, batch, args.steps)
    times: dict[str, list[float]] = {name: [] for name in variants}
    beside: dict[str, list[float]] = {name: [] for name in variants}
    for _ in tqdm(range(args.rounds), desc=f"batch {batch}"):
        for name, run in variants.items():
            times[name].append(run())
            beside[name].append(variants["full"]())
    return {"batch": batch, "variants": summarise(times, beside, model.config.num_layers, batch)}


def forced(model: Decoder, routers: tide_jax.Routers, depth: int, batch: int) -> Exits:
    """Exits with scores that always pass, at the first exit point after `depth` layers.

    Cache rows of skipped layers are projected at once or deferred, as in the engine.
    """
    return Exits.uniform(routers, 0.5, depth, deferred=is_faster(model, batch))


def engine_variant(model: Decoder, exits: Exits | None, batch: int, steps: int) -> Variant:
    tokens = jnp.asarray(random_prompts(model.config.vocab_size, batch), jnp.int32)
    prompt = Prompt(tokens, jnp.full((batch,), PROMPT, jnp.int32))
    program = jax.jit(generate_tokens, static_argnames="capacity")

    def generate(count: int) -> float:
        request = Request(
            sampling=make_sampling(),
            key=jax.random.key(0),
            eos=jnp.full((batch, 1), -1, jnp.int32),
            pad=jnp.int32(0),
            max_new_tokens=jnp.int32(count),
        )
        start = time.perf_counter()
        jax.block_until_ready(program(model, prompt, request, exits, capacity=steps))
        return time.perf_counter() - start

    return lambda: seconds_a_step(generate, steps)


def seconds_a_step(generate: Callable[[int], float], steps: int) -> float:
    """Seconds of a decode step, from a generation of one token and one of `steps`.

    A short generation comes first, untimed: it compiles, and it brings weights back that other variants may have pushed
    out of memory.
    """
    generate(1)
    short = generate(1)
    return (generate(steps) - short) / (steps - 1)


def head_variant(model: Decoder, batch: int, steps: int) -> Variant:
    """Embedding, final norm, output head and argmax, without layers."""

    @jax.jit
    def loop(model: Decoder, tokens: jax.Array) -> jax.Array:
        def body(_: Any, tokens: jax.Array) -> jax.Array:
            x = model.embed_tokens(tokens[:, None], jnp.zeros((batch, 1), jnp.int32))
            return jnp.argmax(model.logits(model.final_norm(model.residual(x)))[:, 0], axis=-1).astype(jnp.int32)

        return lax.fori_loop(0, steps, body, tokens)

    def run() -> float:
        start = time.perf_counter()
        loop(model, jnp.zeros((batch,), jnp.int32)).block_until_ready()
        return (time.perf_counter() - start) / steps

    run()
    return run


def reference_variant(reference: Any, vocabulary: int, batch: int, steps: int) -> Variant:
    import torch

    tokens = torch.tensor(random_prompts(vocabulary, batch))

    def generate(count: int) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            reference.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return time.perf_counter() - start

    return lambda: seconds_a_step(generate, steps)


def random_prompts(vocabulary: int, batch: int, length: int = PROMPT) -> np.ndarray:
    return np.random.default_rng(0).integers(5, vocabulary, (batch, length))


def summarise(
    times: dict[str, list[float]], beside: dict[str, list[float]], layers: int, batch: int
) -> list[dict[str, Any]]:
    """For each variant: medians, ratios to the full-depth run right after it, and skip efficiency."""
    head = statistics.median(times["head only"])
    rows = []
    for name, values in times.items():
        median = statistics.median(values)
        row: dict[str, Any] = {
            "name": name,
            "ms_per_step": 1e3 * median,
            "ms_min": 1e3 * min(values),
            "ms_max": 1e3 * max(values),
            "tokens_per_second": batch / median,
            "ratio_to_full": statistics.median(v / f for v, f in zip(values, beside[name], strict=True)),
        }
        if name.startswith("forced"):
            depth = int(name.split()[1])
            row["layers"] = depth
            row["kv_strategy"] = "recompute" if name.endswith("recompute") else "propagate"
            saved = ((f - v) / (f - head) for v, f in zip(values, beside[name], strict=True))
            row["skip_efficiency"] = statistics.median(saved) / (1 - depth / layers)
        rows.append(row)
    return rows


def show(report: dict[str, Any], layers: int) -> None:
    table = Table(title=f"decoding, batch {report['batch']}, {layers} layers")
    for name in ("variant", "ms/step", "min", "max", "tokens/s", "time ratio", "skip efficiency"):
        table.add_column(name, justify="left" if name == "variant" else "right")
    for row in report["variants"]:
        efficiency = f"{row['skip_efficiency']:.2f}" if "skip_efficiency" in row else ""
        numbers = [f"{row[k]:.2f}" for k in ("ms_per_step", "ms_min", "ms_max")]
        table.add_row(
            row["name"], *numbers, f"{row['tokens_per_second']:.1f}", f"{row['ratio_to_full']:.2f}", efficiency
        )
    Console().print(table)


if __name__ == "__main__":
    main()

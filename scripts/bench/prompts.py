"""Measures the time until the first token of long prompts, and the memory that reading them takes.

  python -m scripts.bench.prompts MODEL --transformers SOURCE --out scripts/results/prompts.json

MODEL is anything tide_jax.load takes; SOURCE has the same weights for transformers (needs torch). In each round all
variants read one prompt of random tokens, one after the other: tide_jax at full depth, and transformers with its
default attention ("sdpa": one fused kernel) and with its plain one ("eager"). Each variant runs once before the first
round. Reported are medians, and ratios within a round. Peak memory is that of a process with nothing else, weights
included, while it reads the prompt for the second time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it reports a missing torch on standard error

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import tide_jax
from scripts.bench.decode import random_prompts
from scripts.bench.float_copy import float_copy
from scripts.bench.peer_memory import peaks
from scripts.reporting import machine, save
from tide_jax.functional import Decoder, KVCache, init_cache, prefill
from tide_jax.generation.generate import Prompt

OURS, PEERS = "full", ("sdpa", "eager")
_LIMIT = 600  # seconds after which a process that measures memory is given up
Run = Callable[[np.ndarray], Any]
"""Reads a prompt ``[1, T]``, and returns when the first token is known."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--transformers", metavar="SOURCE", help="the same weights as transformers loads them")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048, 4096], help="(128 512 2048 4096)")
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--memory-of", nargs=2, metavar=("VARIANT", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        run, prompt = variant(args.memory_of[0], args.model), prompt_of(int(args.memory_of[1]))
        print(json.dumps(peaks(lambda: run(prompt))["generating"]))
        return
    peers = PEERS if args.transformers and importlib.util.find_spec("torch") else ()
    with float_copy(args.transformers) if peers else nullcontext(tempfile.gettempdir()) as folder:
        sources = {OURS: args.model, **dict.fromkeys(peers, str(folder))}
        held = {n: {name: peak_memory(name, source, n) for name, source in sources.items()} for n in args.tokens}
        variants = {name: variant(name, source) for name, source in sources.items()}
    report = {
        "model": str(args.model),
        "method": {"rounds": args.rounds},
        "machine": machine(),
        "prompts": [{**measure(variants, n, args.rounds), "peak_mib": held[n]} for n in args.tokens],
    }
    show(report)
    save(args.out, report)


def variant(name: str, source: str) -> Run:
    """A variant by name, loaded from its source: a model of tide_jax, or a folder for transformers."""
    return ours(tide_jax.load(source, "float32")) if name == OURS else peer(source, name)


def ours(model: Decoder) -> Run:
    @jax.jit
    def first_token(model: Decoder, prompt: Prompt, cache: KVCache) -> Any:
        step = prefill(model, prompt, cache)
        return step.cache, jnp.argmax(step.logits, axis=-1)

    def run(tokens: np.ndarray) -> Any:
        prompt = Prompt(jnp.asarray(tokens, jnp.int32), jnp.full((1,), tokens.shape[1], jnp.int32))
        cache = init_cache(model.config, 1, tokens.shape[1] + 1, model.dtype)
        return jax.block_until_ready(first_token(model, prompt, cache))

    return run


def peer(folder: str, attention: str) -> Run:
    import torch

    from scripts.bench.peer_transformers import load_peer

    model = load_peer(Path(folder), attention)

    def run(tokens: np.ndarray) -> Any:
        with torch.no_grad():
            return model(torch.tensor(tokens), use_cache=True, logits_to_keep=1).logits.argmax(-1).item()

    return run


def timed(run: Run, tokens: np.ndarray) -> Callable[[], float]:
    """Reads a prompt and returns the seconds it takes."""

    def once() -> float:
        start = time.perf_counter()
        run(tokens)
        return time.perf_counter() - start

    return once


def warmed(run: Callable[[], float]) -> Callable[[], float]:
    """With an untimed run before each timed one, which brings weights back that others pushed out of memory."""

    def twice() -> float:
        run()
        return run()

    return twice


def prompt_of(tokens: int) -> np.ndarray:
    """A prompt ``[1, T]`` of random tokens that every vocabulary has."""
    return random_prompts(250, 1, tokens)


def measure(variants: dict[str, Run], tokens: int, rounds: int) -> dict[str, Any]:
    """Times all variants with one prompt, in turn."""
    prompt = prompt_of(tokens)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run(prompt)
    for _ in tqdm(range(rounds), desc=f"{tokens} tokens"):
        for name, run in variants.items():
            times[name].append(timed(run, prompt)())
    rows = {
        name: {
            "ms": 1e3 * statistics.median(taken),
            "min": 1e3 * min(taken),
            "max": 1e3 * max(taken),
            "of_ours": statistics.median(other / own for other, own in zip(taken, times[OURS], strict=True)),
        }
        for name, taken in times.items()
    }
    return {"tokens": tokens, "variants": rows}


def peak_memory(name: str, source: str, tokens: int) -> float | None:
    """Peak resident MiB while a variant reads a prompt for the second time, in a new process; None if it fails."""
    command = [sys.executable, "-m", "scripts.bench.prompts", source, "--memory-of", name, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT)
    if done.returncode:
        print(f"memory of {name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def show(report: dict[str, Any]) -> None:
    table = Table("tokens", "variant", "ms", "min", "max", "x of ours", "peak MiB", title="prompts")
    for entry in report["prompts"]:
        for name, row in entry["variants"].items():
            numbers = [f"{row[key]:.0f}" for key in ("ms", "min", "max")]
            held = entry["peak_mib"][name]
            table.add_row(
                str(entry["tokens"]), name, *numbers, f"{row['of_ours']:.2f}", "" if held is None else f"{held:.0f}"
            )
    Console().print(table)


if __name__ == "__main__":
    main()

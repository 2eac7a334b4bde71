"""Times models with recurrent layers: decode steps beside an attention model's, and long prompts beside transformers'.

  python -m scripts.bench.hybrids --out scripts/results/hybrids.json

Each model is a random transformers checkpoint (needs torch), made here, of about 100 M weights: the time of a step
depends on sizes, not on what the weights say. "llama" is the attention model of the same width and depth. A step's
speed is the bytes of weights that it reads, per second; its share is that of the attention model in the same round.
Prompts are read by tide_jax at full depth and by transformers, with its plain torch code and its default attention.
A lossless pass verifies drafts; then states take in the accepted ones. That is compared with a second pass over these,
which a model whose states cannot wait for the verdict would need.
Variants alternate in one process after a run of each; reported are medians, and medians of the ratios of each round.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import tide_jax
from convert import convert
from scripts.bench.prompts import OURS, measure, ours, peer
from scripts.reporting import machine, save
from tide_jax import TIDE
from tide_jax.exits.depth import DepthOutput, run_depth, run_whole
from tide_jax.model.cache import KVCache, empty_cache
from tide_jax.model.decoder import Decoder, stored_parameters

SIZES: dict[str, Any] = {
    "vocab_size": 16384, "hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2048,
    "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip
_MIXED = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 3
_LINEAR = {
    "linear_num_key_heads": 8, "linear_num_value_heads": 16, "linear_key_head_dim": 96, "linear_value_head_dim": 96,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 24, "mamba_d_state": 128, "shared_intermediate_size": 2048, "num_local_experts": 0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": [n.replace("linear_attention", "conv") for n in _MIXED]},
    "qwen3_5_text": {**_LINEAR, "layer_types": _MIXED},
    "granitemoehybrid": {**_MAMBA, "layer_types": _MIXED},
    "mamba": {"num_hidden_layers": 24, "expand": 2},
}
"""Model types of transformers, with the settings that differ from `SIZES`."""
PROMPT, STEPS = 64, 49
DRAFTS, KEPT = 8, 5
"""Tokens of a lossless pass, and how many of them are accepted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="of the prompts (512 2048)")
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folders = {name: checkpoint(name, Path(directory)) for name in dict.fromkeys(["llama", *args.only])}
        models = {name: tide_jax.load(folder / "converted", "float32") for name, folder in folders.items()}
        decoding = decode({name: TIDE(model) for name, model in models.items()}, args.rounds)
        verdicts = {name: verdict(model, args.rounds) for name, model in models.items() if model.config.recurrent_types}
        prompts = {
            name: [
                measure({OURS: ours(models[name]), "transformers": peer(str(folder), "sdpa")}, n, args.rounds)
                for n in args.tokens
            ]
            for name, folder in folders.items()
        }
    report = {
        "method": {"rounds": args.rounds, "steps": STEPS - 1, "prompt": PROMPT, "drafts": DRAFTS, "kept": KEPT},
        "machine": machine(),
        "models": {
            name: {**decoding[name], "prompts": prompts[name], "verdict": verdicts.get(name)} for name in models
        },
    }
    show(report)
    save(args.out, report)


def checkpoint(name: str, directory: Path) -> Path:
    """A random checkpoint of transformers, and beside it the folder that tide_jax makes of it."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    names = set(CONFIG_MAPPING[name]().to_dict())
    settings = {key: value for key, value in SIZES.items() if key in names} | MODELS[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**settings)).save_pretrained(directory / name)
    convert(directory / name, directory / name / "converted", dtype="float32")
    return directory / name


def decode(engines: dict[str, TIDE], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds and gigabytes a second of a decode step at full depth, one row."""
    prompt = np.random.default_rng(0).integers(3, 250, (1, PROMPT)).tolist()

    def seconds(engine: TIDE, tokens: int) -> float:
        start = time.perf_counter()
        engine.generate(prompt, max_new_tokens=tokens, mode="full", eos_token_id=[])
        return time.perf_counter() - start

    def step(engine: TIDE) -> Callable[[], float]:
        return lambda: (seconds(engine, STEPS) - seconds(engine, 1)) / (STEPS - 1)

    runs = {name: step(engine) for name, engine in engines.items()}
    times = alternating(runs, rounds, "decode")
    weights = {name: sum(p.value.nbytes for p in stored_parameters(engine.model)) for name, engine in engines.items()}
    speeds = {name: [weights[name] / t for t in taken] for name, taken in times.items()}
    return {
        name: {
            "ms": 1e3 * statistics.median(times[name]),
            "weight_mb": weights[name] / 1e6,
            "gb_per_second": statistics.median(speeds[name]) / 1e9,
            "of_attention": statistics.median(a / b for a, b in zip(speeds[name], speeds["llama"], strict=True)),
        }
        for name in engines
    }


def verdict(model: Decoder, rounds: int) -> dict[str, float]:
    """Milliseconds of a pass over drafts, of taking in the accepted ones, and of running those once more instead."""

    def passed(model: Decoder, cache: KVCache, tokens: Array, positions: Array) -> DepthOutput:
        return run_depth(model, tokens, positions, cache)

    def taken_in(model: Decoder, cache: KVCache, new: tuple[Any, ...], positions: Array) -> KVCache:
        return cache.append(new, positions, model.layers)

    def ran_again(model: Decoder, cache: KVCache, tokens: Array, positions: Array) -> KVCache:
        out = run_whole(model, tokens, positions, cache)
        return cache.append(out.new, positions, model.layers)

    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(3, 250, (1, PROMPT + DRAFTS)), jnp.int32)
    positions = jnp.arange(PROMPT + DRAFTS, dtype=jnp.int32)[None]
    cache = jax.jit(ran_again)(
        model, empty_cache(model.config, 1, 2 * PROMPT, jnp.float32), tokens[:, :PROMPT], positions[:, :PROMPT]
    )
    drafts, places = tokens[:, PROMPT:], positions[:, PROMPT:]
    kept = jnp.where(places < PROMPT + KEPT, places, -1)
    new = jax.jit(passed)(model, cache, drafts, places).new
    runs: dict[str, Callable[[], Any]] = {
        "pass_ms": functools.partial(jax.jit(passed), model, cache, drafts, places),
        "take_in_ms": functools.partial(jax.jit(taken_in), model, cache, new, kept),
        "run_again_ms": functools.partial(jax.jit(ran_again), model, cache, drafts[:, :KEPT], places[:, :KEPT]),
    }

    def timed(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    clocks = {name: functools.partial(timed, run) for name, run in runs.items()}
    return {name: 1e3 * statistics.median(taken) for name, taken in alternating(clocks, 3 * rounds, "verdict").items()}


def alternating(runs: dict[str, Callable[[], float]], rounds: int, title: str) -> dict[str, list[float]]:
    """What each run gives in each round; all run once before, to compile."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(rounds), desc=title):
        for name, run in runs.items():
            times[name].append(run())
    return times


def show(report: dict[str, Any]) -> None:
    table = Table(
        "model", "MB", "ms/token", "GB/s", "of llama's", "prompt", "ms", "transformers / ours", title="hybrids"
    )
    for name, row in report["models"].items():
        numbers = (
            f"{row['weight_mb']:.0f}",
            f"{row['ms']:.2f}",
            f"{row['gb_per_second']:.1f}",
            f"{row['of_attention']:.2f}",
        )
        for prompt in row["prompts"]:
            ours, theirs = prompt["variants"][OURS], prompt["variants"]["transformers"]
            table.add_row(name, *numbers, str(prompt["tokens"]), f"{ours['ms']:.0f}", f"{theirs['of_ours']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

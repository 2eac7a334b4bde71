"""Compares tide_jax with llama.cpp: the same model, threads and prompts, in one process and in turn.

  pip install llama-cpp-python   # builds llama.cpp for this machine, some minutes
  python -m scripts.bench.llama_cpp MODEL.gguf --out scripts/results/llama_cpp.json

MODEL.gguf may have any storage type. It is rewritten as F32 and as Q8_0 for llama.cpp, and loaded in float32 and with
8-bit weights here. All variants decode greedily at full depth; llama.cpp runs through its C interface, without Python
code in between. Reported are medians over the rounds. --append adds the rows to a file with other models' rows. Use a
quiet machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import tide_jax
from scripts.bench.decode import PROMPT, engine_variant, random_prompts
from scripts.bench.products import alternate
from scripts.bench.prompts import ours as our_reading
from scripts.bench.prompts import timed, warmed
from scripts.reporting import machine, save
from tide_jax.cli.inspection import bytes_read

OURS = {"tide_jax, float32": "float", "tide_jax, int8": "int8"}
PEERS = {"llama.cpp, F32": "F32", "llama.cpp, Q8_0": "Q8_0"}
Variants = dict[str, Callable[[], float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL.gguf", type=Path)
    parser.add_argument("--name", help="for the table (the file's)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--append", action="store_true", help="keep other models' rows that the file holds")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=48, help="tokens generated per row (48)")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of the prompt that is timed apart (512)")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if importlib.util.find_spec("llama_cpp") is None:
        sys.exit("bench_llama_cpp: llama-cpp-python is not installed; run `pip install llama-cpp-python` first")

    kept = json.loads(args.out.read_text())["models"] if args.append and args.out and args.out.is_file() else []
    name = args.name or args.model.stem
    with tempfile.TemporaryDirectory() as folder:
        row = {"name": name, **bench(args, Path(folder))}
    report = {
        "machine": machine() | {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")},
        "method": {"prompt": PROMPT, "steps": args.steps, "rounds": args.rounds, "threads": os.cpu_count()},
        "models": [*(other for other in kept if other["name"] != name), row],
    }
    show(row)
    save(args.out, report)


def bench(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures one model: milliseconds of steps by batch size, and of a prompt."""
    from scripts.bench import peer_llama_cpp as peer

    peer.silence()
    threads = os.cpu_count() or 1
    ours = {
        name: tide_jax.load(str(args.model), "float32", weights=weights)  # type: ignore[arg-type]
        for name, weights in OURS.items()
    }
    slots = max(PROMPT + args.steps, args.prompt_tokens) + 1
    theirs = {}
    for name, kind in PEERS.items():
        peer.stored_as(args.model, folder / f"{kind}.gguf", kind, threads)
        theirs[name] = peer.Model(folder / f"{kind}.gguf", slots, max(args.batch), threads)
    vocabulary = next(iter(ours.values())).config.vocab_size
    prompt = random_prompts(vocabulary, 1, args.prompt_tokens)
    reading: Variants = {name: warmed(timed(our_reading(model), prompt)) for name, model in ours.items()}
    reading |= {name: warmed(peer.prompt_reading(model, prompt[0])) for name, model in theirs.items()}
    prompts = alternate(reading, args.rounds, "prompt")
    decoding, read = [], {name: bytes_read(model.config)[model.precision] for name, model in ours.items()}
    for batch in args.batch:
        tokens = random_prompts(vocabulary, batch)
        steps: Variants = {name: engine_variant(model, None, batch, args.steps) for name, model in ours.items()}
        steps |= {name: peer.decoding(model, tokens, args.steps) for name, model in theirs.items()}
        decoding.append({"batch": batch, "times": alternate(steps, args.rounds, f"batch {batch}")})
    return {
        "bytes_of_a_token": read,
        "decoding": decoding,
        "prompt": {"tokens": args.prompt_tokens, "times": prompts},
    }


def show(row: dict[str, Any]) -> None:
    table = Table("", *OURS, *PEERS, title=f"{row['name']}, ms")
    timed = [(f"step, batch {part['batch']}", part["times"]) for part in row["decoding"]]
    timed.append((f"prompt of {row['prompt']['tokens']}", row["prompt"]["times"]))
    for title, times in timed:
        table.add_row(title, *(f"{times[name]['ms']:.1f}" for name in (*OURS, *PEERS)))
    Console().print(table)


if __name__ == "__main__":
    try:
        main()
    except (tide_jax.TideError, RuntimeError) as error:
        sys.exit(f"bench_llama_cpp: {error}")

"""Compares tide_jax with transformers: the same weights, prompts and threads, in one process and in turn.

  python -m scripts.bench.peers MODEL --transformers SOURCE --routers routers.safetensors \\
      --out scripts/results/peers.json

MODEL is anything tide_jax.load takes; SOURCE has the same weights for transformers (needs torch). The variants of
tide_jax are full depth, exits (with --routers: at the settings that their file promises, unless a dial is given) and
lossless. Those of transformers are plain `generate`, `generate` with torch.compile and a static cache (needs a C++
compiler), with assistant_early_exit, and with prompt_lookup_num_tokens. Prompts are everyday questions ("open") and
tasks whose answers repeat the prompt ("copy"), or lines of your own files (--prompts). All variants generate the same
number of tokens, greedily, past the end of an answer if necessary.

In each round all variants run every prompt, one after the other, in an order that changes from prompt to prompt. All
were warmed up, so nothing compiles. Lossless keeps its learned state from prompt to prompt, as in an engine. A variant
that fails is dropped, and the JSON gives the reason. The JSON is written again after every round ("complete" says
whether it is finished). Peak memory is measured first, in a separate process for each variant. --divergence N runs
lossless and full depth in bfloat16 on N prompts and reports how often they diverge and by what margin. Use a quiet
machine.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it reports a missing torch on standard error

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import tide_jax
from scripts.bench import peer_memory
from scripts.bench.float_copy import float_copy
from scripts.bench.peer_divergence import divergence
from scripts.bench.peer_measures import (
    DEFINITIONS,
    OURS,
    SLOW,
    TITLES,
    Samples,
    Variant,
    cores,
    past_end,
    summarise,
    take,
    turns,
)
from scripts.bench.peer_prompts import PromptSet, prompt_sets
from scripts.bench.peer_tide import Settings, make_engine, tide_variant
from scripts.reporting import machine, reason, save
from tide_jax.functional import Decoder
from tide_jax.generation.batch import bucket

Row = dict[str, Any]
_PAUSE = 0.02  # seconds; meanwhile the previous variant's threads stop waiting for work


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    model = tide_jax.load(args.model, "float32")
    sets = prompt_sets(tide_jax.load_tokenizer(args.model), args.prompts, args.max_prompts)
    args.early_exit = args.early_exit or model.config.num_layers // 2
    args.longest = max((ids for s in sets for ids in s.prompts), key=len)
    if (room := len(args.longest) + args.new_tokens) > model.config.context_length:
        sys.exit(
            f"a prompt and --new-tokens are {room} tokens together, the model's context holds "
            f"{model.config.context_length}; lower --new-tokens or shorten the prompt"
        )
    report = describe(args, model, sets)
    with for_peers(args) as folder:
        if not args.no_memory:
            measure_memory(args, folder, report)
        if args.rounds:
            variants = make_variants(args, model, folder, report)
            for prompts in sets:
                measure_set(args, model, prompts, variants, report)
            variants.clear()
    if args.divergence:
        report["divergence"] = measure_divergence(args, sets)
    report["complete"] = True
    save(args.out, report)
    show(Console(width=max(Console().width, 170)), report)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--transformers", metavar="SOURCE", help="the same weights as transformers loads them")
    parser.add_argument("--routers", type=Path, metavar="FILE", help="routers for exits")
    parser.add_argument("--exit-threshold", type=float, help="of exits (promised in the router file, else 0.85)")
    parser.add_argument("--threshold-tilt", type=float, help="0 to 1 (the router file's, else 0)")
    parser.add_argument("--kv-strategy", choices=["propagate", "recompute"], help="(the router file's, else propagate)")
    parser.add_argument("--min-layers", type=int, help="layers every token runs (the router file's, else 8)")
    parser.add_argument(
        "--prompts", type=Path, nargs="+", default=[], metavar="FILE", help=".txt or .jsonl, a set each"
    )
    parser.add_argument("--max-prompts", type=int, default=8, help="of a set (8)")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each generation (64)")
    parser.add_argument("--rounds", type=int, default=3, help="(3); 0 for none")
    parser.add_argument("--slow-prompts", type=int, default=2, help="prompts of a set for assistant_early_exit (2)")
    parser.add_argument("--early-exit", type=int, help="layers of transformers' early-exit assistant (half of them)")
    parser.add_argument("--lookup", type=int, default=10, help="tokens that transformers' prompt lookup drafts (10)")
    parser.add_argument("--skip", nargs="+", default=[], choices=list(TITLES), metavar="VARIANT",
                        help=f"variants to leave out: {', '.join(TITLES)}")  # fmt: skip
    parser.add_argument("--no-memory", action="store_true", help="don't measure peak memory")
    parser.add_argument("--divergence", type=int, default=0, metavar="N", help="prompts for bfloat16 (0)")
    parser.add_argument("--divergence-tokens", type=int, default=32, help="tokens of each (32)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Checks the arguments before a model is loaded."""
    if args.routers is not None and not args.routers.is_file():
        parser.error(f"no router file at {args.routers}")
    if args.routers is None and any(
        v is not None for v in (args.exit_threshold, args.threshold_tilt, args.kv_strategy)
    ):
        parser.error("--exit-threshold, --threshold-tilt and --kv-strategy say how tokens exit; they need --routers")
    if missing := [str(path) for path in args.prompts if not path.is_file()]:
        parser.error(f"no prompt file at {missing[0]}")
    if len({path.stem for path in args.prompts}) < len(args.prompts):
        parser.error("two prompt files are called the same; rename one")
    if args.transformers and importlib.util.find_spec("torch") is None:
        print("torch is not installed: transformers is left out")
        args.transformers = None
    least = {"max_prompts": 1, "new_tokens": 2, "rounds": 0, "slow_prompts": 0, "divergence": 0, "divergence_tokens": 1}
    for name, low in least.items():
        if getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}")
    if args.out is not None and not args.out.parent.is_dir():
        parser.error(f"no folder {args.out.parent} to write {args.out.name} to")


def chosen(args: argparse.Namespace) -> list[str]:
    """Names of the variants to run."""
    possible = [n for n in TITLES if n in OURS or args.transformers]
    return [n for n in possible if n not in args.skip and (n != "exit" or args.routers is not None)]


def dials(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `tide_jax.ExitConfig`."""
    return {
        "exit_threshold": args.exit_threshold,
        "threshold_tilt": args.threshold_tilt,
        "kv_strategy": args.kv_strategy,
        "min_layers": args.min_layers,
    }


def describe(args: argparse.Namespace, model: Decoder, sets: list[PromptSet]) -> Row:
    """Origin of the numbers, without local folder names."""
    return {
        "complete": False,
        "model": {
            "name": Path(args.model).name,
            "type": model.config.model_type,
            "layers": model.config.num_layers,
            "hidden_size": model.config.hidden_size,
            "dtype": str(model.dtype),
        },
        "method": {
            "new_tokens": args.new_tokens,
            "rounds": args.rounds,
            "slow": {"variants": SLOW, "prompts": args.slow_prompts, "rounds": 1},
            "assistant_early_exit": args.early_exit,
            "prompt_lookup_num_tokens": args.lookup,
        },
        "exits": None,
        "machine": machine(),
        "threads": {"cores": cores(), "torch": None},
        "definitions": DEFINITIONS,
        "sets": [],
        "memory": {},
        "failed": {},
        "divergence": None,
    }


@contextlib.contextmanager
def for_peers(args: argparse.Namespace) -> Iterator[Path | None]:
    """Yields the folder that transformers loads; None without peers."""
    if all(name in OURS for name in chosen(args)):
        yield None
        return
    with float_copy(args.transformers) as folder:
        yield folder


def measure_memory(args: argparse.Namespace, folder: Path | None, report: Row) -> None:
    """Measures each variant's peak memory."""
    routers = None if args.routers is None else str(args.routers)
    for name in tqdm(chosen(args), desc="memory"):
        job = peer_memory.Job(
            variant=name,
            model=args.model,
            transformers=None if folder is None else str(folder),
            routers=routers,
            dials=dials(args),
            ids=args.longest,
            count=args.new_tokens,
            early_exit=args.early_exit,
            lookup=args.lookup,
        )
        try:
            report["memory"][name] = peer_memory.measure(job)
        except RuntimeError as error:
            report["memory"][name] = {"failed": str(error)}
        save(args.out, report)


def make_variants(args: argparse.Namespace, model: Decoder, folder: Path | None, report: Row) -> dict[str, Variant]:
    """Returns the variants by name, on one engine and one peer."""
    names, variants = chosen(args), dict[str, Variant]()
    engine, promise = make_engine(model, Settings(args.routers, dials(args)))
    variants |= {mode: tide_variant(engine, mode) for mode in OURS if mode in names}
    if args.routers is not None:
        report["exits"] = {"file": args.routers.name, "promise": promise, "config": engine.config.to_dict()}
    if folder is not None:
        try:
            variants |= make_peers(args, folder, report)
        except Exception as error:  # any error of the peers is a result to report
            report["failed"] |= {n: reason(error) for n in names if n not in OURS}
    return variants


def make_peers(args: argparse.Namespace, folder: Path, report: Row) -> dict[str, Variant]:
    """Returns transformers' variants."""
    import torch

    from scripts.bench.peer_transformers import load_peer, peer_variant

    peer, room = load_peer(folder), len(args.longest) + args.new_tokens
    report["threads"]["torch"] = torch.get_num_threads()
    return {
        name: peer_variant(peer, name, longest=room, early_exit=args.early_exit, lookup=args.lookup)
        for name in chosen(args)
        if name not in OURS
    }


def measure_set(
    args: argparse.Namespace, model: Decoder, prompts: PromptSet, variants: dict[str, Variant], report: Row
) -> None:
    """Times all variants on one set; removes failing ones from `variants`."""
    samples: Samples = {name: [] for name in variants}
    failed, count = report["failed"], args.new_tokens
    for name in tqdm(list(variants), desc=f"{prompts.name}: warming up"):
        attempt(warm, name, variants, failed, prompts.prompts, count, name in SLOW)
    entry: Row = {"name": prompts.name, "prompt_tokens": [len(ids) for ids in prompts.prompts]}
    report["sets"].append(entry)
    plan = list(turns(list(variants), len(prompts.prompts), args.rounds, args.slow_prompts))
    for number, prompt, names in tqdm(plan, desc=prompts.name):
        for name in (n for n in names if n in variants):
            time.sleep(_PAUSE)
            sample = attempt(take, name, variants, failed, prompts.prompts[prompt], count, prompt, number)
            samples[name] += [] if sample is None else [sample]
        if prompt == len(prompts.prompts) - 1:
            entry["past_end"] = past_end(samples.get("full", []), model.config.eos_token_ids)
            entry["variants"] = summarise(samples)
            entry["load"] = os.getloadavg()[0]
            save(args.out, report)


def warm(variant: Variant, prompts: list[list[int]], count: int, slow: bool) -> None:
    """Compiles the programs for the set: one prompt of each padded width. A slow variant generates two tokens."""
    widths = {bucket(len(ids)): ids for ids in sorted(prompts, key=len)}
    for ids in list(widths.values())[-1:] if slow else widths.values():
        variant(ids, 2 if slow else count)
        variant(ids, 1)


def attempt(
    action: Callable[..., Any], name: str, variants: dict[str, Variant], failed: dict[str, str], *rest: Any
) -> Any:
    """Runs an action on a variant. An error is recorded as the variant's result, and the others continue without it."""
    try:
        return action(variants[name], *rest)
    except Exception as error:
        failed[name] = reason(error)
        del variants[name]
        return None


def measure_divergence(args: argparse.Namespace, sets: list[PromptSet]) -> Row:
    """Measures divergence in bfloat16, on prompts of all sets in turn."""
    mixed = [s.prompts[i] for i in range(args.max_prompts) for s in sets if i < len(s.prompts)]
    engine, _ = make_engine(tide_jax.load(args.model, "bfloat16"), Settings(args.routers, dials(args)))
    return divergence(engine, mixed[: args.divergence], args.divergence_tokens)


def show(console: Console, report: Row) -> None:
    for entry in report["sets"]:
        table = Table(title=f"{entry['name']}: {len(entry['prompt_tokens'])} prompts")
        columns = ("variant", "tokens/s", "quartiles", "/ eager", "/ full", "in all", "/ full", "first token, s",
                   "layers", "same tokens", "accepted/pass", "peak MiB")  # fmt: skip
        for column in columns:
            table.add_column(column, justify="left" if column == "variant" else "right")
        for row in entry["variants"]:
            table.add_row(*cells(row, report["memory"].get(row["name"], {})))
        console.print(table)
    for name, why in report["failed"].items():
        console.print(f"{TITLES[name]} failed: {why}", markup=False)
    if (found := report["divergence"]) is not None:
        console.print(
            f"{found['dtype']}: {found['diverging']:.0%} of {found['prompts']} sequences diverge; median margin there "
            f"{found['median_margin_there']}, everywhere {found['median_margin']:.3f}"
        )


def cells(row: Row, memory: Row) -> list[str]:
    """Cells of one table row."""

    def number(value: float | None, form: str = ".2f") -> str:
        return "" if value is None else format(value, form)

    return [
        row["title"],
        f"{row['tokens_per_second']:.1f}",
        "{:.1f}-{:.1f}".format(*row["tokens_per_second_quartiles"]),
        number(row["ratio_to_eager"]),
        number(row["ratio_to_full"]),
        f"{row['whole_tokens_per_second']:.1f}",
        number(row["whole_ratio_to_full"]),
        f"{row['first_token_seconds']:.3f}",
        f"{row['layers_per_token']:.1f}",
        number(row["same_tokens_as_full"], ".0%"),
        number(row.get("accepted_per_pass")),
        number(memory.get("peak"), ".0f"),
    ]


if __name__ == "__main__":
    try:
        main()
    except tide_jax.TideError as error:
        sys.exit(f"bench_peers: {error}")

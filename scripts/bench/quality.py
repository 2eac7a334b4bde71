"""Measures quality against depth and wall clock, for router files over a sweep of thresholds.

  python -m scripts.bench.quality MODEL affine=a.safetensors tuned=b.safetensors --text eval.txt --out quality.json
  python -m scripts.bench.quality MODEL a.safetensors exact=recompute,tilt:a.safetensors --text t.txt --out q.json

MODEL is anything tide_jax.load takes. A router file is named by LABEL=PATH or by its stem. LABEL=recompute:PATH,
LABEL=tilt:PATH or LABEL=recompute,tilt:PATH measure it with kv_strategy="recompute", with threshold_tilt=1, or both.
Every threshold is measured

* on held-out text, teacher-forced with the engine itself: layers run, agreement with the full model's likeliest next
  token on the same prefix, KL(full || exits) in nats, and perplexity over the full model's. Position 0 is not counted;
* in free-running greedy generation from the first tokens of such texts: agreement of each new token with the full
  model's choice on the same generated prefix, the full model's perplexity on that text over that on its own, and tokens
  per second at batch 1, in turn with full depth in the same process.

After the given thresholds, bisection measures more: around the best one that keeps --agreement, and then around the
best one that also keeps --perplexity. `at_agreement` and `at_target` name them; nothing is interpolated. One oracle
exits at the first exit point that answers like the full model: with the same heads, no router that never errs runs
fewer layers. Another oracle exits where it costs the least divergence for the layers saved: nothing runs fewer layers
for as much KL. The JSON is written again after every threshold ("complete" says whether it is finished). Use text that
routers were not calibrated on. Times are only meaningful on a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it reports a missing torch on standard error

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import tide_jax
from scripts.bench.quality_generation import Generator
from scripts.bench.quality_measures import Reference, Row, at_target, next_threshold, summarise
from scripts.reporting import machine
from tide_jax.config import KVStrategy, tilt_thresholds
from tide_jax.exits.exits import Exits
from tide_jax.functional import Decoder
from tide_jax.texts import load_texts

THRESHOLDS = (0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.99, 1.0)
DEFINITIONS = {
    "layers, depth": "mean layers run by a token, and its share of all layers; 'text' is teacher-forced",
    "agreement": "share of tokens with the full model's likeliest next token on the same prefix",
    "agreement_error": "standard error of agreement over texts",
    "kl": "mean KL(full || exits) of next-token distributions, nats",
    "perplexity_ratio": "text: perplexity of the text with exits over the full model's; generation: the full model's "
    "perplexity on text generated with exits over that on its own",
    "executed": "share of the layers that a decode step runs, mean over steps: the depth and, with recompute, passes "
    "for waiting tokens alone",
    "time_ratio": "time per decoded token, exits over full depth beside it: median over prompts",
    "gain_per_skipped": "(1 - time_ratio) / (1 - depth) of the generation: share of time saved over share of layers "
    "skipped",
    "oracle": "every token exits at the first exit point, from min_layers on, whose answer is the full model's, all "
    "tokens before it at full depth",
    "oracle_by_kl": "the least depth for the mean KL it spends, nearly the logarithm of the perplexity limit, every "
    "token's divergence at each exit point known",
    "at_agreement": "the measured threshold of least mean depth on text that keeps the limit of agreement",
    "at_target": "the measured threshold of least mean depth on text that keeps both limits",
}


class Dials(NamedTuple):
    """Settings of a strategy, as in `tide_jax.ExitConfig`."""

    kv_strategy: KVStrategy = "propagate"
    threshold_tilt: float = 0.0


def main() -> None:
    args = parse()
    model = tide_jax.load(args.model, args.dtype, weights=args.weights)
    tokenizer = tide_jax.load_tokenizer(args.model)
    loaded = {path: tide_jax.Routers.load(path, model=model) for _, path, _ in args.routers}
    strategies = [loaded[path] for _, path, _ in args.routers]
    fit(args, model, strategies)
    texts = read_texts(args, tokenizer)
    prompts = [ids[: args.prompt_length] for ids in texts if len(ids) >= args.prompt_length][: args.prompts]
    if not args.no_generation and not prompts:
        sys.exit(f"{args.text} has no text of {args.prompt_length} tokens to take a prompt from; lower --prompt-length")
    report = describe(args, model, texts, prompts)
    with bar("full depth") as progress:
        reference = Reference(model, texts, max_length=args.max_length, batch_size=args.batch_size, progress=progress)
    generator = None if args.no_generation else Generator(model, prompts, args.new_tokens)
    oracles = {path: reference.oracles(r, args.min_layers, args.perplexity) for path, r in loaded.items()}
    for (name, path, dials), routers in zip(args.routers, strategies, strict=True):
        entry = start_strategy(name, path, routers, dials) | oracles[path]
        report["strategies"].append(entry)
        sweep(entry, report, routers, reference, generator, args)
    report["complete"] = True
    save(report, args.out)
    show(Console(width=max(Console().width, 150)), report)
    if args.plot is not None:
        from scripts.plots.quality import draw

        draw(report, args.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument(
        "routers", metavar="ROUTERS", nargs="+", type=named, help="router file, or LABEL=[recompute,][tilt:]FILE"
    )
    parser.add_argument("--text", required=True, metavar="FILE", help="held-out text (.txt, .jsonl, .parquet)")
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture to draw (.svg, .png; extra 'plot')")
    parser.add_argument("--texts", type=int, default=64, help="texts to read, drawn by --seed (64)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of each (256)")
    parser.add_argument("--batch-size", type=int, default=8, help="texts in a forward pass (8)")
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    parser.add_argument("--bisect", type=int, default=4, help="thresholds measured by bisection for each limit (4)")
    parser.add_argument("--agreement", type=float, default=0.95, help="limit for at_target (0.95)")
    parser.add_argument("--perplexity", type=float, default=1.01, help="limit of the perplexity ratio (1.01)")
    parser.add_argument(
        "--min-layers", type=int, help="layers every token runs (8; 0 where that closes every exit point)"
    )
    parser.add_argument("--no-generation", action="store_true", help="measure on given text only")
    parser.add_argument("--generate-from", type=float, default=0.8, metavar="SHARE",
                        help="generate only at thresholds with at least this agreement on text (0.8)")  # fmt: skip
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=32, help="tokens of a prompt (32)")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default float32 on a CPU")
    parser.add_argument("--weights", choices=["float", "int8"], help="int8 rounds the matrices; default: as MODEL is")
    args = parser.parse_args()
    args.thresholds = sorted({*args.thresholds, 1.0}, reverse=True)
    names = [name for name, _, _ in args.routers]
    if len(set(names)) < len(names):
        parser.error(f"two router files are called the same ({', '.join(names)}); name them with LABEL=FILE")
    if not all(0.0 <= t <= 1.0 for t in args.thresholds):
        parser.error("--thresholds must lie in 0..1")
    if not args.perplexity >= 1.0:
        parser.error("--perplexity is a ratio to the full model's and must be at least 1")
    least = {"texts": 1, "max_length": 2, "batch_size": 1, "bisect": 0, "prompts": 1, "prompt_length": 1}
    for name, low in (least | {"new_tokens": 2, "min_layers": 0}).items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}")
    if not args.out.parent.is_dir():
        parser.error(f"no folder {args.out.parent} to write {args.out.name} to")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'tide_jax[plot]'")
    return args


def fit(args: argparse.Namespace, model: Decoder, strategies: list[tide_jax.Routers]) -> None:
    """Limits lengths and depth to what the model and the routers allow."""
    context, last = model.config.context_length, min(routers.exit_points[-1] for routers in strategies)
    args.max_length = min(args.max_length, context)
    if args.min_layers is None:
        args.min_layers = tide_jax.ExitConfig.min_layers if tide_jax.ExitConfig.min_layers <= last + 1 else 0
    if args.min_layers > last + 1:
        sys.exit(
            f"--min-layers {args.min_layers} closes every exit point, the last is after {last + 1} layers; lower it"
        )
    if args.prompt_length + args.new_tokens > context:
        sys.exit(
            f"--prompt-length and --new-tokens are {args.prompt_length + args.new_tokens} tokens together, "
            f"the model's context holds {context}; lower one"
        )


def named(argument: str) -> tuple[str, Path, Dials]:
    """A strategy's name, its router file, and its dials."""
    label, equals, path = argument.partition("=")
    if not equals or Path(argument).exists():
        return Path(argument).stem, Path(argument), Dials()
    words, colon, rest = path.partition(":")
    chosen = set(words.split(","))
    if not colon or not chosen <= {"recompute", "tilt"}:
        return label, Path(path), Dials()
    dials = Dials("recompute" if "recompute" in chosen else "propagate", 1.0 if "tilt" in chosen else 0.0)
    return label, Path(rest), dials


def read_texts(args: argparse.Namespace, tokenizer: Any) -> list[list[int]]:
    """Token ids of randomly drawn texts of more than two tokens; shorter ones have nothing to count."""
    texts = list(itertools.islice(load_texts(args.text), 100_000))
    rows = []
    for number in np.random.default_rng(args.seed).permutation(len(texts)):
        ids = [int(i) for i in tokenizer(texts[number])["input_ids"]][: args.max_length]
        if len(ids) > 2:
            rows.append(ids)
        if len(rows) == args.texts:
            break
    if not rows:
        sys.exit(f"{args.text} holds no text of more than two tokens")
    return rows


def describe(args: argparse.Namespace, model: Decoder, texts: list[list[int]], prompts: list[list[int]]) -> Row:
    """Origin of the numbers, without local folder names."""
    generation = {
        "prompts": len(prompts),
        "prompt_length": args.prompt_length,
        "new_tokens": args.new_tokens,
        "generate_from": args.generate_from,
    }
    return {
        "complete": False,
        "model": {
            "name": Path(args.model).name,
            "type": model.config.model_type,
            "layers": model.config.num_layers,
            "hidden_size": model.config.hidden_size,
            "weights": model.weights,
            "dtype": str(model.dtype),
        },
        "text": {
            "file": Path(args.text).name,
            "texts": len(texts),
            "tokens": sum(len(ids) - 1 for ids in texts),
            "max_length": args.max_length,
            "seed": args.seed,
        },
        "generation": None if args.no_generation else generation,
        "min_layers": args.min_layers,
        "target": {"agreement": args.agreement, "perplexity_ratio": args.perplexity},
        "machine": machine(),
        "definitions": DEFINITIONS,
        "strategies": [],
    }


def start_strategy(name: str, path: Path, routers: tide_jax.Routers, dials: Dials) -> Row:
    """Description of a strategy, before its sweep."""
    metadata = routers.metadata.to_dict()
    return {
        "name": name,
        "file": path.name,
        "exit_strategy": routers.exit_strategy,
        "exit_points": list(routers.exit_points),
        "translator_rank": None if routers.translators is None else routers.translators.rank,
        "confidence_candidates": None if routers.candidates is None else len(routers.candidates.ids),
        "calibration": metadata.get("config"),
        **dials._asdict(),
        "rows": [],
        "at_agreement": None,
        "at_target": None,
    }


def sweep(
    entry: Row,
    report: Row,
    routers: tide_jax.Routers,
    reference: Reference,
    generator: Generator | None,
    args: argparse.Namespace,
) -> None:
    """Measures a strategy at the given thresholds, then at those found by bisection."""

    def measure(threshold: float) -> None:
        layers = reference.model.config.num_layers
        thresholds = tilt_thresholds(threshold, entry["threshold_tilt"], routers.exit_points, layers)
        strategy = entry["kv_strategy"]
        exits = Exits.uniform(routers.without_metadata(), thresholds, args.min_layers, kv_strategy=strategy)
        with bar(f"{entry['name']} at {threshold:.4f}") as progress:
            text = summarise(reference.compare(exits, progress), layers)
        row: Row = {"threshold": threshold, "text": text, "generation": None}
        if generator is not None and text["agreement"] >= args.generate_from:
            with bar(f"{entry['name']} at {threshold:.4f}, generating") as progress:
                row["generation"] = generator.measure(exits, progress)
        entry["rows"] = sorted([*entry["rows"], row], key=lambda r: r["threshold"])
        entry["at_agreement"] = best_row(entry["rows"], args.agreement, math.inf)
        entry["at_target"] = best_row(entry["rows"], args.agreement, args.perplexity)
        save(report, args.out)

    for threshold in args.thresholds:
        measure(threshold)
    for limit in (math.inf, args.perplexity):
        for _ in range(args.bisect):
            threshold = next_threshold(flat(entry["rows"]), args.agreement, limit)
            if threshold is None:
                break
            measure(threshold)


def flat(rows: list[Row]) -> list[Row]:
    """Measurements on text, with their thresholds."""
    return [{"threshold": row["threshold"]} | row["text"] for row in rows]


def best_row(rows: list[Row], agreement: float, perplexity_ratio: float) -> Row | None:
    found = at_target(flat(rows), agreement, perplexity_ratio)
    return None if found is None else next(row for row in rows if row["threshold"] == found["threshold"])


def save(report: Row, path: Path) -> None:
    """Writes the JSON, complete or not at all."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


@contextlib.contextmanager
def bar(name: str) -> Iterator[Any]:
    """Yields a progress bar as a function of the done and total counts."""
    with tqdm(desc=name, leave=False) as shown:

        def progress(done: int, total: int) -> None:
            shown.total, shown.n = total, done
            shown.refresh()

        yield progress


def show(console: Console, report: Row) -> None:
    layers, target = report["model"]["layers"], report["target"]
    for entry in report["strategies"]:
        oracle = entry["oracle"]["layers"]
        table = Table(title=f"{entry['name']}: {layers} layers, the oracle runs {oracle:.2f}")
        for column in ("threshold", "layers", "depth", "agreement", "ppl ratio", "KL"):
            table.add_column(column, justify="right")
        for column in ("layers", "agreement", "ppl ratio", "tok/s", "time ratio", "gain/skipped"):
            table.add_column(f"gen. {column}", justify="right")
        for row in entry["rows"]:
            table.add_row(*cells(row))
        console.print(table)
        limits = {"at_agreement": "", "at_target": f" and perplexity ratio <= {target['perplexity_ratio']}"}
        for key, more in limits.items():
            best = entry[key]
            found = "none" if best is None else f"depth {best['text']['depth']:.3f} at {best['threshold']:.4f}"
            console.print(f"agreement >= {target['agreement']}{more}: {found}")


def cells(row: Row) -> list[str]:
    text, made = row["text"], row["generation"]
    shown = [f"{row['threshold']:.4f}", f"{text['layers']:.2f}", f"{text['depth']:.3f}", f"{text['agreement']:.3f}"]
    shown += [f"{text['perplexity_ratio']:.3f}", f"{text['kl']:.4f}"]
    if made is None:
        return shown + [""] * 6
    gain = "" if made["gain_per_skipped"] is None else f"{made['gain_per_skipped']:.2f}"
    shown += [f"{made['layers']:.2f}", f"{made['agreement']:.3f}", f"{made['perplexity_ratio']:.3f}"]
    return [*shown, f"{made['tokens_per_second']:.1f}", f"{made['time_ratio']:.3f}", gain]


if __name__ == "__main__":
    try:
        main()
    except tide_jax.TideError as error:
        sys.exit(f"bench_quality: {error}")

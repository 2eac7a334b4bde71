"""Compares lossless mode with full depth: speed, tokens and drafts, by who drafts and by kind of prompt.

  python -m scripts.bench.lossless MODEL --out scripts/results/lossless.json

MODEL is anything tide_jax.load takes; it runs in float32. Variants: full depth; lossless with drafts from the text;
lossless with the model's 8-bit twin. With --int8, the model with 8-bit weights, too, which makes other tokens. Prompts
are everyday questions, word problems, questions about code, and tasks whose answers repeat the prompt. No draft setting
was tuned on them.

All variants run in one process on the same threads. In each round they run every prompt in turn, in an order that
changes from prompt to prompt; programs were compiled before. Tokens a second are those after the first token, so that
reading the prompt does not count. A ratio compares two runs of the same prompt in the same round. With --batch B,
groups of B prompts of a set run together, too. The JSON is written after every set. Use a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import tide_jax
from scripts.bench.open_prompts import CODE, EVERYDAY, MATHS
from scripts.bench.peer_measures import order, quartiles
from scripts.bench.peer_prompts import COPY
from scripts.reporting import machine, save
from tide_jax.tokenizer.chat import prompt_ids

SETS = {"everyday": EVERYDAY, "maths": MATHS, "code": CODE, "copy": COPY}
PAUSE = 0.02  # seconds; meanwhile the previous variant's threads stop waiting for work


class Sample(NamedTuple):
    """One generation of a variant: tokens of each row, seconds after the first token, and counters of its drafts."""

    tokens: list[list[int]]
    seconds: float
    stats: Any

    @property
    def rate(self) -> float:
        """Tokens per second after the first of each row."""
        return sum(len(row) - 1 for row in self.tokens) / self.seconds


Variant = Callable[[list[list[int]], int], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each generation (64)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-prompts", type=int, default=40, help="of a set (40)")
    parser.add_argument("--batch", type=int, default=0, help="prompts that run together in a second pass (0: none)")
    parser.add_argument("--int8", action="store_true", help="also the model with 8-bit weights")
    args = parser.parse_args()

    model, tokenizer = tide_jax.load(args.model, "float32"), tide_jax.load_tokenizer(args.model)
    engine = tide_jax.TIDE(model)
    variants: dict[str, Variant] = {
        "full": variant(engine, "full"),
        "text": variant(engine, "lossless", "text"),
        "twin": variant(engine, "lossless", "int8"),
    }
    if args.int8:
        small = tide_jax.TIDE(tide_jax.load(args.model, "float32", weights="int8"))
        variants |= {"int8": variant(small, "full"), "int8, text": variant(small, "lossless", "text")}
    report: dict[str, Any] = {
        "model": {"name": Path(args.model).name, "layers": model.config.num_layers, "dtype": str(model.dtype)},
        "method": {"new_tokens": args.new_tokens, "rounds": args.rounds},
        "machine": machine(),
        "sets": [],
    }
    for name, texts in SETS.items():
        prompts = prompt_ids(tokenizer, list(texts)[: args.max_prompts])
        for batch in {1: None, args.batch: None}:
            if batch and len(prompts) >= batch:
                groups = [prompts[i : i + batch] for i in range(0, len(prompts) - batch + 1, batch)]
                report["sets"].append(bench_set(name, groups, variants, args))
                save(args.out, report)
    show(report)


def variant(engine: tide_jax.TIDE, mode: Any, draft: str | None = None) -> Variant:
    """Generates greedily, past the end of an answer."""
    return lambda prompts, count: engine.generate(
        prompts, mode=mode, draft=draft, max_new_tokens=count, eos_token_id=[]
    )


def take(run: Variant, prompts: list[list[int]], count: int) -> Sample:
    """One sample: a generation less a generation of one token beside it."""
    time.sleep(PAUSE)
    first = run(prompts, 1).stats.wall_time
    out = run(prompts, count)
    return Sample(out.tokens.tolist(), out.stats.wall_time - first, out.stats.drafts)


def bench_set(
    name: str, groups: list[list[list[int]]], variants: dict[str, Variant], args: argparse.Namespace
) -> dict[str, Any]:
    """Runs all variants on the groups of one set."""
    for run in tqdm(variants.values(), desc=f"{name}, batch {len(groups[0])}: warming up"):
        for group in groups:  # lengths differ, and so do programs
            run(group, 1)
        run(groups[0], args.new_tokens)
    taken: dict[str, list[Sample]] = {each: [] for each in variants}
    plan = [(number, group) for number in range(args.rounds) for group in range(len(groups))]
    for number, group in tqdm(plan, desc=f"{name}, batch {len(groups[0])}"):
        for each in order(list(variants), number * len(groups) + group):
            taken[each].append(take(variants[each], groups[group], args.new_tokens))
    return {
        "name": name,
        "batch": len(groups[0]),
        "prompts": sum(map(len, groups)),
        "variants": {each: summary(each, samples, taken) for each, samples in taken.items()},
    }


def summary(name: str, samples: list[Sample], taken: dict[str, list[Sample]]) -> dict[str, Any]:
    """Medians of one variant, and ratios to the full depth of the same weights."""
    full = taken["int8" if name.startswith("int8") else "full"]
    rates = [s.rate for s in samples]
    ratios = [s.rate / f.rate for s, f in zip(samples, full, strict=True)]
    row: dict[str, Any] = {
        "tokens_per_second": statistics.median(rates),
        "quartiles": quartiles(rates),
        "ratio_to_full": statistics.median(ratios),
        "ratio_quartiles": quartiles(ratios),
        "least_ratio": min(ratios),
        "same_tokens_as_full": statistics.fmean(s.tokens == f.tokens for s, f in zip(samples, full, strict=True)),
        "ratio_to_full_floats": statistics.median(s.rate / f.rate for s, f in zip(samples, taken["full"], strict=True)),
    }
    if samples[0].stats is None:
        return row
    rows = len(samples[0].tokens)
    passes = sum(s.stats.passes - 1 for s in samples)  # the first reads the prompt
    row["tokens_a_pass"] = sum(len(r) - 1 for s in samples for r in s.tokens) / passes / rows
    row["drafters"] = {
        drafter: {
            "passes": sum(s.stats.by_drafter[drafter].passes for s in samples) / passes,
            "accepted": sum(s.stats.by_drafter[drafter].accepted for s in samples),
            "drafted": sum(s.stats.by_drafter[drafter].drafted for s in samples),
        }
        for drafter in samples[0].stats.by_drafter
    }
    return row


def show(report: dict[str, Any]) -> None:
    table = Table("prompts", "batch", "variant", "tokens/s", "/ full", "least", "same", "tokens a pass", "drafts")
    for part in report["sets"]:
        for name, row in part["variants"].items():
            drafts = "; ".join(
                f"{drafter} {each['passes']:.0%} of passes, {each['accepted'] / max(each['drafted'], 1):.0%} accepted"
                for drafter, each in row.get("drafters", {}).items()
            )
            table.add_row(
                part["name"],
                str(part["batch"]),
                name,
                f"{row['tokens_per_second']:.1f}",
                f"{row['ratio_to_full']:.2f}",
                f"{row['least_ratio']:.2f}",
                f"{row['same_tokens_as_full']:.0%}",
                f"{row['tokens_a_pass']:.2f}" if "tokens_a_pass" in row else "",
                drafts,
            )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()

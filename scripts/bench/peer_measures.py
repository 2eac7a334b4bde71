"""Measurements of scripts.bench.peers and their medians."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

OURS = ("full", "exit", "lossless")
TITLES = {
    "full": "tide_jax, full depth",
    "exit": "tide_jax, exits",
    "lossless": "tide_jax, lossless",
    "eager": "transformers, eager",
    "compiled": "transformers, torch.compile and static cache",
    "assistant_early_exit": "transformers, assistant_early_exit",
    "prompt_lookup": "transformers, prompt_lookup_num_tokens",
}
"""All variants."""


class Run(NamedTuple):
    """One generation.

    Attributes:
      tokens: the new tokens.
      seconds: wall clock of the call, without compilation.
      layers: layers that the model ran per new token, passes over drafts included.
      drafts: statistics of the drafts, if known.
    """

    tokens: list[int]
    seconds: float
    layers: float
    drafts: dict[str, int] | None = None


Variant = Callable[[list[int], int], Run]
"""Continues a prompt by exactly that many tokens."""

SLOW = ("assistant_early_exit",)
"""Variants that run on few prompts and in one round."""

DEFINITIONS = {
    "tokens_per_second": "new tokens after the first one, over the seconds from the first to the last: those of the "
    "whole generation less those of a one-token generation beside it; median, with quartiles and extremes",
    "whole_tokens_per_second": "all new tokens over all seconds, reading the prompt included; median",
    "ratio_to_eager, ratio_to_full": "tokens_per_second over that of the eager or full-depth run of the same prompt in "
    "the same round; median, with quartiles; 'whole': of whole_tokens_per_second",
    "first_token_seconds": "seconds of a one-token generation; median",
    "layers_per_token": "layers that ran, reading the prompt and verifying drafts included, over new tokens; a layer "
    "counts once for a pass, however many tokens it runs",
    "same_tokens_as_full": "share of prompts whose tokens are those of 'full'",
    "accepted_per_pass": "drafts accepted over passes through some or all layers, reading the prompt included",
    "past_end": "share of new tokens past the end that the full model would have made",
    "load": "processes that ran or waited to, mean over the last minute of the set",
    "memory": "peak resident MiB of a process of its own that loads the model and generates twice from the longest "
    "prompt ('peak'), and of the second generation in it ('generating')",
}


class Sample(NamedTuple):
    """A generation from one prompt in a round, and the seconds of a one-token generation before it."""

    prompt: int
    round: int
    run: Run
    first: float

    @property
    def rate(self) -> float:
        """Tokens per second after the first token."""
        return (len(self.run.tokens) - 1) / max(self.run.seconds - self.first, 1e-9)

    @property
    def whole_rate(self) -> float:
        """Tokens per second overall."""
        return len(self.run.tokens) / max(self.run.seconds, 1e-9)


Samples = dict[str, list[Sample]]


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def order(names: Sequence[str], turn: int) -> list[str]:
    """The variants in an order that rotates from turn to turn, and is reversed every other time."""
    start = turn // 2 % len(names)
    turned = [*names[start:], *names[:start]]
    return turned[::-1] if turn % 2 else turned


def turns(names: Sequence[str], prompts: int, rounds: int, slow_prompts: int) -> Iterator[tuple[int, int, list[str]]]:
    """Yields round, prompt, and the variants that run it, in order."""
    for number in range(rounds):
        for prompt in range(prompts):
            quick = number > 0 or prompt >= slow_prompts
            running = [name for name in names if not (quick and name in SLOW)]
            yield number, prompt, order(running, number * prompts + prompt)


def take(variant: Variant, ids: list[int], count: int, prompt: int, number: int) -> Sample:
    """Takes one sample. Raises RuntimeError unless there are exactly `count` tokens."""
    first = variant(ids, 1).seconds
    run = variant(ids, count)
    if len(run.tokens) != count:
        raise RuntimeError(f"{len(run.tokens)} new tokens instead of {count}")
    return Sample(prompt, number, run, first)


def summarise(samples: Mapping[str, Sequence[Sample]]) -> list[dict[str, Any]]:
    """Returns a row of medians for each variant with samples."""
    return [_row(name, taken, samples) for name, taken in samples.items() if taken]


def _row(name: str, taken: Sequence[Sample], samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    rates = [s.rate for s in taken]
    row: dict[str, Any] = {
        "name": name,
        "title": TITLES.get(name, name),
        "samples": len(taken),
        "prompts": len({s.prompt for s in taken}),
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_quartiles": quartiles(rates),
        "tokens_per_second_extremes": [min(rates), max(rates)],
        "whole_tokens_per_second": statistics.median(s.whole_rate for s in taken),
        "first_token_seconds": statistics.median(s.first for s in taken),
        "layers_per_token": statistics.fmean(s.run.layers for s in taken),
    }
    for other in ("eager", "full"):
        ratios = _ratios(taken, samples.get(other, ()), lambda s: s.rate)
        whole = _ratios(taken, samples.get(other, ()), lambda s: s.whole_rate)
        row[f"ratio_to_{other}"] = statistics.median(ratios) if ratios else None
        row[f"ratio_to_{other}_quartiles"] = quartiles(ratios) if ratios else None
        row[f"whole_ratio_to_{other}"] = statistics.median(whole) if whole else None
    return row | {"same_tokens_as_full": _same(taken, samples.get("full", ())), **_drafts(taken)}


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower and upper quartile."""
    if len(values) < 2:
        return [values[0], values[0]]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return [lower, upper]


def _ratios(taken: Sequence[Sample], others: Sequence[Sample], rate: Callable[[Sample], float]) -> list[float]:
    """Ratios within the same prompt and round."""
    beside = {(s.prompt, s.round): rate(s) for s in others}
    return [rate(s) / beside[s.prompt, s.round] for s in taken if (s.prompt, s.round) in beside]


def _same(taken: Sequence[Sample], full: Sequence[Sample]) -> float | None:
    wanted = {s.prompt: s.run.tokens for s in full}
    shared = {s.prompt for s in taken} & set(wanted)
    if not shared:
        return None
    different = {s.prompt for s in taken if s.prompt in shared and s.run.tokens != wanted[s.prompt]}
    return 1.0 - len(different) / len(shared)


def _drafts(taken: Sequence[Sample]) -> dict[str, Any]:
    """Statistics of drafts over all samples; empty if unknown."""
    known = [s.run.drafts for s in taken if s.run.drafts is not None]
    if not known:
        return {}
    total = {name: sum(drafts[name] for drafts in known) for name in known[0]}
    accepted = total["accepted"]
    return {"drafts": total, "accepted_per_pass": accepted / total["passes"]}


def past_end(full: Sequence[Sample], ends: Sequence[int]) -> float | None:
    """Share of full depth's new tokens that follow its first end-of-sequence token."""
    rows = [s.run.tokens for s in full]
    if not rows:
        return None
    past = sum(len(row) - 1 - min((row.index(end) for end in ends if end in row), default=len(row) - 1) for row in rows)
    return past / sum(len(row) for row in rows)

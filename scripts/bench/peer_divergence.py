"""Counts where rounding makes lossless tokens differ from full depth, for scripts.bench.peers.

In float32 the two agree. In bfloat16 a pass over several tokens rounds differently from passes over one, so the other
of two almost equally likely tokens may win. This module reports how often that happens, and the margin between the two.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

import tide_jax
from scripts.bench.peer_measures import Run
from scripts.bench.peer_tide import tide_variant


def divergence(engine: tide_jax.TIDE, prompts: Sequence[list[int]], count: int) -> dict[str, Any]:
    """Share of prompts whose lossless tokens differ from full depth's, and the margins at the first difference."""
    full, lossless = tide_variant(engine, "full"), tide_variant(engine, "lossless")
    rows, typical = list[dict[str, Any]](), list[float]()
    for number, ids in enumerate(tqdm(prompts, desc=f"divergence in {engine.model.dtype}")):
        wanted, found = full(ids, count), lossless(ids, count)
        margins = _margins(engine, ids, wanted)
        typical.extend(margins)
        first = first_difference(wanted.tokens, found.tokens)
        if first is not None:
            rows.append({"prompt": number, "token": first, "margin": margins[first]})
    return {
        "dtype": str(engine.model.dtype),
        "prompts": len(prompts),
        "new_tokens": count,
        "diverging": len(rows) / len(prompts),
        "first_differences": rows,
        "median_margin_there": statistics.median(row["margin"] for row in rows) if rows else None,
        "median_margin": statistics.median(typical),
    }


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)


def _margins(engine: tide_jax.TIDE, ids: list[int], run: Run) -> list[float]:
    """Logit margin between the two likeliest tokens, before each new token of full depth."""
    logits = np.asarray(engine([[*ids, *run.tokens[:-1]]], mode="full").logits[0, len(ids) - 1 :], np.float32)
    best = np.sort(np.partition(logits, -2, axis=-1)[:, -2:], axis=-1)
    return [float(m) for m in best[:, 1] - best[:, 0]]

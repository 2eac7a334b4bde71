"""The end of the demo: full depth, lossless and 8-bit weights on the same prompts, shown as they finish."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

import tide_jax
from tide_jax.generation.batch import bucket

MODES = {
    "full": ("full", None),
    "lossless": ("lossless", "int8"),
    "int8": ("full", None),
}
"""Arguments `mode` and `draft` of each column; "int8" is full depth of the model with 8-bit weights."""


_NOISE = 1.05


def compare(
    console: Console, folder: Path, engine: tide_jax.TIDE, prompts: dict[str, list[int]], new_tokens: int
) -> dict[str, Any]:
    """Generates from all prompts in all modes, in turn; shows speeds as they are measured, and recommends a mode.

    Args:
      folder: the converted model, which is loaded with 8-bit weights, too.
      prompts: token ids by text.
    """
    small = tide_jax.TIDE(tide_jax.load(folder, weights="int8"))
    engines = {name: small if name == "int8" else engine for name in MODES}
    for ids in {bucket(len(ids)): ids for ids in prompts.values()}.values():
        for name in MODES:  # compiles a program for each padded length, and measures what drafts cost
            generate(engines[name], name, ids, new_tokens)
    rows: list[dict[str, Any]] = []
    with Live(table(rows), console=console, auto_refresh=False) as live:
        for prompt, ids in prompts.items():
            rows.append({"prompt": prompt})
            for name in MODES:
                out = generate(engines[name], name, ids, new_tokens)
                rows[-1][name] = {"tokens": out.tokens[0].tolist(), "tokens_per_second": out.stats.tokens_per_second}
                live.update(table(rows), refresh=True)
    speedups = {
        name: statistics.median(row[name]["tokens_per_second"] / row["full"]["tokens_per_second"] for row in rows)
        for name in MODES
    }
    identical = {name: all(row[name]["tokens"] == row["full"]["tokens"] for row in rows) for name in MODES}
    return {
        "recommended": recommend(speedups, identical),
        "speedups": speedups,
        "identical": identical,
        "side_by_side": rows,
    }


def recommend(speedups: dict[str, float], identical: dict[str, bool]) -> dict[str, Any]:
    """Lossless mode if it changed no token and was faster than full depth by more than the noise."""
    best = "lossless" if identical["lossless"] and speedups["lossless"] > _NOISE * speedups["full"] else "full"
    return {"mode": best, "draft": MODES[best][1], "speedup": speedups[best], "identical": identical[best]}


def generate(engine: tide_jax.TIDE, name: str, ids: list[int], new_tokens: int) -> Any:
    mode, draft = MODES[name]
    return engine.generate(ids, mode=mode, draft=draft, max_new_tokens=new_tokens)  # type: ignore[arg-type]


def table(rows: list[dict[str, Any]]) -> Table:
    """Tokens per second, with the speed-up and whether the tokens are those of full depth."""
    found = Table(title="tokens per second, the same prompts")
    for name in ("prompt", "full depth", "lossless", "8-bit weights"):
        found.add_column(name, justify="left" if name == "prompt" else "right")
    for row in rows:
        found.add_row(row["prompt"], *(cell(row, name) for name in MODES))
    return found


def cell(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return "..."
    speed = row[name]["tokens_per_second"]
    if name == "full":
        return f"{speed:.1f}"
    same = "same text" if row[name]["tokens"] == row["full"]["tokens"] else "other text"
    return f"{speed:.1f} ({speed / row['full']['tokens_per_second']:.2f} x, {same})"


def advice(found: dict[str, Any]) -> str:
    """What to use, in a line or two."""
    best, speedups = found["recommended"], found["speedups"]
    if best["mode"] == "full":
        lines = ["Recommended here: full depth; nothing that keeps every token was faster."]
    else:
        call = f"engine.generate(ids, mode={best['mode']!r}, draft={best['draft']!r})"
        lines = [f"Recommended: {call}, {best['speedup']:.2f} x full depth with every token the same."]
    if speedups["int8"] > _NOISE * best["speedup"]:
        lines.append(
            f"8-bit weights are {speedups['int8']:.2f} x and take less memory, if other words are fine: "
            "tide_jax.load(..., weights='int8')."
        )
    return "\n".join(lines)

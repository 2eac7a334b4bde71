"""Makes the tables of lossless mode: the demo's modes side by side, passes over several tokens, speed by drafts."""

from __future__ import annotations

import json
import statistics
from typing import Any

from scripts.readme.speed import RESULTS, where

_WEIGHTS = {"float": "float32", "int8": "int8"}
_MODELS = {576: "SmolLM2-135M", 896: "Qwen2.5-Coder-0.5B"}
_VARIANTS = {
    "full": "full depth",
    "text": "lossless, text drafts",
    "twin": "lossless, 8-bit twin and text draft",
    "int8": "8-bit weights, full depth (other tokens)",
    "int8, text": "8-bit weights, lossless, text drafts",
}


def modes_table() -> str:
    """Full depth, lossless mode and 8-bit weights side by side, from the demo."""
    report = json.loads((RESULTS / "demo_report.json").read_text())
    rows = report["side_by_side"]
    lines = [
        f"SmolLM2-135M-Instruct; {where(report['machine'])}; `make demo`, medians of {len(rows)} prompts, greedy.",
        "",
        "| | tokens/s | / full depth | text |",
        "|---|---:|---:|---|",
    ]
    for name, title in _MODES.items():
        speed = statistics.median(row[name]["tokens_per_second"] for row in rows)
        text = "the same" if report["identical"][name] else "other words"
        lines.append(f"| {title} | {speed:.0f} | {report['speedups'][name]:.2f} | {text if name != 'full' else ''} |")
    return "\n".join(lines)


_MODES = {
    "full": "full depth, float32",
    "lossless": '`mode="lossless"`: an 8-bit copy drafts, the full model verifies',
    "int8": '`weights="int8"`, full depth',
}


def passes_table() -> str:
    """Time of a pass over several tokens, in passes over one."""
    report = json.loads((RESULTS / "passes.json").read_text())
    widths = sorted({row["tokens"] for model in report["models"] for row in model["passes"]})
    lines = [
        f"{where(report['machine'])}; whole passes over tokens of one row, head and cache included; medians of "
        f"{report['method']['rounds']} alternating rounds, in passes over one token.",
        "",
        "| | one token, ms | " + " | ".join(f"{width} tokens" for width in widths[1:]) + " |",
        "|---|" + "---:|" * len(widths),
    ]
    for model in report["models"]:
        for weights, title in _WEIGHTS.items():
            found = {row["tokens"]: row for row in model["passes"] if row["weights"] == weights}
            ratios = " | ".join(f"{found[width]['ratio']:.2f}" for width in widths[1:])
            lines.append(f"| {_MODELS[model['hidden_size']]}, {title} | {found[1]['ms']:.1f} | {ratios} |")
    return "\n".join(lines)


def lossless_table() -> str:
    """Lossless mode against full depth, for each measured model."""
    parts = []
    for name in ("lossless", "lossless_0.5b"):
        path = RESULTS / f"{name}.json"
        if path.is_file():
            parts.append(_lossless_part(json.loads(path.read_text())))
    return "\n\n".join(parts)


def _lossless_part(report: dict[str, Any]) -> str:
    model, method = report["model"], report["method"]
    lines = [
        f"{model['name']}, {model['dtype']}; {where(report['machine'])}; {method['new_tokens']} new tokens, greedy, "
        f"medians over prompts and {method['rounds']} alternating rounds; tokens after the first.",
        "",
        "| prompts | batch | | tokens/s | / full depth (quartiles; least) | same tokens | tokens a pass | drafts |",
        "|---|---:|---|---:|---:|---:|---:|---|",
    ]
    for part in report["sets"]:
        for variant, row in part["variants"].items():
            lines.append(
                f"| {part['prompts']} {part['name']} | {part['batch']} | {_VARIANTS[variant]} | "
                f"{row['tokens_per_second']:.1f} | {_ratio(row)} | {row['same_tokens_as_full']:.0%} | "
                f"{_number(row.get('tokens_a_pass'))} | {_drafts(row)} |"
            )
    return "\n".join(lines)


def _ratio(row: dict[str, Any]) -> str:
    low, high = row["ratio_quartiles"]
    return f"{row['ratio_to_full']:.2f} ({low:.2f} to {high:.2f}; {row['least_ratio']:.2f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _drafts(row: dict[str, Any]) -> str:
    return "; ".join(
        f"{name}: {each['passes']:.0%} of passes, {each['accepted'] / max(1, each['drafted']):.0%} accepted"
        for name, each in row.get("drafters", {}).items()
        if each["drafted"]
    )

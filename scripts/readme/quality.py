"""Makes the tables of quality against depth and time, from the reports of scripts.bench.quality."""

from __future__ import annotations

import json
from typing import Any

from scripts.readme.speed import NOT_MEASURED, RESULTS, where


def quality_table() -> str:
    """Each strategy at the threshold of least depth that keeps the limits, from scripts.bench.quality."""
    report = _quality()
    if report is None:
        return NOT_MEASURED
    target = report["target"]
    lines = [
        _quality_setting(report),
        "",
        f"Least depth measured with at least {target['agreement']:.1%} agreement, and the depth of an oracle that "
        "exits at the first right answer:",
        "",
        *_quality_best(report, "at_agreement", "oracle"),
        "",
        f"The same with a perplexity ratio of at most {target['perplexity_ratio']}, too, and an oracle that knows each "
        "answer's divergence and spends as much of it:",
        "",
        *_quality_best(report, "at_target", "oracle_by_kl"),
    ]
    return "\n".join(lines)


def _quality_best(report: dict[str, Any], best: str, oracle: str) -> list[str]:
    """A table of each strategy's best row under one limit, with an oracle's depth."""
    rows = ((entry, entry[best] or entry["rows"][-1]) for entry in report["strategies"])
    lines = [f"{_quality_row(report, entry, row)} {entry[oracle]['depth']:.1%} |" for entry, row in rows]
    return [_QUALITY_HEADER + " oracle's depth |", _QUALITY_RULE + "---:|", *lines]


def quality_frontier() -> str:
    """Every strategy at every threshold measured."""
    report = _quality()
    if report is None:
        return NOT_MEASURED
    lines = [_quality_setting(report), "", _QUALITY_HEADER, _QUALITY_RULE]
    for entry in report["strategies"]:
        lines += [_quality_row(report, entry, row) for row in reversed(entry["rows"])]
    return "\n".join(lines)


def weights_table() -> str:
    """What exits give with float and with 8-bit weights, by what they do to the cache.

    An unfinished report counts with the strategies that were measured to the end.
    """
    paths = [path for name in ("quality_float", "quality_int8") if (path := RESULTS / f"{name}.json").exists()]
    reports = [json.loads(path.read_text()) for path in paths]
    if not reports:
        return NOT_MEASURED
    lines = [_quality_setting(reports[0]), "", _WEIGHTS_HEADER, _WEIGHTS_RULE]
    for report in reports:
        lines += [_weights_row(report, entry) for entry in report["strategies"] if entry["at_agreement"]]
    return "\n".join(lines)


_WEIGHTS_HEADER = (
    "| weights | strategy | threshold | depth of text | agreement | depth of generation | tokens/s / full depth of the "
    "same weights | time saved / layers skipped | full depth, tokens/s |"
)
_WEIGHTS_RULE = "|---|---|" + "---:|" * 7


def _weights_row(report: dict[str, Any], entry: dict[str, Any]) -> str:
    row = entry["at_agreement"]
    text, made = row["text"], row["generation"]
    gain = "" if made["gain_per_skipped"] is None else f"{made['gain_per_skipped']:.2f}"
    return (
        f"| {report['model']['weights']} | {entry['name']} | {row['threshold']:g} | {text['depth']:.1%} | "
        f"{text['agreement']:.1%} | {made['depth']:.1%} | {made['speed_ratio']:.2f} | {gain} | "
        f"{made['full_tokens_per_second']:.0f} |"
    )


_QUALITY_HEADER = (
    "| strategy | threshold | layers run | depth | agreement | perplexity ratio | KL, nats | executed | "
    "tokens/s / full depth |"
)
_QUALITY_RULE = "|---|---:|---:|---:|---:|---:|---:|---:|---:|"


def _quality() -> dict[str, Any] | None:
    """The report; None if it is missing or unfinished."""
    path = RESULTS / "quality.json"
    report = json.loads(path.read_text()) if path.exists() else None
    return report if report and report["complete"] else None


def _quality_setting(report: dict[str, Any]) -> str:
    text, made = report["text"], report["generation"]
    generated = (
        ""
        if made is None
        else f"; tokens/s at batch 1, over full depth run in turn: medians of {made['prompts']} greedy "
        f"generations of {made['new_tokens']} tokens"
    )
    model = report["model"]
    return (
        f"{where(report['machine'])}; {model['name']}, {model['dtype']}; {text['tokens']} tokens "
        f"of {text['texts']} held-out texts ({text['file']}), position 0 left out{generated}."
    )


def _quality_row(report: dict[str, Any], entry: dict[str, Any], row: dict[str, Any]) -> str:
    text, made, layers = row["text"], row["generation"], report["model"]["layers"]
    threshold = f"{row['threshold']:.4f}".rstrip("0").rstrip(".")
    executed, speed = ("", "") if made is None else (f"{made['executed']:.1%}", f"{made['speed_ratio']:.2f}")
    ratio = f"{text['perplexity_ratio']:.3f}" if text["perplexity_ratio"] < 10 else "> 10"
    return (
        f"| {entry['name']} | {threshold} | {text['layers']:.2f} of {layers} | {text['depth']:.1%} | "
        f"{text['agreement']:.1%} | {ratio} | {text['kl']:.4f} | {executed} | {speed} |"
    )

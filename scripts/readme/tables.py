"""Writes measured tables into README.md and docs/ from scripts/results/: ``python -m scripts.readme.tables``.

Each table is between ``<!-- table:NAME -->`` and ``<!-- end -->``. With --check nothing is written, and the exit code
is 1 if a file differs from the results.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
from pathlib import Path
from typing import Any

from scripts.gpu.table import gpu_table
from scripts.readme.lossless import lossless_table, modes_table, passes_table
from scripts.readme.products import llama_cpp_table, products_table, summary_table
from scripts.readme.quality import quality_frontier, quality_table, weights_table
from scripts.readme.reliability import reliability_table
from scripts.readme.roofline import roofline_table
from scripts.readme.speed import (
    NOT_MEASURED,
    RESULTS,
    decode_table,
    gpu_aot_table,
    hybrids_table,
    long_table,
    prompts_table,
    start_table,
    tpu_aot_table,
    where,
)

ROOT = Path(__file__).resolve().parents[2]


def demo_table() -> str:
    """The demo's run."""
    report = json.loads((RESULTS / "demo_report.json").read_text())
    full, exits, layers = report["full"], report["exit"], report["layers"]
    rows = [
        f"{where(report['machine'])}; `make demo`, threshold {report['threshold']}, {exits['tokens']} tokens over "
        f"{len(report['prompts'])} prompts, {report['seconds']:.0f} s from checkpoint to report.",
        "",
        "| | tokens/s | mean layers run | agreement with the full model |",
        "|---|---:|---:|---:|",
        f"| full depth | {full['tokens_per_second']:.1f} | {full['layers_per_token']:.2f} of {layers} | |",
        f"| with exits | {exits['tokens_per_second']:.1f} | {exits['layers_per_token']:.2f} of {layers} | "
        f"{exits['agreement']:.1%} |",
        "",
        "On held-out text of the same kind, by threshold:",
        "",
        "| threshold | tokens that exit | mean layers | agreement | agreement if exits left the cache alone |",
        "|---:|---:|---:|---:|---:|",
    ]
    rows += [
        f"| {row['threshold']:.2f} | {row['exit_rate']:.1%} | {row['depth'] * layers:.1f} of {layers} | "
        f"{row['agreement']:.1%} | {row['label_agreement']:.1%} |"
        for row in report["calibration"]["exits"]
    ]
    return "\n".join(rows)


def peers_table() -> str:
    """tide_jax compared with transformers, from scripts.bench.peers."""
    path = RESULTS / "peers.json"
    report = json.loads(path.read_text()) if path.exists() else None
    if report is None or not report["complete"]:
        return NOT_MEASURED
    lines = [_peers_setting(report)]
    for entry in report["sets"]:
        lines += ["", f"| {entry['name']} prompts {_PEERS_HEADER}", "|---|" + "---:|" * (_PEERS_HEADER.count("|") - 1)]
        lines += [_peers_row(row, report["memory"].get(row["name"], {})) for row in entry["variants"]]
    titles = {row["name"]: row["title"] for entry in report["sets"] for row in entry["variants"]}
    failed = [f"{titles.get(name, name)}: {reason}." for name, reason in report["failed"].items()]
    found = report["divergence"]
    if found is not None:
        there = found["median_margin_there"]
        margin = "" if there is None else f", with a median margin of {there:.3f} there"
        failed.append(
            f"In {found['dtype']}, {found['diverging']:.0%} of {found['prompts']} lossless sequences of "
            f"{found['new_tokens']} tokens part from full depth{margin}; the median margin between the two likeliest "
            f"tokens is {found['median_margin']:.3f}."
        )
    return "\n".join([*lines, *(line for text in failed for line in ("", text))])


_PEERS_HEADER = (
    "| tokens/s (quartiles) | / eager | / full depth | tokens/s, prompt included | first token, s | "
    "layers per token | drafts accepted per pass | same tokens as full depth | peak MiB |"
)


def _peers_setting(report: dict[str, Any]) -> str:
    method, model, threads, exits = report["method"], report["model"], report["threads"], report["exits"]
    lengths = sorted(n for entry in report["sets"] for n in entry["prompt_tokens"])
    slow = method["slow"]
    dials = {} if exits is None else exits["config"]
    promised = (
        ""
        if exits is None
        else (
            f" Exits: threshold {dials['exit_threshold']}, tilt {dials['threshold_tilt']:g}, {dials['kv_strategy']}; "
            f"{exits['promise']}."
        )
    )
    past = ", ".join(f"{entry['past_end'] or 0.0:.0%} ({entry['name']})" for entry in report["sets"])
    return (
        f"{where(report['machine'])}; {model['name']}, {model['dtype']}, {threads['cores']} threads for all; "
        f"prompts of {lengths[0]} to {lengths[-1]} tokens, {method['new_tokens']} new ones for all, {past} of them "
        f"past the end; medians over prompts and {method['rounds']} alternating rounds ({', '.join(slow['variants'])}: "
        f"{slow['prompts']} prompts, {slow['rounds']} round).{promised}"
    )


def _peers_row(row: dict[str, Any], memory: dict[str, Any]) -> str:
    def number(value: float | None, form: str = ".2f") -> str:
        return "" if value is None else format(value, form)

    low, high = row["tokens_per_second_quartiles"]
    cells = [
        row["title"],
        f"{row['tokens_per_second']:.1f} ({low:.1f} to {high:.1f})",
        number(row["ratio_to_eager"]),
        number(row["ratio_to_full"]),
        number(row["whole_tokens_per_second"], ".1f"),
        number(row["first_token_seconds"]),
        number(row["layers_per_token"], ".1f"),
        number(row.get("accepted_per_pass")),
        number(row["same_tokens_as_full"], ".0%"),
        number(memory.get("peak"), ".0f"),
    ]
    return f"| {' | '.join(cells)} |"


def calibrate_line() -> str:
    """Calibration's time against a bare forward pass, from scripts.bench.calibrate."""
    path = RESULTS / "calibrate.json"
    if not path.exists():
        return NOT_MEASURED
    report = json.loads(path.read_text())
    text, total, bare = report["text"], report["calibration"]["total"], report["forward"]
    return (
        f"{where(report['machine'])}; {text['texts']} texts, {text['tokens']} tokens: calibration takes "
        f"{total['seconds']:.0f} s, a bare forward pass over the same tokens {bare['seconds']:.0f} s "
        f"({report['ratio']['seconds']:.2f} x; {report['ratio']['cpu_seconds']:.2f} x in processor time)."
    )


def family_counts() -> str:
    """Counts the model types that convert, in a sentence or two."""
    report = json.loads((RESULTS / "families.json").read_text())
    types = report["types"]
    counts = collections.Counter(entry["status"] for entry in types.values())
    worst = max(entry["relative"] for entry in types.values() if entry["status"] == "parity")
    in_part = f", {counts['in part']} in part" if counts["in part"] else ""
    return (
        f"Of the {len(types)} causal language model types of transformers {report['versions']['transformers']}, "
        f"{counts['parity']} convert with parity{in_part}; no logit differs by more than {worst:.0e} of their range. "
        f"{counts['refused']} are refused by name, with the reason; {counts['not a decoder']} are encoders or pairs of "
        "encoder and decoder. docs/families.md lists them all."
    )


_PAPER = {
    "LLaMA": "llama llama4_text llama4",
    "DeepSeek": "deepseek_v2 deepseek_v3 deepseek_v32",
    "Qwen": "qwen2 qwen2_moe qwen3 qwen3_moe",
    "Mistral": "mistral ministral ministral3",
    "Mixtral": "mixtral",
    "Gemma": "gemma gemma2 gemma3_text gemma3",
    "GPT-2": "gpt2 gpt-sw3",
    "GPT-NeoX": "gpt_neox gpt_neox_japanese",
    "Phi": "phi phi3 phimoe",
    "Falcon": "falcon",
    "OPT": "opt",
}


def paper_families() -> str:
    """The families that the TIDE paper names, with their model types at parity."""
    types = json.loads((RESULTS / "families.json").read_text())["types"]
    rows = ["| families of the TIDE paper | model types at parity |", "|---|---|"]
    for family, names in _PAPER.items():
        rows.append(f"| {family} | {', '.join(n for n in names.split() if types[n]['status'] == 'parity') or 'none'} |")
    return "\n".join(rows)


def family_table() -> str:
    """Each model type, from family_table.py."""
    report = json.loads((RESULTS / "families.json").read_text())
    types = report["types"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"Measured with {versions}.", "", "| model type | largest difference | what it has |", "|---|---:|---|"]
    for name, entry in types.items():
        if entry["status"] in ("parity", "in part", "failed"):
            what = ", ".join(entry.get("features", []))
            reason = f" ({entry['status']}: {entry['reason']})" if entry["status"] != "parity" else ""
            difference = f"{entry['relative']:.0e}" if "relative" in entry else ""
            lines.append(f"| {name} | {difference} | {what}{reason} |")
    for status in ("refused", "not a decoder"):
        by_reason: dict[str, list[str]] = {}
        for name, entry in types.items():
            if entry["status"] == status:
                by_reason.setdefault(entry["reason"], []).append(name)
        lines += ["", f"| {_STATUS[status]} | why |", "|---|---|"]
        lines += [f"| {', '.join(names)} | {reason} |" for reason, names in by_reason.items()]
    return "\n".join(lines)


_STATUS = {"refused": "decoders that are refused", "not a decoder": "encoders and encoder-decoder pairs"}
TABLES = {
    "calibrate": calibrate_line,
    "decode": decode_table,
    "demo": demo_table,
    "family_counts": family_counts,
    "families": family_table,
    "llama_cpp": llama_cpp_table,
    "long": long_table,
    "lossless": lossless_table,
    "roofline": roofline_table,
    "start": start_table,
    "summary": summary_table,
    "gpu": lambda: gpu_table(RESULTS / "gpu.json"),
    "gpu_aot": gpu_aot_table,
    "tpu_aot": tpu_aot_table,
    "modes": modes_table,
    "paper_families": paper_families,
    "passes": passes_table,
    "peers": peers_table,
    "products": products_table,
    "hybrids": hybrids_table,
    "prompts": prompts_table,
    "quality": quality_table,
    "quality_frontier": quality_frontier,
    "reliability": reliability_table,
    "weights": weights_table,
}
_PAGES = ("accelerators", "families", "choosing_quality", "kernels", "lossless", "reliability", "results")
FILES = (ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in _PAGES))


def render(text: str) -> str:
    """A file with every table filled in."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table:{match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table:(\w+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is out of date")
    args = parser.parse_args()
    stale = [path for path in FILES if path.exists() and render(path.read_text()) != path.read_text()]
    for path in stale:
        if args.check:
            print(f"{path.name} is out of date: run `python -m scripts.readme.tables`", file=sys.stderr)
        else:
            path.write_text(render(path.read_text()))
    return int(args.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())

"""Makes the tables about products on a CPU and about llama.cpp, from products.json and llama_cpp.json."""

from __future__ import annotations

import json
from typing import Any

from scripts.readme.speed import NOT_MEASURED, RESULTS, where

_VARIANTS = {"XLA": "XLA's products, float32", "float32": "float32", "int8": "8-bit weights"}
_PARTS = ("tide_jax, float32", "llama.cpp, F32", "tide_jax, int8", "llama.cpp, Q8_0")


def products_table() -> str:
    """Products alone by rows, and steps at full depth, with XLA and with the kernel."""
    path = RESULTS / "products.json"
    if not path.exists():
        return NOT_MEASURED
    report = json.loads(path.read_text())
    rows = sorted({int(key.split(", ")[1]) for key in report["products"][0]["times"]})
    lines = [
        f"{where(report['machine'])}; medians of {report['method']['rounds']} alternating rounds.",
        "",
        f"| microseconds a product, by rows | {' | '.join(map(str, rows))} |",
        f"|---|{'---:|' * len(rows)}",
    ]
    for product in report["products"]:
        for name, title in _VARIANTS.items():
            cells = (_one(product, f"{name}, {count}") for count in rows)
            lines.append(f"| {product['depth']} -> {product['outputs']}, {title} | {' | '.join(cells)} |")
    lines += ["", "| ms a step at full depth | bytes alone | step | of the floor |", "|---|---:|---:|---:|"]
    for part in report["decoding"]:
        for name, title in _VARIANTS.items():
            kind = "int8" if name == "int8" else "float32"
            step, floor = part["times"][name]["ms"], part["times"][f"{kind}, bytes alone"]["ms"]
            lines.append(f"| batch {part['batch']}, {title} | {floor:.1f} | {step:.1f} | {floor / step:.0%} |")
    return "\n".join(lines)


def _one(product: dict[str, Any], name: str) -> str:
    return f"{1e3 * product['times'][name]['ms'] / product['matrices']:.0f}"


def llama_cpp_table() -> str:
    """tide_jax compared with llama.cpp."""
    path = RESULTS / "llama_cpp.json"
    if not path.exists():
        return NOT_MEASURED
    report = json.loads(path.read_text())
    method = report["method"]
    lines = [
        f"{where(report['machine'])}, llama-cpp-python {report['machine']['llama-cpp-python']}, {method['threads']} "
        f"threads for all; {method['steps']} greedy tokens after a prompt of {method['prompt']}, medians of "
        "alternating rounds in one process. tokens/s are of all sequences together; a longer prompt is read to its "
        "first token.",
        "",
        f"| | {' | '.join(_PARTS)} |",
        f"|---|{'---:|' * len(_PARTS)}",
    ]
    for model in report["models"]:
        for part in model["decoding"]:
            times = part["times"]
            rates = [f"{1e3 * part['batch'] / times[name]['ms']:.1f}" for name in _PARTS]
            lines.append(f"| {model['name']}, batch {part['batch']}, tokens/s | {' | '.join(rates)} |")
        prompt = model["prompt"]
        cells = [f"{prompt['times'][name]['ms']:.0f}" for name in _PARTS]
        lines.append(f"| {model['name']}, prompt of {prompt['tokens']}, ms | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary_table() -> str:
    """The README's table: the same rows, one engine per line."""
    path = RESULTS / "llama_cpp.json"
    if not path.exists():
        return NOT_MEASURED
    report = json.loads(path.read_text())
    batches = [part["batch"] for part in report["models"][0]["decoding"]]
    header = [f"tokens/s, batch {batch}" for batch in batches] + ["prompt of 512 tokens, ms"]
    lines = [
        f"{where(report['machine'])}; one process, medians of alternating rounds, greedy.",
        "",
        f"| | {' | '.join(header)} |",
        f"|---|{'---:|' * len(header)}",
    ]
    for model in report["models"]:
        for name in _PARTS:
            cells = [f"{1e3 * part['batch'] / part['times'][name]['ms']:.0f}" for part in model["decoding"]]
            cells.append(f"{model['prompt']['times'][name]['ms']:.0f}")
            lines.append(f"| {model['name']}: {name} | {' | '.join(cells)} |")
    return "\n".join(lines)

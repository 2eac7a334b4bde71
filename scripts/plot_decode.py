"""Draws time against depth from bench_decode.py's JSON: ``python scripts/plot_decode.py decode.json decode.png``.

Needs the extra "plot".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    report = json.loads(args.results.read_text())
    layers = report["model"]["layers"]
    figure, axes = plt.subplots(1, len(report["batches"]), figsize=(5 * len(report["batches"]), 4), squeeze=False)
    for axis, batch in zip(axes[0], report["batches"], strict=True):
        times = {row["name"]: row["ms_per_step"] for row in batch["variants"]}
        rows = [row for row in batch["variants"] if "layers" in row]
        recomputed = [row for row in rows if row.get("kv_strategy") == "recompute"]
        forced = [(row["layers"], row["ms_per_step"]) for row in rows if row not in recomputed]
        for row in recomputed:
            axis.plot(row["layers"], row["ms_per_step"], marker="s", linestyle="", label="cache recomputed")
        axis.plot(*zip(*forced, (layers, times["full"]), strict=True), marker="o", label="measured")
        axis.plot([0, layers], [times["head only"], times["full"]], linestyle="--", label="skipped layers for free")
        axis.set(
            xlabel=f"layers run (of {layers})", ylabel="ms per step", title=f"batch {batch['batch']}", ylim=(0, None)
        )
        axis.legend()
    figure.tight_layout()
    figure.savefig(args.picture, dpi=150)


if __name__ == "__main__":
    main()

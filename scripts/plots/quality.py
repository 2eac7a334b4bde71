"""Draws quality.json of scripts.bench.quality: ``python -m scripts.plots.quality quality.json quality.svg``.

It shows agreement against depth and against wall clock, and the perplexity ratio against depth, with one line per
strategy. Vertical lines mark the oracle's depth, horizontal ones the limits, stars the least depth that keeps the limit
of agreement. Needs the extra "plot".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.results.read_text()), args.picture)


def draw(report: dict[str, Any], picture: Path) -> None:
    """Writes the picture, in the format of its file name."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5))
    for number, entry in enumerate(report["strategies"]):
        _draw_strategy(axes, entry, f"C{number}")
    target = report["target"]
    axes[0].axhline(target["agreement"], color="grey", linestyle=":", linewidth=1)
    axes[1].axhline(target["agreement"], color="grey", linestyle=":", linewidth=1)
    axes[2].axhline(target["perplexity_ratio"], color="grey", linestyle=":", linewidth=1)
    axes[0].set(xlabel="share of the layers run", ylabel="agreement with the full model", title="held-out text")
    axes[1].set(
        xlabel="time per token / full depth", ylabel="agreement with the full model", title="generation, batch 1"
    )
    axes[2].set(xlabel="share of the layers run", ylabel="perplexity / full model's", title="held-out text")
    # Limit the axis: very bold exits are of no use, and their range would squeeze the interesting corner.
    ratios = [row["text"]["perplexity_ratio"] for entry in report["strategies"] for row in entry["rows"]]
    axes[2].set_ylim(min(0.99, *ratios), min(max(ratios) + 0.01, 1.5))
    for axis in axes[:2]:
        axis.set_ylim(max(axis.get_ylim()[0], 0.5), 1.01)
    axes[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)


def _draw_strategy(axes: Any, entry: dict[str, Any], colour: str) -> None:
    rows, label = entry["rows"], entry["name"]
    made = [row for row in rows if row["generation"] is not None]
    lines = [
        ([row["text"]["depth"] for row in rows], [row["text"]["agreement"] for row in rows]),
        ([row["generation"]["time_ratio"] for row in made], [row["generation"]["agreement"] for row in made]),
        ([row["text"]["depth"] for row in rows], [row["text"]["perplexity_ratio"] for row in rows]),
    ]
    for axis, (across, up) in zip(axes, lines, strict=True):
        axis.plot(across, up, marker="o", markersize=3, color=colour, label=label)
    for axis, oracle in ((axes[0], entry["oracle"]), (axes[2], entry["oracle_by_kl"])):
        axis.axvline(oracle["depth"], color=colour, linestyle="--", linewidth=1)
    star = {"marker": "*", "markersize": 13, "color": colour, "linestyle": ""}
    if (best := entry["at_target"]) is not None:
        axes[2].plot(best["text"]["depth"], best["text"]["perplexity_ratio"], **star)
    if (best := entry["at_agreement"]) is None:
        return
    axes[0].plot(best["text"]["depth"], best["text"]["agreement"], **star)
    if best["generation"] is not None:
        axes[1].plot(best["generation"]["time_ratio"], best["generation"]["agreement"], **star)


if __name__ == "__main__":
    main()

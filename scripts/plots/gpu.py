"""Draws gain against mean depth from verify_gpu.py's JSON: ``python -m scripts.plots.gpu gpu.json gpu_gain.svg``.

Every measured mix of exits is a point. Broken lines show the possible gain if layers took all the time, stars show the
TIDE paper's figures. Only results from a GPU are drawn. Needs the extra "plot".
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from scripts.gpu.targets import PAPER, PAPER_DEPTH, gains, most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    report = json.loads(args.results.read_text())
    if report["platform"] != "gpu" or report["tiny"] or not gains(report):
        print(f"{args.results} has no gains measured on a GPU: nothing drawn", file=sys.stderr)
        return 1
    draw(report, args.picture)
    return 0


def draw(report: dict[str, Any], picture: Path) -> None:
    """Writes the picture, in the format of its file name."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4.5))
    _panel(axis, report, "throughput", "throughput gained")
    figure.suptitle(f"{report['machine']['device']}, {report['machine']['date']}")
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)


def _panel(axis: Any, report: dict[str, Any], what: str, label: str) -> None:
    found = [g for g in gains(report) if g["measure"].startswith(what)]
    for number, measure in enumerate(sorted({g["measure"] for g in found})):
        points = sorted((g["depth"], g["gain"]) for g in found if g["measure"] == measure)
        axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=f"C{number}", label=measure)
    depths = np.linspace(min([g["depth"] for g in found], default=0.5), 1.0)
    axis.plot(
        depths,
        [most(depth) for depth in depths],
        linestyle="--",
        color="grey",
        label="if layers were all the time",
    )
    for number, (name, gain) in enumerate((n, g) for n, g in PAPER.items() if n.startswith(what)):
        style = {"marker": "*", "markersize": 13, "linestyle": "", "color": f"C{number + 5}"}
        axis.plot(PAPER_DEPTH, gain, **style, label=f"paper, {name}")
    axis.axvline(PAPER_DEPTH, color="grey", linestyle=":", linewidth=1)
    axis.set(xlabel="mean share of the layers run", ylabel=label, title=what)
    axis.legend(fontsize="small")


if __name__ == "__main__":
    raise SystemExit(main())

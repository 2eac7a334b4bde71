"""Makes the GPU table of the documents from verify_gpu.py's report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.gpu.kernel_hash import kernel_hash
from scripts.gpu.targets import NOT_RUN, targets


def gpu_table(path: Path, current: str | None = None) -> str:
    """Lists every target with a GPU's measurement.

    Args:
      path: the report; it counts only if it was made on a GPU, at full size.
      current: hash of the current kernel sources; read from disk when omitted.
    """
    report = _report(path)
    stale = report is not None and report["kernels_sha256"] != (current or kernel_hash())
    lines = [_setting(report, stale), "", "| what | wanted | measured | met |", "|---|---|---|---|"]
    for target in targets():
        found = None if report is None else target.find(report)
        cells = (NOT_RUN, "") if found is None else (found.text, {True: "yes", False: "no", None: ""}[found.met])
        note = " (stale)" if stale and found is not None else ""
        lines.append(f"| {target.what} | {target.wanted} | {cells[0]}{note} | {cells[1]} |")
    return "\n".join(lines)


def _report(path: Path) -> dict[str, Any] | None:
    report = json.loads(path.read_text()) if path.exists() else None
    return report if report and report["platform"] == "gpu" and not report["tiny"] else None


def _setting(report: dict[str, Any] | None, stale: bool) -> str:
    if report is None:
        return f"No results yet: every row is {NOT_RUN}."
    machine, roof = report["machine"], report["roof"]
    sheet = roof["data_sheet_gb_s"]
    promised = "" if sheet is None else f" of {sheet} on the data sheet"
    text = (
        f"{machine['device']}, {machine['date']}, Python {machine['python']}, jax {machine['versions']['jax']}; "
        f"kernels {report['kernels_sha256'][:12]}; {roof['gb_s']:.0f} GB/s measured{promised}. Each operation is "
        "called many times in one program, on arguments that the GPU's cache does not hold together."
    )
    return text + (" **stale**: the kernels have changed since." if stale else "")

"""Makes the table of campaigns in docs/reliability.md, from the results of fuzz_files.py and kill_runs.py."""

from __future__ import annotations

import json

from scripts.readme.speed import RESULTS, where


def reliability_table() -> str:
    """Numbers of damaged files and killed runs, and their outcomes."""
    return "\n\n".join([_damaged_files(), _killed_runs()])


def _damaged_files() -> str:
    path = RESULTS / "fuzz.json"
    if not path.exists():
        return "Damaged files: not run yet."
    report = json.loads(path.read_text())
    outcomes, limits = report["outcomes"], report["limits"]
    failed = {name: count for name, count in outcomes.items() if name not in ("refused", "accepted") and count}
    rest = ", ".join(f"{count} {name}" for name, count in failed.items()) or "none"
    lines = [
        f"{where(report['machine'])}; {report['cases']:,} damaged files in {report['minutes']:.0f} minutes, "
        f"{limits['memory_mib']} MiB and {limits['seconds']:.0f} s each: {outcomes['refused']:,} refused in one line "
        f"(the longest has {report['longest_message']} characters), {outcomes['accepted']:,} opened with finite "
        f"numbers; raw exceptions, NaN, crashes, time-outs and memory limits hit: {rest}.",
        "",
        "| damaged | refused | opened | else |",
        "|---|---:|---:|---:|",
    ]
    for kind, counts in report["by_kind"].items():
        refused, opened = counts.get("refused", 0), counts.get("accepted", 0)
        lines.append(f"| {kind} | {refused} | {opened} | {sum(counts.values()) - refused - opened} |")
    return "\n".join(lines)


def _killed_runs() -> str:
    path = RESULTS / "kills.json"
    if not path.exists():
        return "Killed runs: not run yet."
    report = json.loads(path.read_text())
    lines = [
        f"{where(report['machine'])}; {report['kills']} runs killed at random moments.",
        "",
        "| killed | left the old | left the new | neither |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {what} | {counts.get('old', 0)} | {counts.get('new', 0)} | {counts.get('neither', 0)} |"
        for what, counts in report["left"].items()
    ]
    return "\n".join(lines)

"""Targets for a GPU and their evaluation from verify_gpu.py's report: one list, for report and documents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Report = dict[str, Any]
NOT_RUN = "not yet run on a GPU"
PAPER = {"throughput, batch 1": 0.066, "throughput, batch 8": 0.081}
"""Gains reported by the TIDE paper, for an 8B model on an A100."""
PAPER_DEPTH = 0.93
"""Mean share of layers at which gains are compared."""
FLOOR = {1: 0.8, 8: 0.75, 32: 0.65}
"""Wanted share of the bandwidth floor at full depth, by batch size."""
MOST_EFFICIENCY = 1 - 2 * 1024 / (2 * 4096 + 2 * 1024 + 3 * 14336)
"""Share of a skipped layer's bytes that is saved if its keys and values are projected at once, in the 8B model."""

KERNELS = {
    "exit_step": ("pallas_triton", "triton", "mosaic_gpu"),
    "exit_project": ("pallas_triton", "triton"),
    "kv_fill": ("pallas_triton", "triton"),
}
"""Operations, by their names in results up to a comma, and their kernels, which do not depend on each other."""


class Found(NamedTuple):
    """A measured target: the finding in words, and whether it is met; None if there is nothing to meet."""

    text: str
    met: bool | None


class Target(NamedTuple):
    """A target: what it is, what is wanted, and how to find it in a report (None: not measured)."""

    what: str
    wanted: str
    find: Callable[[Report], Found | None]


def targets() -> tuple[Target, ...]:
    """Returns the targets in the order of the table."""
    return (
        *(
            Target(f"{operation} in {kernel}, all shapes", "right, no mask flips",
                   functools.partial(_right, operation, kernel))
            for operation, kernels in KERNELS.items() for kernel in kernels
        ),
        *(
            Target(f"exit step, N = {n}, D = 4096", "≤ 2 x floor + launch, faster than jitted JAX",
                   functools.partial(_exit_step, n))
            for n in (1, 16, 256)
        ),
        *(
            Target(f"decode, full depth, batch {b}", f"≥ {share:.0%} of the bandwidth floor",
                   functools.partial(_full_depth, b))
            for b, share in FLOOR.items()
        ),
        *(
            Target(f"routers on, no exits, batch {b}", "≤ 2 % over full depth",
                   functools.partial(_overhead, b, "routers on, no exits", 0.02))
            for b in (1, 8, 32)
        ),
        Target("the same as one graph, batch 1", "≤ 1 % over full depth",
               functools.partial(_overhead, 1, "routers on, no exits, one graph", 0.01)),
        *(
            Target(f"skip efficiency, batch {b}", f"≥ 90 % of the most, {MOST_EFFICIENCY:.2f}, at every depth",
                   functools.partial(_efficiency, b))
            for b in (1, 8, 32)
        ),
        Target("loop against cond chain, batch 1", "both measured", _chain),
        *(
            Target(f"{what}, mean depth {PAPER_DEPTH:.2f}", f"≥ 80 % of the possible gain, {most():.1%}",
                   functools.partial(_gain, what))
            for what in PAPER
        ),
        Target("a 135M model, float32, greedy", "the same tokens from all implementations", _model),
    )  # fmt: skip


def most(depth: float = PAPER_DEPTH) -> float:
    """The largest possible gain at a mean depth, if layers take all the time and skipped ones take none."""
    return 1 / depth - 1


def evaluate(report: Report) -> list[dict[str, Any]]:
    """Evaluates every target, for the report."""
    return [
        {"what": t.what, "wanted": t.wanted, "found": None, "met": None}
        if (found := t.find(report)) is None
        else {"what": t.what, "wanted": t.wanted, "found": found.text, "met": found.met}
        for t in targets()
    ]


def gains(report: Report) -> list[dict[str, Any]]:
    """Measured gains in throughput, by mean depth."""
    return [
        {"measure": f"throughput, batch {row['batch']}", "depth": row["mean_depth"], "gain": row["gain"],
         "variant": row["variant"]}
        for row in _decode_rows(report)
        if row.get("mean_depth", 1.0) < 1.0 and not row["variant"].startswith("cond") and "graph" not in row["variant"]
    ]  # fmt: skip


def _decode_rows(report: Report) -> Iterator[dict[str, Any]]:
    """Timed rows whose tokens went as deep as they should."""
    rows = (report.get("decode") or {}).get("rows", [])
    return (row for row in rows if "gain" in row and row.get("as_forced", True))


def _decode(report: Report, batch: int, variant: str) -> dict[str, Any] | None:
    return next((r for r in _decode_rows(report) if r["batch"] == batch and r["variant"] == variant), None)


def _right(operation: str, kernel: str, report: Report) -> Found | None:
    own = [row for row in report.get("ops") or [] if row["op"].split(",")[0] == operation]
    own = [row for row in own if row["implementation"] == kernel]
    refused = [row["refused"] for row in own if "refused" in row and "D" not in row]  # for every shape
    if refused:
        return Found(f"can't run: {refused[0]}", None)
    rows = [row for row in own if "right" in row or "error" in row]
    if not rows:
        return None
    wrong = [row for row in rows if not row.get("right", False)]
    flips, worst = sum(r.get("flips", 0) for r in rows), max((r.get("max_error", 0.0) for r in rows), default=0.0)
    text = f"{len(rows) - len(wrong)} of {len(rows)} right, largest error {worst:.1e}, {flips} flips"
    if unfinished := sum("not_run" in row for row in own):
        text += f", {unfinished} not run"
    if failed := sum("error" in row for row in rows):
        text += f", {failed} failed"
    return Found(text, not wrong)


def _exit_step(n: int, report: Report) -> Found | None:
    rows = [r for r in report.get("ops") or [] if r["op"] == "exit_step" and r.get("speedup") is not None]
    rows = [r for r in rows if (r["D"], r["N"]) == (4096, n)]
    if not rows:
        return None
    names = sorted({row["implementation"] for row in rows})
    # One implementation must serve all dtypes: choose the one with the best worst case.
    chosen = min(names, key=lambda name: max(r["us"] / r["floor_us"] for r in rows if r["implementation"] == name))
    own = [row for row in rows if row["implementation"] == chosen]
    text = "; ".join(
        f"{r['dtype']} {r['us']:.1f} µs (floor {r['floor_us']:.1f}, JAX x {r['speedup']:.2f})" for r in own
    )
    met = all(row["within_target"] and row["speedup"] > 1 for row in own)
    launch = report["roof"]["launch_us"]
    return Found(f"{chosen}: {text}; launch {'unknown' if launch is None else f'{launch:.1f} µs'}", met)


def _full_depth(batch: int, report: Report) -> Found | None:
    row = _decode(report, batch, "full depth")
    if row is None:
        return None
    text = f"{row['share_of_floor']:.0%}: {row['tokens_per_second']:.1f} tokens/s, {row['ms_per_step']:.2f} ms"
    return Found(f"{text} (floor {row['floor_ms']:.2f})", row["share_of_floor"] >= FLOOR[batch])


def _overhead(batch: int, variant: str, limit: float, report: Report) -> Found | None:
    row = _decode(report, batch, variant)
    return None if row is None else Found(f"{row['overhead']:+.1%}", row["overhead"] <= limit)


def _efficiency(batch: int, report: Report) -> Found | None:
    rows = [r for r in _decode_rows(report) if r["batch"] == batch and r["variant"].startswith("forced")]
    rows = [r for r in rows if "skip_efficiency" in r and "graph" not in r["variant"]]
    if not rows:
        return None
    text = ", ".join(f"{row['skip_efficiency']:.2f} ({row['variant'].split()[1]} layers)" for row in rows)
    return Found(text, all(row["skip_efficiency"] >= 0.9 * MOST_EFFICIENCY for row in rows))


def _chain(report: Report) -> Found | None:
    own = _decode(report, 1, "routers on, no exits")
    chain = _decode(report, 1, "cond chain, no exits")
    if own is None or chain is None:
        return None
    pairs = [("no exits", own, chain)]
    for row in _decode_rows(report):
        name = row["variant"].removeprefix("cond chain, ")
        if row["batch"] == 1 and name.startswith("forced") and name != row["variant"]:
            same = _decode(report, 1, name)
            pairs += [] if same is None else [(name, same, row)]
    text = "; ".join(f"{name}: loop {a['ms_per_step']:.2f} ms, chain {b['ms_per_step']:.2f}" for name, a, b in pairs)
    return Found(text, None)


def _gain(what: str, report: Report) -> Found | None:
    """The best mix at the target depth, and the mean depth that it took to gain what the paper reports."""
    rows = [gain for gain in gains(report) if gain["measure"].startswith(what)]
    there = [gain for gain in rows if PAPER_DEPTH - 1e-3 <= gain["depth"] <= 0.945]
    if not there:
        return None
    best = max(there, key=lambda g: g["gain"])
    share = best["gain"] / most(best["depth"])
    text = f"{best['gain']:+.1%}, {share:.0%} of what is possible ({best['variant']})"
    reached = max((g["depth"] for g in rows if g["gain"] >= PAPER[what]), default=None)
    where = "not reached" if reached is None else f"reached at mean depth {reached:.2f}"
    return Found(f"{text}; the paper's {PAPER[what]:.1%}: {where}", share >= 0.8)


def _model(report: Report) -> Found | None:
    rows = [row for row in (report.get("smollm2") or {}).get("rows", []) if "same_tokens" in row]
    rows = [row for row in rows if row["implementation"] != "reference"]
    if not rows:
        return None
    text = "; ".join(
        f"{r['implementation']}, {r['kv_strategy']}: {'same' if r['same_tokens'] else 'DIFFERENT'}, "
        f"depth {r['mean_depth']:.2f}"
        for r in rows
    )
    return Found(text, all(row["same_tokens"] for row in rows))

"""Runs every kernel in a process of its own, with a time limit.

On a GPU, a kernel that waits for itself never returns, and an illegal access makes every later call of its process
fail. Here either costs the rows of one kernel. Kernels that wait for each other's threads by hand come last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scripts.gpu.kernel_hash import ROOT
from scripts.gpu.op_table import Op
from scripts.gpu.ops import OUT_OF_TIME, Row
from scripts.gpu.timing import Budget

_ORDER = ("pallas_interpret", "pallas_triton", "triton", "mosaic_gpu")


def run_isolated(
    ops: list[Op],
    args: argparse.Namespace,
    budget: Budget,
    progress: Callable[[str], None],
    keep: Callable[[list[Row]], None],
) -> list[Row]:
    """`scripts.gpu.ops.run_ops` with a process for each kernel; `keep` gets the rows so far, after each of them."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for operation, kernel in kernels(ops, tiny=args.tiny):
            entries = [op.name for op in ops if op.choices.operation == operation]
            if budget.over("ops"):
                rows += [{"op": name, "implementation": kernel, "not_run": OUT_OF_TIME} for name in entries]
            else:
                progress(f"{operation} in {kernel}")
                part = Path(folder) / f"{operation}_{kernel}.json"
                found, failure = run_part(command(args, entries, kernel, part), part, args.limit)
                rows = merge(rows, found)
                if failure is not None:
                    rows += [{"op": name, "implementation": kernel, "error": failure} for name in entries]
            keep(rows)
    return rows


def kernels(ops: list[Op], *, tiny: bool) -> Iterator[tuple[str, str]]:
    """Operations and their kernels, in the order to run them; the interpreted ones if `tiny`."""
    choices = {op.choices.operation: op.choices for op in ops}
    for kernel in _ORDER:
        for operation, own in choices.items():
            if kernel in own.names and (kernel == "pallas_interpret") == tiny:
                yield operation, kernel


def command(args: argparse.Namespace, entries: list[str], kernel: str, part: Path) -> list[str]:
    """The call that measures one kernel, and plain JAX beside it."""
    call = [sys.executable, str(ROOT / "scripts" / "verify_gpu.py"), "--only", "ops", "--ops", *entries]
    call += ["--kernel", kernel, "--minutes", str(args.limit / 60), "--out", str(part)]
    return [*call, "--tiny"] if args.tiny else call


def run_part(call: list[str], part: Path, limit: float) -> tuple[list[Row], str | None]:
    """The rows that a call wrote, and why it did not get to its end."""
    failure = None
    try:
        done = subprocess.run(call, timeout=limit, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            failure = f"ended with status {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1][:200]}"
    except subprocess.TimeoutExpired:
        failure = f"no end after {limit:g} s: stopped"
    return _rows(part), failure


def merge(rows: list[Row], found: list[Row]) -> list[Row]:
    """Adds rows; of plain JAX, which every part measures, the first of each shape stays."""
    known = {_case(row) for row in rows if row["implementation"] == "reference"}
    return rows + [row for row in found if row["implementation"] != "reference" or _case(row) not in known]


def _case(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("op", "dtype", "D", "N"))


def _rows(part: Path) -> list[Row]:
    try:
        return json.loads(part.read_text())["ops"] or []
    except (OSError, ValueError, KeyError):
        return []

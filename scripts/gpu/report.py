"""Runs verify_gpu.py's parts in order and fills the report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.selection import OUTSIDE_GRAPHS
from scripts.gpu import targets as gpu_targets
from scripts.gpu.decode import DecodePlan, run_decode
from scripts.gpu.isolated import run_isolated
from scripts.gpu.kernel_hash import ROOT, kernel_hash
from scripts.gpu.model import Steered, config_8b, config_tiny, steered
from scripts.gpu.op_table import OPS
from scripts.gpu.ops import Matrix, Roof, run_ops
from scripts.gpu.prefill import PrefillPlan, run_prefill
from scripts.gpu.smoke import NAMES as SMOKE
from scripts.gpu.smoke import compare_with_processor, passed, verdict
from scripts.gpu.smollm2 import run_model
from scripts.gpu.timing import DATA_SHEET, Budget, bandwidth, launch_seconds
from scripts.reporting import machine, reason, save

__all__ = ["Refused", "passed", "prove", "proven", "read", "run", "verdict"]
Progress = Callable[[str], None]
Report = dict[str, Any]
PROVEN = ROOT / "pallas_kernels" / "proven.json"


class Refused(Exception):
    """Nothing can run, for this reason."""


def run(args: argparse.Namespace, progress: Progress) -> Report:
    """Runs the requested parts and writes the report after each batch of measurements.

    Raises:
      Refused: there is no GPU, no such operation, or the file has another GPU's results.
    """
    platform = jax.default_backend()
    if platform == "cpu" and not args.tiny:
        raise Refused("no GPU here; --tiny runs tiny shapes on a processor, to test this script")
    if unknown := sorted(set(args.ops or ()) - {op.name for op in OPS}):
        raise Refused(f"no operation {', '.join(unknown)}; there are {', '.join(op.name for op in OPS)}")
    budget = Budget(args.minutes, args.only)
    report = _begin(args, platform)
    roof = _roof(args.tiny, report, progress)
    save(args.out, report)
    if args.smoke:
        report["smoke"] = compare_with_processor()
        _keep(args, report)
        _smoke(args, report, roof, budget, progress)
        return report
    # Plain JAX first: kernels may end the run.
    if {"decode", "prefill"} & set(args.only):
        _model_parts(args, report, roof, budget, progress)
    if "ops" in args.only:
        ops = [op for op in OPS if args.ops is None or op.name in args.ops]
        matrix = Matrix.tiny() if args.tiny else Matrix()
        kept = [row for row in report["ops"] or [] if row["op"] not in {op.name for op in ops}]

        def keep(rows: list[Report]) -> None:
            _keep(args, report, ops=kept + rows)

        if args.kernel is None and not args.together:
            run_isolated(ops, args, budget, progress, keep)
        else:
            run_ops(ops, matrix, roof, budget, progress, keep, args.kernel)
    if "smollm2" in args.only:
        count = 8 if args.tiny else 48
        report["smollm2"] = run_model(args.model, args.routers, count, budget, progress, tiny=args.tiny)
        progress(report["smollm2"].get("skipped") or report["smollm2"].get("error") or "real model done")
    report["seconds"] = budget.spent
    report["complete"] = True
    _keep(args, report)
    return report


def _begin(args: argparse.Namespace, platform: str) -> Report:
    """Starts a report; keeps the parts of an earlier report that are not run again and were made the same way."""
    report: Report = {
        "complete": False,
        "platform": platform,
        "tiny": args.tiny,
        "kernels_sha256": kernel_hash(),
        "machine": machine(),
        "minutes": args.minutes,
        "roof": None,
        "ops": None,
        "decode": None,
        "prefill": None,
        "smollm2": None,
        "smoke": None,
        "gains": [],
        "targets": [],
    }
    before = _earlier(args.out)
    same = ("platform", "tiny", "kernels_sha256")
    if before is None or any(before.get(key) != report[key] for key in same):
        return report
    if before["machine"]["device"] != report["machine"]["device"]:
        raise Refused(
            f"{args.out} has results of a {before['machine']['device']}, and this is a {report['machine']['device']}: "
            "name another file with --out"
        )
    again = {"smoke"} if args.smoke else {part for part in args.only if part != "ops" or args.ops is None}
    return report | {
        key: before.get(key) for key in ("ops", "decode", "prefill", "smollm2", "smoke") if key not in again
    }


def _earlier(path: Path | None) -> Report | None:
    if path is None:
        return None
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "kernels_sha256" in found else None


def _roof(tiny: bool, report: Report, progress: Progress) -> Roof:
    """Measures the device's limits."""
    size, repeats = (1 << 20, 2) if tiny else (1 << 31, 7)
    roof = Roof(bandwidth(size, repeats), launch_seconds(repeats))
    sheet, launch = DATA_SHEET.get(report["machine"]["device"]), roof.launch
    report["roof"] = {
        "gb_s": roof.bandwidth / 1e9,
        "data_sheet_gb_s": sheet,
        "launch_us": None if launch is None else 1e6 * launch,
    }
    promised = "" if sheet is None else f" ({sheet} on the data sheet)"
    launched = "unknown" if launch is None else f"{1e6 * launch:.1f} µs"
    progress(f"{report['machine']['device']}: {roof.bandwidth / 1e9:.0f} GB/s{promised}, launch {launched}")
    return roof


def _keep(args: argparse.Namespace, report: Report, **parts: Any) -> None:
    """Writes the report with these parts as they are now: whatever ends the process later loses nothing of them."""
    report |= parts
    report["gains"], report["targets"] = gpu_targets.gains(report), gpu_targets.evaluate(report)
    save(args.out, report)


def _model_parts(args: argparse.Namespace, report: Report, roof: Roof, budget: Budget, progress: Progress) -> None:
    """Runs decoding and prompts of a random model."""
    implementation = args.implementation or _usable(report)
    progress(f"making the model; its kernels: {implementation}")
    try:
        made = _steered(args.tiny)
    except Exception as error:
        failed = {"error": reason(error)}
        report |= {
            part: failed if part == "decode" else [failed] for part in ("decode", "prefill") if part in args.only
        }
        return
    if "decode" in args.only:
        plan = DecodePlan(implementation=implementation, graphs=not args.no_graphs)
        if args.tiny:
            plan = plan._replace(batches=(1, 2), context=8, steps=8, rounds=1)
        facts = {"model": _facts(made), "plan": plan._asdict()}
        run_decode(made, plan, roof, budget, progress, lambda rows: _keep(args, report, decode=facts | {"rows": rows}))
    if "prefill" in args.only:
        plan = PrefillPlan()
        if args.tiny:
            plan = plan._replace(shapes=((1, 16),), rounds=1)
        run_prefill(made, plan, budget, progress, lambda rows: _keep(args, report, prefill=rows))


def _smoke(args: argparse.Namespace, report: Report, roof: Roof, budget: Budget, progress: Progress) -> None:
    """Times decoding at batch 1, beside the rows of an earlier, whole run."""
    plan = DecodePlan(batches=(1,), rounds=1, names=SMOKE)
    if args.tiny:
        plan = plan._replace(context=8, steps=8)
    try:
        rows = run_decode(_steered(args.tiny), plan, roof, budget, progress)
    except Exception as error:
        rows = [{"batch": 1, "variant": "full depth", "error": reason(error)}]
    _keep(args, report, smoke=report["smoke"] | {"rows": rows})


def _steered(tiny: bool) -> Steered:
    if tiny:
        return steered(config_tiny(), interval=1, bottleneck=16, dtype=jnp.float32)
    return steered(config_8b(), interval=4, bottleneck=128, dtype=jnp.bfloat16)


def _facts(made: Steered) -> Report:
    config = made.model.config
    return {
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "dtype": str(made.model.dtype),
        "exit_points": list(made.exits.routers.exit_points),
        "bytes_read": made.bytes_read(),
    }


def _usable(report: Report) -> str:
    """The first kernel that ran, was always right, and can be in a CUDA graph; plain JAX if there is none."""
    rows = [row for row in report["ops"] or [] if "refused" not in row and "not_run" not in row]
    names = list(dict.fromkeys(name for op in OPS for name in op.choices.on_gpu))
    for name in (name for name in names if name not in OUTSIDE_GRAPHS):
        own = [row.get("right", False) for row in rows if row["implementation"] == name]
        if own and all(own):
            return name
    return "reference"


def proven(report: Report) -> dict[str, list[str]]:
    """Lists the proven kernels by operation.

    A kernel is proven if it was right on every shape it takes, in every entry that `OPS` has for its operation, and in
    the median not slower than plain JAX. Plain JAX itself must have been right wherever it was compared.
    """
    found: dict[str, list[str]] = {}
    for op in OPS:
        entries = {other.name for other in OPS if other.choices.operation == op.choices.operation}
        rows = [row for row in report["ops"] or [] if row["op"] in entries]
        names = [name for name in op.choices.on_gpu if _holds(rows, name, entries)]
        if names:
            found[op.choices.operation] = names
    return found


def _holds(rows: list[Report], name: str, entries: set[str]) -> bool:
    own = [row for row in rows if row["implementation"] == name and "refused" not in row]
    plain = [row["right"] for row in rows if row["implementation"] == "reference" and "right" in row]
    speeds = sorted(row["speedup"] for row in own if row.get("speedup") is not None)
    right = bool(plain) and all(plain) and bool(own) and all(row.get("right", False) for row in own)
    return right and {row["op"] for row in own} == entries and speeds[len(speeds) // 2] >= 1


def read(path: Path) -> Report:
    """An earlier report. Raises Refused if the file has none."""
    found = _earlier(path)
    if found is None:
        raise Refused(f"{path} is no report of verify_gpu.py")
    return found


def prove(report: Report, progress: Progress) -> None:
    """Records which kernels a GPU found right, for exactly these sources; needs no GPU.

    Raises:
      Refused: the report is not a GPU's, not one of these sources, or did not compare plain JAX with a processor's.
    """
    if report["platform"] != "gpu":
        raise Refused(f"--prove takes a report made on a GPU, not on a {report['platform']}")
    if report["kernels_sha256"] != kernel_hash():
        raise Refused("this report was made with other kernels: run verify_gpu.py with these")
    if not any("right" in row for row in report["ops"] or [] if row["implementation"] == "reference"):
        raise Refused(
            "--prove compares with plain JAX on the processor: run all operations, with the cpu backend there"
        )
    operations = proven(report)
    fact = {
        "kernels_sha256": report["kernels_sha256"],
        "device": report["machine"]["device"],
        "date": report["machine"]["date"],
        "operations": operations,
    }
    save(PROVEN, fact)
    progress(f"pallas_kernels/{PROVEN.name}: {operations or 'no kernel was right everywhere'}")

"""Runs everything that needs a GPU, and reports the results: ``python scripts/verify_gpu.py --out gpu.json``.

The parts run in this order: memory bandwidth and the cost of a launch; the decode step of a random model of Llama 3
8B's shape, against the bandwidth floor, at forced depths, with routers on, and as a chain of conditionals; prompts;
every operation of pallas_kernels in every implementation, dtype and size, for errors, mask flips and time; a
model end to end, for equal greedy tokens: the one that --model names, or random weights.

Each kernel runs in a process of its own with a time limit, the one that is synchronised by hand last: a kernel that
hangs or writes where it must not costs its own rows. A case that fails becomes a row with its error, and the others
continue. After --minutes, the remaining cases are noted as not run. The JSON is written after every batch of
measurements; --only with an existing --out runs some parts again and keeps the others. --tiny runs everything with
tiny shapes on a processor. --prove gpu.json runs nothing: it records the kernels that a report shows to be right in
pallas_kernels/proven.json, and from then on ``implementation=None`` chooses among them on a GPU. --smoke takes about a
minute: it compares decoding with a processor's and times it at batch 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # import the sources that the hash covers, even if another version is installed

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the GPU
SECTIONS = ("decode", "prefill", "ops", "smollm2")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        from scripts.gpu import report as gpu_report
    except ImportError as error:
        print(f"verify_gpu needs a package that is not here: {error}", file=sys.stderr)
        return 2
    try:
        if args.prove is not None:
            gpu_report.prove(gpu_report.read(args.prove), progress)
            return 0
        report = gpu_report.run(args, progress)
    except gpu_report.Refused as error:
        print(error, file=sys.stderr)
        return 2
    if args.smoke:
        print(gpu_report.verdict(report["smoke"]))
        return int(not gpu_report.passed(report["smoke"]))
    for target in report["targets"]:
        met = {None: "", True: "met", False: "NOT MET"}[target["met"]]
        found = target["found"] or "not measured"
        print(f"{met:8s} {target['what']}: {found} (wanted: {target['wanted']})", file=sys.stderr)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="F", help="JSON file to write")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all of it (9)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="parts to run")
    parser.add_argument(
        "--kernel", metavar="NAME", help="the only implementation to run, beside plain JAX, in this process"
    )
    parser.add_argument("--together", action="store_true", help="all kernels in this process, without time limits")
    parser.add_argument("--limit", type=float, default=90.0, metavar="S", help="seconds for each kernel's process (90)")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="operations to run, such as exit_step")
    parser.add_argument("--implementation", help="of kernels in the model (the first that was right, else plain JAX)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a converted SmolLM2")
    parser.add_argument("--routers", type=Path, metavar="FILE", help="its routers (random ones)")
    parser.add_argument("--no-graphs", action="store_true", help="leave out decode loops as one CUDA graph")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, kernels interpreted: a test of this script")
    parser.add_argument("--smoke", action="store_true", help="only whether decoding is right and how fast at batch 1")
    parser.add_argument("--prove", type=Path, metavar="F", help="note which kernels were right in this report")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error("--minutes must be more than 0")
    if args.prove is None and args.out is None and not args.smoke:
        parser.error("name the file to write with --out, or a report with --prove")
    if args.out is not None and not args.out.resolve().parent.is_dir():
        parser.error(f"no folder {args.out.parent} to write {args.out.name} to")
    if args.smoke:
        args.only = ["decode"]
    args.only = [section for section in SECTIONS if section in args.only]
    return args


_BEGAN = time.monotonic()


def progress(text: str) -> None:
    """Reports the current work on standard error."""
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())

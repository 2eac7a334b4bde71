"""Opens thousands of damaged checkpoints and counts the outcomes.

    python -m scripts.reliability.fuzz_files --count 5000 --out scripts/results/fuzz.json
    python -m scripts.reliability.fuzz_files --replay 1234 1240

Every case follows from its seed: a tiny checkpoint (Hugging Face, GGUF, converted, quantised, tokenizer, routers,
LoRA), damage to its bytes, JSON, headers, weights or templates, and a way to open it. Worker processes open the cases
under limits of address space and time. A case that does not open must be refused by a `TideError` of one line.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scripts.reliability import fuzz_corpus
from scripts.reporting import machine, save

FAILURES = ("refused at length", "raw", "nan", "memory", "crash", "time-out")
OUTCOMES = ("refused", "accepted", *FAILURES)
WORKER = ("-m", "scripts.reliability.fuzz_worker")
_FRESH_AFTER = 400  # cases per process: its modules and programs take more and more memory
_START_SECONDS = 300.0


class Worker:
    """A `fuzz_worker` process that restarts after it died or was stopped."""

    def __init__(self, corpus: Path, work: Path, memory: int, seconds: float) -> None:
        self._arguments = [str(corpus), str(work), "--memory", str(memory)]
        self._seconds, self._process, self._cases, self._lines = seconds, None, 0, b""

    def run(self, seed: int) -> dict[str, Any]:
        """Runs a case and returns its outcome, also if the process dies or takes too long."""
        if self._process is None or self._cases >= _FRESH_AFTER:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._cases += 1
        try:
            self._process.stdin.write(f"{seed}\n".encode())
            self._process.stdin.flush()
        except OSError:
            return self._died(seed)
        line = self._line(self._seconds)
        if line is None:
            self.stop()
            return {"seed": seed, "outcome": "time-out", "message": f"no answer in {self._seconds:g} s"}
        return json.loads(line) if line else self._died(seed)

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            os.close(self._answers)
            self._process = None

    def _start(self) -> None:
        self.stop()
        self._answers, theirs = os.pipe()
        command = [sys.executable, *WORKER, *self._arguments]
        self._process = subprocess.Popen(
            [*command, "--answers", str(theirs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs],
        )
        os.close(theirs)
        self._cases, self._lines = 0, b""
        if not self._line(_START_SECONDS):
            raise SystemExit(f"a worker did not start; run it by hand: {' '.join(command)} --answers 1")

    def _line(self, seconds: float) -> bytes | None:
        """The next line; empty if the process has ended, None if it took too long."""
        end = time.monotonic() + seconds
        while b"\n" not in self._lines:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            if not (part := os.read(self._answers, 65536)):
                return b""
            self._lines += part
        line, _, self._lines = self._lines.partition(b"\n")
        return line

    def _died(self, seed: int) -> dict[str, Any]:
        assert self._process is not None
        code = self._process.wait()
        self.stop()
        return {"seed": seed, "outcome": "crash", "message": f"the process ended with {code}"}


def run_all(seeds: Iterable[int], workers: list[Worker]) -> list[dict[str, Any]]:
    """Returns the results of all seeds, in their order."""
    from tqdm import tqdm

    seeds = list(seeds)
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for seed in seeds:
        waiting.put(seed)
    found: dict[int, dict[str, Any]] = {}
    bar = tqdm(total=len(seeds), disable=None, unit="file")

    def work(worker: Worker) -> None:
        while True:
            try:
                seed = waiting.get_nowait()
            except queue.Empty:
                return worker.stop()
            found[seed] = worker.run(seed)
            bar.update()
            counts = collections.Counter(result["outcome"] for result in list(found.values()))
            bar.set_postfix({name: counts[name] for name in FAILURES if counts[name]}, refresh=False)

    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:  # report the finished cases
        while not waiting.empty():
            waiting.get_nowait()
        for thread in threads:
            thread.join()
    bar.close()
    return [found[seed] for seed in seeds if seed in found]


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by outcome and by kind, and every failure with its seed."""
    by_kind: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for result in results:
        by_kind[result.get("kind", "unknown")][result["outcome"]] += 1
    lengths = [len(result["message"]) for result in results if result["outcome"] == "refused"]
    return {
        "cases": len(results),
        "outcomes": {name: sum(r["outcome"] == name for r in results) for name in OUTCOMES},
        "longest_message": max(lengths, default=0),
        "slowest_seconds": max((r.get("seconds", 0.0) for r in results), default=0.0),
        "by_kind": {kind: dict(counts) for kind, counts in sorted(by_kind.items())},
        "failures": [result for result in results if result["outcome"] in FAILURES],
    }


def main() -> int:
    """Runs the campaign; exit code 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000, help="cases (default 5000)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--replay", type=int, nargs="+", metavar="SEED", help="run these cases alone, and tell all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory", type=int, default=2048, help="MiB of address space beyond a started process")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of a case")
    parser.add_argument(
        "--corpus", type=Path, help="where the checkpoints lie, made if missing (default: a new folder)"
    )
    parser.add_argument("--out", type=Path, help="JSON report")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tide-fuzz-") as scratch:
        corpus = args.corpus or Path(scratch) / "corpus"
        if not (corpus / "base").is_dir():
            fuzz_corpus.build(corpus)
        works = [Path(scratch) / f"worker-{number}" for number in range(args.workers)]
        workers = [Worker(corpus, work, args.memory, args.seconds) for work in works]
        start = time.perf_counter()
        results = run_all(args.replay or range(args.first_seed, args.first_seed + args.count), workers)
    limits = {"memory_mib": args.memory, "seconds": args.seconds}
    report = {
        "first_seed": args.first_seed,
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "limits": limits,
        "machine": machine(),
        **summarise(results),
    }
    save(args.out, report)
    shown = results if args.replay else report["failures"][:20]
    for result in shown:
        print(json.dumps(result))
    print(json.dumps(report["outcomes"]))
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())

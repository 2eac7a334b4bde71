"""Measures the peak memory of one variant of scripts.bench.peers, in a process that loads nothing else.

  python -m scripts.bench.peer_memory '{"variant": "eager", "transformers": "FOLDER", "ids": [1, 2], ...}'

Prints the result as JSON; see `Job` for the fields.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from scripts.bench.peer_measures import OURS, Variant

_LIMIT = 1200  # seconds after which the process is given up


class Job(NamedTuple):
    """The generation to measure.

    Attributes:
      variant: its name.
      model: the model for tide_jax.
      transformers: folder of a transformers checkpoint; None without peers.
      routers, dials: as in `peer_tide.Settings`.
      ids, count: prompt, and number of new tokens.
      early_exit, lookup: as in `peer_transformers.peer_variant`.
    """

    variant: str
    model: str
    transformers: str | None
    routers: str | None
    dials: dict[str, Any]
    ids: list[int]
    count: int
    early_exit: int
    lookup: int


def measure(job: Job) -> dict[str, float | None]:
    """Measures peak resident MiB (see `peaks`) in a new process. Raises RuntimeError if it fails."""
    command = [sys.executable, "-m", "scripts.bench.peer_memory", json.dumps(job._asdict())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer within {_LIMIT} seconds") from None
    if done.returncode or not done.stdout.strip():
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def load(job: Job) -> Variant:
    """Loads the variant, and nothing else."""
    if job.variant not in OURS:
        from scripts.bench.peer_transformers import load_peer, peer_variant

        peer, room = load_peer(Path(str(job.transformers))), len(job.ids) + job.count
        return peer_variant(peer, job.variant, longest=room, early_exit=job.early_exit, lookup=job.lookup)
    import tide_jax
    from scripts.bench.peer_tide import Settings, make_engine, tide_variant

    settings = Settings(None if job.routers is None or job.variant == "full" else Path(job.routers), job.dials)
    return tide_variant(make_engine(tide_jax.load(job.model, "float32"), settings)[0], job.variant)


def peaks(run: Callable[[], Any]) -> dict[str, float | None]:
    """Peak resident MiB since this process began, and during a second run; None if unknown."""
    run()
    whole, again = _peak(), _forget_peak()
    run()
    return {"peak": max(whole, _peak()), "generating": _peak() if again else None}


def _peak() -> float:
    """Prefers Linux's value for this process, because `getrusage` includes the parent process's peak."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 1024 / (1024 if sys.platform == "darwin" else 1)


def _forget_peak() -> bool:
    """Resets the peak; returns False if the system can't."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    job = Job(**json.loads(sys.argv[1]))
    variant = load(job)
    print(json.dumps(peaks(lambda: variant(job.ids, job.count))))

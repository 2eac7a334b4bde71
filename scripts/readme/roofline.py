"""Makes the roofline page: what a decode step of an 8B model should take on accelerators, predicted or measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from scripts.gpu.model import eight_billion_config
from scripts.gpu.targets import MOST_EFFICIENCY, NOT_RUN
from tide_jax.cli.inspection import bytes_read
from tide_jax.model.attention.reading import LARGE_CACHE

RESULTS = Path(__file__).resolve().parents[1] / "results"
FILLED, SLOTS = 1024, 4096
"""Tokens of a row so far, and slots of its cache."""
_SHARE = 0.9
"""Share of the data sheet's bandwidth that large products are assumed to reach."""
_PRODUCTS = 5
"""Weight products of a layer; every other kernel of a layer counts as small."""
_PROJECTION = 5
"""Kernels that project the keys and values of a skipped layer, one of them a product (read off the same program)."""
_SMALL_KERNEL = 1.8e-6
"""Seconds assumed for a small kernel in a CUDA graph, its dependency on the one before included."""


class Machine(NamedTuple):
    """An accelerator.

    Attributes:
      name: as in its vendor's data sheet.
      bandwidth: bytes per second of its memory, from the data sheet.
      memory: bytes of it.
      gpu: whether it launches kernels one by one and reads all slots of a cache.
    """

    name: str
    bandwidth: float
    memory: float
    gpu: bool


MACHINES = (
    Machine("H100 SXM", 3.35e12, 80e9, gpu=True),
    Machine("TPU v5e", 0.819e12, 16e9, gpu=False),
    Machine("TPU v6e", 1.64e12, 32e9, gpu=False),
)


class Step(NamedTuple):
    """A kind of decode step.

    Attributes:
      name: name in the table.
      rows: batch size.
      weights: how `bytes_read` calls the weights.
      depth: share of layers that run.
      projects: share of a skipped layer's keys-and-values weights that the step reads; below 1 only on a GPU.
      measured: the variant of verify_gpu.py that measures it, or None.
    """

    name: str
    rows: int = 1
    weights: str = "bfloat16"
    depth: float = 1.0
    projects: float = 1.0
    measured: str | None = None


STEPS = (
    Step("full depth, 1 row", measured="full depth"),
    Step("full depth, 8 rows", rows=8, measured="full depth"),
    Step("full depth, 32 rows", rows=32, measured="full depth"),
    Step("full depth, 1 row, 8-bit weights", weights="bfloat16 with int8 weights"),
    Step("half depth, 1 row, rows projected at once", depth=0.5),
    Step("half depth, 1 row, projected for 8 tokens together", depth=0.5, projects=1 / 8),
)


class Prediction(NamedTuple):
    """Bytes and seconds of a step.

    Attributes:
      weights: bytes of weights that it reads.
      cache: bytes of keys and values of the tokens so far.
      read: bytes of keys and values that the program reads.
      kernels: kernels that it launches; 0 on a TPU.
      floor, seconds: least time at the data sheet's bandwidth, and predicted time.
    """

    weights: float
    cache: float
    read: float
    kernels: int
    floor: float
    seconds: float


def roofline_table() -> str:
    """A table for each accelerator."""
    kernels = _kernels()
    lines = [
        f"Llama 3.1 8B's shape, bfloat16; {FILLED} tokens so far, caches of {SLOTS} slots. Floor: weights and the keys "
        "and values of the tokens so far, at the data sheet's bandwidth. Predicted: what the compiled program reads at "
        f"{_SHARE:.0%} of that bandwidth, and on a GPU {_SMALL_KERNEL * 1e6:.1f} µs for each kernel that is no weight "
        f"product ({kernels:.0f} kernels a layer, counted in the program compiled for an H100). Rows whose weights and "
        "caches do not fit into a machine's memory are left out.",
    ]
    for machine in MACHINES:
        missing = NOT_RUN if machine.gpu else "not yet run on a TPU"
        lines += [
            "",
            f"| {machine.name}, {machine.bandwidth / 1e12:.2f} TB/s | weights, GB | cache, GB (read) | kernels "
            f"| floor, ms | predicted, ms | predicted share of the floor | measured{_context(machine)} |",
            "|---|---:|---:|---:|---:|---:|---:|---|",
        ]
        for step in STEPS:
            if not fits(step, machine) or (step.projects != 1.0 and not machine.gpu):
                continue
            p = predict(step, machine, kernels)
            lines.append(
                f"| {step.name} | {p.weights / 1e9:.2f} | {p.cache / 1e9:.2f} ({p.read / 1e9:.2f}) "
                f"| {p.kernels or ''} | {p.floor * 1e3:.2f} | {p.seconds * 1e3:.2f} | {p.floor / p.seconds:.0%} "
                f"| {_measured(step, machine) or missing} |"
            )
    return "\n".join(lines)


def fits(step: Step, machine: Machine) -> bool:
    """Whether weights and caches fit into the machine's memory."""
    weights = bytes_read(eight_billion_config())[step.weights]
    return weights + step.rows * SLOTS * _bytes_of_a_token() <= machine.memory


def predict(step: Step, machine: Machine, kernels: float) -> Prediction:
    """Predicts a step; `kernels`: kernels of a layer."""
    config = eight_billion_config()
    whole = bytes_read(config)[step.weights]
    head = config.vocab_size * config.hidden_size * (1 if "int8" in step.weights else 2)
    layer, skipped = (whole - head) / config.num_layers, config.num_layers * (1 - step.depth)
    projection = (1 - MOST_EFFICIENCY) * layer
    weights = head + layer * config.num_layers * step.depth + skipped * projection * step.projects
    # Keys and values of the layers that run: of the tokens so far, and of the slots that the program reads.
    slot = _bytes_of_a_token() * step.depth * step.rows
    keys = step.rows * config.num_kv_heads * config.head_dim * 2 * SLOTS
    share = FILLED / SLOTS if not machine.gpu and keys >= LARGE_CACHE else 1.0
    cache, read = slot * FILLED, slot * SLOTS * share
    launched = round(kernels * config.num_layers * step.depth + _PROJECTION * skipped * step.projects)
    small = launched - _PRODUCTS * config.num_layers * step.depth - skipped * step.projects
    seconds = (weights + read) / (machine.bandwidth * _SHARE) + (small * _SMALL_KERNEL if machine.gpu else 0.0)
    floor = (weights + cache) / machine.bandwidth
    return Prediction(weights, cache, read, launched if machine.gpu else 0, floor, seconds)


def _bytes_of_a_token() -> int:
    """Bytes of a token's keys and values in all layers, bfloat16."""
    config = eight_billion_config()
    return 2 * config.num_kv_heads * config.head_dim * 2 * config.num_layers


def _kernels() -> float:
    """Kernels of a layer of a decode step, counted by gpu_aot.py."""
    report = json.loads((RESULTS / "gpu_aot.json").read_text())
    (case,) = (case for case in report["cases"] if case["name"] == "full depth")
    return case["kernels_a_layer"]


def _measured(step: Step, machine: Machine) -> str | None:
    """Milliseconds that verify_gpu.py measured for the step, with the GPU's name."""
    report = _report()
    if not machine.gpu or step.measured is None or report is None:
        return None
    for row in (report.get("decode") or {}).get("rows", []):
        if row["batch"] == step.rows and row["variant"] == step.measured and "ms_per_step" in row:
            return f"{row['ms_per_step']:.2f} ms, {report['machine']['device']}"
    return None


def _context(machine: Machine) -> str:
    """Says how many tokens the measured steps had before them."""
    report = _report()
    return f", {report['decode']['plan']['context']} tokens so far" if machine.gpu and report is not None else ""


def _report() -> dict[str, Any] | None:
    """The report of a GPU at full size, with decode steps; None without one."""
    path = RESULTS / "gpu.json"
    report = json.loads(path.read_text()) if path.exists() else None
    full = report is not None and report["platform"] == "gpu" and not report["tiny"]
    return report if full and "rows" in (report["decode"] or {}) else None

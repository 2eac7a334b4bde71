"""Compiles programs of an 8B model for absent TPUs, v5e and v6e, and checks XLA's programs.

  make tpu-aot

installs XLA's compiler for TPUs (one wheel, no TPU) into .tpu_aot and runs this script with it. Weights are only
shapes. A program must not copy weights or the cache, must not convert integer weights to floats, must not ask for a
kernel of a GPU, and may use little extra memory. On several chips, it exchanges at most twice a layer, and a few times
besides. The script prints its findings, writes them with --out, and exits with 1 if a check fails.
"""

from __future__ import annotations

import sys

import jax
import numpy as np
from jax.experimental import topologies

from scripts.gpu import aot
from scripts.gpu.aot import Step, Target
from scripts.gpu.aot_programs import Case
from tide_jax.functional import DecoderConfig

SPARE = {"v5": 2 * 2**20, "v6": 4 * 2**20}  # XLA's use per layer on a TPU, in smaller arrays
SPARE_OF_PASSES = 6 * 2**20  # the same over several tokens
_SINGLE = "2x2"  # the smallest topology that the compiler knows; one of its chips is compiled for
_SUMS = 2  # exchanges of a layer: after attention, and after the feed-forward block
_MORE_EXCHANGES = 12  # the embedding, the output head and the choice of a token

CASES = (
    Case("full depth", implementation=None),
    Case("propagate", "propagate", implementation=None),
    Case("recompute", "recompute", implementation=None),
    Case("generate_tokens, full depth", program="generate_tokens"),
    Case("generate_tokens, propagate", "propagate", implementation=None, program="generate_tokens"),
    Case("generate_tokens, 8-bit weights", weights="int8", program="generate_tokens"),
    Case("prompt, full depth", program="prefill", copies=True),
    Case("prompt, 8-bit weights", weights="int8", program="prefill"),
    Case("lossless pass", program="advance_lossless"),
    Case("recurrent layers, full depth", implementation=None, kind="states", copies=True),
    Case("recurrent layers, recompute", "recompute", implementation=None, kind="states", copies=True),
    Case("recurrent layers, prompt", kind="states", program="prefill", copies=True),
    Case("lossless pass, 8-bit weights", weights="int8", program="advance_lossless"),
    *aot.INT8,
)
MESHES = (
    Case("full depth, 2 rows, mesh 2x2", rows=2, mesh=(2, 2)),
    Case("propagate, 2 rows, mesh 2x2", "propagate", implementation=None, rows=2, mesh=(2, 2)),
    Case("full depth, 2 rows, mesh 2x4", rows=2, mesh=(2, 4)),
    Case("propagate, 2 rows, 8-bit weights, mesh 2x4", "propagate", rows=2, weights="int8", mesh=(2, 4), copies=True),
    Case("prompt, 2 rows, mesh 2x4", rows=2, program="prefill", mesh=(2, 4), copies=True),
)


LARGER = (Case("full depth, 8 rows", rows=8),)  # with its cache more than a v5e's 16 GB
V6E = (
    "full depth",
    "propagate",
    "generate_tokens, full depth",
    "prompt, full depth",
    "lossless pass",
    "full depth, 8-bit weights",
    "full depth, 2 rows, mesh 2x2",
    "propagate, 2 rows, 8-bit weights, mesh 2x4",
)
"""Cases for the second chip, by name: one of each kind, because all of them take an hour."""


def main() -> int:
    args = aot.arguments(__doc__)
    cases = {"v5e": CASES + MESHES, "v6e": [*(case for case in CASES + MESHES if case.name in V6E), *LARGER]}
    try:
        targets = [Target(f"TPU {chip}", _Chips(chip), wanted) for chip, wanted in cases.items()]
    except Exception as error:
        print(f"error: no TPU compiler for jax {jax.__version__} ({error}); run `make tpu-aot`", file=sys.stderr)
        return 2
    return aot.report(args, targets, _compiled)


class _Chips:
    """Chips of a kind, for meshes of one, four and eight."""

    def __init__(self, chip: str) -> None:
        self._of = {shape: _topology(f"{chip}:{shape}") for shape in ("2x2", "2x4")}

    def __call__(self, mesh: tuple[int, int]) -> np.ndarray:
        if mesh == (1, 1):
            return self._of[_SINGLE].reshape(-1)[:1].reshape(mesh)
        return self._of[f"{mesh[0]}x{mesh[1]}"].reshape(mesh)


def _topology(name: str) -> np.ndarray:
    return np.array(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def _compiled(case: Case, config: DecoderConfig, devices: np.ndarray) -> Step:
    several = case.program == "advance_lossless" or case.kv_strategy == "recompute"
    kind = next(spare for chip, spare in SPARE.items() if chip in devices.flat[0].device_kind)
    step = aot.compiled(case, config, devices, spare=SPARE_OF_PASSES if several else kind)
    problems = ["asks for a kernel of a GPU"] if "triton" in step.hlo or "mosaic_gpu" in step.hlo else []
    exchanged = sum(step.entry.get("collectives", {}).values())
    copies = 2 if case.program == "prefill" else 1  # the first chunk of a prompt, and the loop over the others
    most = copies * (_SUMS * config.num_layers + _MORE_EXCHANGES)
    if exchanged > most:
        problems.append(f"exchanges {exchanged} times, more than {most}")
    return Step(step.hlo, step.entry, step.problems + problems)


if __name__ == "__main__":
    raise SystemExit(main())

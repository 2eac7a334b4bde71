"""Compiles decode steps of an 8B model for an absent H100, and checks XLA's programs.

  make gpu-aot

installs XLA's compiler for NVIDIA GPUs (two wheels, no driver) into .gpu_aot and runs this script with it. Weights are
only shapes. A step must not copy weights or the cache, must not convert integer weights to floats, must consist of a
few CUDA graphs, and may use little extra memory. The script prints its findings, writes them with --out, and exits with
1 if a check fails.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from scripts.gpu import aot
from scripts.gpu.aot import Step, Target
from scripts.gpu.aot_programs import Case
from scripts.gpu.compiled_program import KERNELS, largest_graph, launches
from tide_jax.functional import DecoderConfig
from tide_jax.generation.cuda_graphs import OPTIONS

TARGET = Path(__file__).with_name("h100.txtpb")
_KERNELS_A_LAYER = 21  # of a plain layer at batch 1
_KERNEL = re.compile(r'custom_call_target="(?:__gpu\$xla\.gpu\.triton|mosaic_gpu)')

CASES = (
    Case("full depth"),
    Case("propagate", "propagate"),
    Case("propagate, 8 rows", "propagate", rows=8),
    Case("propagate, Pallas exit step", "propagate", "pallas_triton"),
    Case("propagate, Mosaic exit step", "propagate", "mosaic_gpu"),
    Case("recompute", "recompute"),
    Case("full depth, loops as graphs", graphs=True),
    Case("propagate, loops as graphs", "propagate", graphs=True),
    Case("propagate, deferred, loops as graphs", "propagate", deferred=True, graphs=True),
    Case("generate_tokens, full depth, loops as graphs", program="generate_tokens", graphs=True),
    Case("generate_tokens, propagate, loops as graphs", "propagate", program="generate_tokens", graphs=True),
    Case("lossless pass, loops as graphs", program="advance_lossless", graphs=True),
    Case("full depth, 8 rows, 16,384 slots", rows=8, slots=16384),
    Case("prompt, full depth", program="prefill"),
    Case("prompt, full depth, loops as graphs", program="prefill", graphs=True),
    Case("recurrent layers, full depth", kind="states", copies=True),
    Case("recurrent layers, recompute, loops as graphs", "recompute", kind="states", graphs=True, copies=True),
    Case("recurrent layers, prompt", kind="states", program="prefill", copies=True),
    Case(
        "recurrent layers, lossless pass, loops as graphs",
        kind="states",
        program="advance_lossless",
        graphs=True,
        copies=True,
    ),
    Case("propagate, 8 rows, Pallas kernels, 8-bit weights", "propagate", "pallas_triton", rows=8, weights="int8"),
    *aot.INT8,
)


def main() -> int:
    args = aot.arguments(__doc__)
    try:
        gpu = _h100()
    except Exception as error:
        print(f"error: no CUDA compiler for jax {jax.__version__} ({error}); run `make gpu-aot`", file=sys.stderr)
        return 2
    devices = np.array([[gpu]])
    return aot.report(args, [Target(gpu.device_kind, lambda _: devices, CASES)], _compiled)


def _h100() -> Any:
    target = {"topology": "1x1x1", "target_config": TARGET.read_text()}
    return topologies.get_topology_desc(platform="cuda", **target).devices[0]


def _compiled(case: Case, config: DecoderConfig, devices: np.ndarray) -> Step:
    with tempfile.TemporaryDirectory() as dump:
        options = {"xla_dump_to": dump} | (OPTIONS if case.graphs else {})
        step = aot.compiled(case, config, devices, options=options)
        (thunks,) = Path(dump).glob(f"*{case.program}*.thunk_sequence_after_thunk_passes.txt")
        text = thunks.read_text()
    launched = launches(text)
    counts = {
        "kernels": sum(launched[name] for name in KERNELS),
        "copies": launched["kCopy"],
        "graphs": launched["kCommandBuffer"],
        "loops": launched["kWhile"],
        "exit_kernels": len(_KERNEL.findall(step.hlo)),
    }
    if case.program == "decode_step" and case.kv_strategy is None and not case.graphs:
        # All layers are one group, which is one graph.
        counts["kernels_a_layer"] = largest_graph(text) // config.num_layers
    return Step(step.hlo, step.entry | counts, step.problems + _problems(case, counts))


def _problems(case: Case, counts: dict[str, int]) -> list[str]:
    # One graph before the loop, one per group, one after; "propagate" adds a loop over the skipped groups. With
    # recurrent layers, full depth has no loop. A prompt's are not counted: each chunk and each block has its own.
    graphs = 4 if case.kv_strategy == "propagate" else 3
    if case.graphs or (case.kind == "states" and case.kv_strategy is None):
        graphs = 1
    found = []
    if (counts["exit_kernels"] > 0) == (case.implementation == "reference"):
        found.append(f"has {counts['exit_kernels']} kernels of {case.implementation}")
    if counts["graphs"] != graphs and case.program != "prefill":
        found.append(f"is {counts['graphs']} CUDA graphs, not {graphs}")
    if case.kind == "plain" and case.rows == 1 and counts.get("kernels_a_layer", 0) > _KERNELS_A_LAYER:
        found.append(f"launches {counts['kernels_a_layer']} kernels a layer, more than {_KERNELS_A_LAYER}")
    return found


if __name__ == "__main__":
    raise SystemExit(main())

"""Compiles decode steps of an 8B model for an H100 that is not there, and checks what XLA made of them.

  make gpu-aot

installs XLA's compiler for NVIDIA GPUs (two wheels, no driver) into .gpu_aot and runs this with it. Weights are shapes
alone. A step must not copy weights or the cache, must be a few CUDA graphs, and may use little memory besides. Prints
what was found, writes it with --out, and exits with 1 where a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from gpu_program import large_results, launches
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, SingleDeviceSharding
from reporting import save

import pallas_kernels.selection
from tide_jax import Decoder, DecoderConfig, decode_step, init_cache
from tide_jax.calibration_estimate import eight_billion
from tide_jax.early_exit import ExitGate
from tide_jax.generate import Exits
from tide_jax.testing import constant_routers

TARGET = Path(__file__).with_name("h100.txtpb")
SLOTS = 4096
DTYPE = jnp.bfloat16
INTERVAL = 4
_KERNEL = re.compile(r'custom_call_target="(?:__gpu\$xla\.gpu\.triton|mosaic_gpu)')


class Case(NamedTuple):
    """A decode step.

    Attributes:
      name: for the table.
      graphs: CUDA graphs that XLA is expected to cut it into.
      kv_strategy: None runs every layer, without routers.
      implementation: of the exit step.
      rows: batch size.
    """

    name: str
    graphs: int
    kv_strategy: Any = None
    implementation: str = "reference"
    rows: int = 1


# Before the loop, a group of layers, after the loop; with "propagate" a loop more, over the groups that were skipped.
CASES = (
    Case("full depth", 3),
    Case("propagate", 4, "propagate"),
    Case("propagate, 8 rows", 4, "propagate", rows=8),
    Case("propagate, Pallas exit step", 4, "propagate", "pallas_triton"),
    Case("propagate, Mosaic exit step", 4, "propagate", "mosaic_gpu"),
    Case("recompute", 3, "recompute"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--layers", type=int, default=32, help="layers of the model (32)")
    parser.add_argument("--only", action="append", metavar="NAME", help="compile this case; may be repeated")
    args = parser.parse_args()
    try:
        gpu = _h100()
    except Exception as error:
        print(f"error: no CUDA compiler for jax {jax.__version__} ({error}); run `make gpu-aot`", file=sys.stderr)
        return 2
    config = dataclasses.replace(eight_billion(), num_layers=args.layers, attention_pattern=(0,) * args.layers)
    cases = [case for case in CASES if not args.only or case.name in args.only]
    report = {
        "jax": jax.__version__,
        "gpu": gpu.device_kind,
        "model": {"layers": args.layers, "hidden_size": config.hidden_size, "dtype": jnp.dtype(DTYPE).name},
        "slots": SLOTS,
        "interval": INTERVAL,
        "cases": [compiled(case, config, gpu) for case in cases],
    }
    for entry in report["cases"]:
        print(", ".join(f"{key} {value}" for key, value in entry.items() if key != "problems"))
    save(args.out, report)
    problems = [f"{entry['name']}: {problem}" for entry in report["cases"] for problem in entry["problems"]]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


def _h100() -> Any:
    target = {"topology": "1x1x1", "target_config": TARGET.read_text()}
    return topologies.get_topology_desc(platform="cuda", **target).devices[0]


def compiled(case: Case, config: DecoderConfig, gpu: Any) -> dict[str, Any]:
    """What XLA makes of a step, and what is wrong with it."""
    with tempfile.TemporaryDirectory() as dump:
        program = _lowered(case, config, gpu).compile(compiler_options={"xla_dump_to": dump})
        (thunks,) = Path(dump).glob("*decode_step*.thunk_sequence_after_thunk_passes.txt")
        launched = launches(thunks.read_text())
    heads, channels, _ = config.cache_shape
    keys = case.rows * heads * SLOTS * channels * jnp.dtype(DTYPE).itemsize
    kernel = 2 * config.num_kv_heads * config.head_dim * config.hidden_size * jnp.dtype(DTYPE).itemsize
    large = Counter(large_results(program.as_text(), min(keys, kernel) // 2))
    memory = program.memory_analysis()
    entry = {
        "name": case.name,
        "kernels": launched["kCustomKernel"] + launched["kKernel"],
        "copies": launched["kCopy"],
        "graphs": launched["kCommandBuffer"],
        "loops": launched["kWhile"],
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "exit_kernels": len(_KERNEL.findall(program.as_text())),
        "large_results": [[result.kind, result.shape, result.size, count] for result, count in large.items()],
    }
    return entry | {"problems": _problems(case, entry, limit=2 * keys)}


def _problems(case: Case, entry: dict[str, Any], limit: int) -> list[str]:
    """`limit`: what a step may use besides, the keys and values of one layer."""
    found = [
        f"writes {shape} by {kind}, {count} times: {size / 2**20:.1f} MiB each"
        for kind, shape, size, count in entry["large_results"]
    ]
    if entry["temporary_bytes"] > limit:
        found.append(f"uses {entry['temporary_bytes'] / 2**20:.1f} MiB besides, more than {limit / 2**20:.1f}")
    if (entry["exit_kernels"] > 0) == (case.implementation == "reference"):
        found.append(f"has {entry['exit_kernels']} kernels of {case.implementation}")
    if entry["graphs"] != case.graphs:
        found.append(f"is {entry['graphs']} CUDA graphs, not {case.graphs}")
    return found


def _lowered(case: Case, config: DecoderConfig, gpu: Any) -> jax.stages.Lowered:
    def on_gpu(make: Callable[[], Any]) -> Any:
        shapes, there = jax.eval_shape(make), SingleDeviceSharding(gpu)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), shapes)

    model = on_gpu(lambda: Decoder(config, dtype=DTYPE, rngs=nnx.Rngs(0)))
    exits = None if case.kv_strategy is None else on_gpu(functools.partial(_exits, config, case.kv_strategy))
    groups = 0 if exits is None else exits.pending_groups
    cache = on_gpu(lambda: init_cache(config, case.rows, SLOTS, DTYPE, pending_groups=groups))
    rows = on_gpu(lambda: (*(jnp.zeros((case.rows,), jnp.int32) for _ in range(2)), jnp.ones((case.rows,), bool)))
    step = functools.partial(decode_step, implementation=case.implementation)
    functools.update_wrapper(step, decode_step)
    with _compiling_for(gpu):
        traced = jax.jit(step, donate_argnames="cache").trace(model, cache, *rows, exits)
        return traced.lower(lowering_platforms=("cuda",))


def _exits(config: DecoderConfig, kv_strategy: Any) -> Exits:
    routers = constant_routers(config, interval=INTERVAL, bottleneck=128)
    gate = ExitGate(jnp.zeros((len(routers.checkpoints),)), jnp.int32(0))
    return Exits(routers, gate, False, kv_strategy)


@contextlib.contextmanager
def _compiling_for(gpu: Any) -> Any:
    """Kernels are chosen, and from JAX 0.11 on made, for the GPU that is not there."""
    here, pallas_kernels.selection.platform = pallas_kernels.selection.platform, lambda: "gpu"
    mesh = Mesh(np.array([gpu]), ("x",), axis_types=(AxisType.Auto,)).abstract_mesh
    asks = hasattr(jax.sharding, "AbstractDevice")
    try:
        with jax.sharding.use_abstract_mesh(mesh) if asks else contextlib.nullcontext():
            yield
    finally:
        pallas_kernels.selection.platform = here


if __name__ == "__main__":
    raise SystemExit(main())

"""Compiles decode steps of an 8B model for an absent accelerator; shared by gpu_aot.py and tpu_aot.py.

Weights are only shapes. A step must not copy weights or the cache, must not convert integer weights to floats, and may
use little extra memory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

import pallas_kernels.selection
from scripts.gpu.compiled_program import LargeResult, float_copies, large_results
from scripts.gpu.model import eight_billion_config
from scripts.reporting import save
from tide_jax.exits.exits import Exits
from tide_jax.functional import (
    Decoder,
    DecoderConfig,
    Prompt,
    Request,
    decode_step,
    generate_tokens,
    init_cache,
    make_sampling,
    prefill,
)
from tide_jax.model.architecture import AttentionType, LatentConfig, MoEConfig, RopeConfig
from tide_jax.model.rounding import Weights, as_int8
from tide_jax.testing import constant_routers

SLOTS = 4096
PROMPT = 16
LONG_PROMPT = 2048
DTYPE = jnp.bfloat16
INTERVAL = 4
_EXPERTS = 16  # of 896 channels: as many weights as the MLP they replace
_SMALL = 16 * 2**20  # extra memory that a step may always use, even if a layer's keys and values take less
_LOWERED_FOR = {"gpu": "cuda", "tpu": "tpu"}


class Case(NamedTuple):
    """A decode step to compile.

    Attributes:
      name: name in the table.
      kv_strategy: None runs every layer, without routers.
      implementation: implementation of the exit step.
      rows: batch size.
      weights: the model's kind of weights.
      kind: "experts" replaces the MLPs by mixtures of experts, "latent" stores keys and values as latent vectors.
      program: one step, a whole generation, which makes its own cache, or a prompt of `LONG_PROMPT` tokens.
      slots: capacity of the cache, for each row.
      graphs: on a GPU, loops as CUDA graphs (`tide_jax.generation.cuda_graphs`).
    """

    name: str
    kv_strategy: Any = None
    implementation: str = "reference"
    rows: int = 1
    weights: Weights = "float"
    kind: Literal["plain", "experts", "latent"] = "plain"
    program: Literal["decode_step", "generate_tokens", "prefill"] = "decode_step"
    slots: int = SLOTS
    graphs: bool = False


INT8 = (
    Case("full depth, 8-bit weights", weights="int8"),
    Case("propagate, 8-bit weights", "propagate", weights="int8"),
    Case("propagate, 8 rows, 8-bit weights", "propagate", rows=8, weights="int8"),
    Case("experts, 8-bit weights", weights="int8", kind="experts"),
    Case("experts, 8 rows, 8-bit weights", rows=8, weights="int8", kind="experts"),
    Case("latent vectors, 8-bit weights", weights="int8", kind="latent"),
    Case("latent vectors, 8 rows, 8-bit weights", rows=8, weights="int8", kind="latent"),
)
"""Cases with 8-bit weights, for every accelerator."""


class Step(NamedTuple):
    """A compiled case.

    Attributes:
      hlo: the optimised program.
      entry: its row in the report.
      problems: failed checks.
    """

    hlo: str
    entry: dict[str, Any]
    problems: list[str]


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--layers", type=int, default=32, help="layers of the model (32)")
    parser.add_argument("--only", action="append", metavar="NAME", help="compile this case; may be repeated")
    return parser.parse_args()


def report(
    args: argparse.Namespace, cases: Sequence[Case], device: Any, compiled: Callable[[Case, DecoderConfig], Step]
) -> int:
    """Compiles the cases, prints and writes the findings, and returns the process's exit code."""
    config = dataclasses.replace(eight_billion_config(), num_layers=args.layers, attention_pattern=(0,) * args.layers)
    entries = []
    for case in cases:
        if not args.only or case.name in args.only:
            step = compiled(case, config)
            print(", ".join(f"{key} {value}" for key, value in step.entry.items()), flush=True)
            entries.append(step.entry | {"problems": step.problems})
    model = {"layers": args.layers, "hidden_size": config.hidden_size, "dtype": jnp.dtype(DTYPE).name}
    found = {"jax": jax.__version__, "device": device.device_kind, "model": model, "slots": SLOTS, "interval": INTERVAL}
    save(args.out, found | {"cases": entries})
    problems = [f"{entry['name']}: {problem}" for entry in entries for problem in entry["problems"]]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


def compiled(
    case: Case, config: DecoderConfig, device: Any, *, options: dict[str, Any] | None = None, spare: int = 0
) -> Step:
    """Compiles a step with XLA for an absent device, and checks the result.

    Args:
      options: options of the compiler.
      spare: extra bytes allowed for each layer, besides one layer's keys and values.
    """
    config = {"plain": _plain, "experts": _with_experts, "latent": _with_latent_vectors}[case.kind](config)
    lowered, integers = _lowered(case, config, device)
    program = lowered.compile(compiler_options=options)
    hlo, memory = program.as_text(), program.memory_analysis()
    assert hlo is not None
    assert memory is not None
    heads, channels, _ = config.cache_shape
    keys = case.rows * heads * case.slots * channels * jnp.dtype(DTYPE).itemsize
    kernel = 2 * config.num_kv_heads * config.head_dim * config.hidden_size * jnp.dtype(DTYPE).itemsize
    entry = {
        "name": case.name,
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "large_results": _counted(r for r in large_results(hlo, min(keys, kernel) // 2) if not _makes_cache(case, r)),
        "float_copies": _counted(float_copies(hlo, integers)),
    }
    cache = 0 if case.program == "decode_step" else 2 * keys * config.num_layers
    return Step(hlo, entry, _problems(entry, limit=max(2 * keys, _SMALL) + spare * config.num_layers + cache))


def _makes_cache(case: Case, result: LargeResult) -> bool:
    """Whether a generation makes its cache there: zeros, or the prompt's rows and zeros behind them."""
    return case.program == "generate_tokens" and result.kind.split("+")[-1] in ("broadcast", "pad")


def _counted(results: Iterable[LargeResult]) -> list[list[Any]]:
    return [[*result, count] for result, count in Counter(results).items()]


def _problems(entry: dict[str, Any], limit: int) -> list[str]:
    """Failed checks; `limit` is the number of extra bytes that a step may use."""
    found = [
        f"{what} {shape} by {kind}, {count} times: {size / 2**20:.1f} MiB each"
        for what, key in (("writes", "large_results"), ("makes floats of integers,", "float_copies"))
        for kind, shape, size, count in entry[key]
    ]
    if entry["temporary_bytes"] > limit:
        found.append(f"uses {entry['temporary_bytes'] / 2**20:.1f} MiB besides, more than {limit / 2**20:.1f}")
    return found


def _plain(config: DecoderConfig) -> DecoderConfig:
    return config


def _with_latent_vectors(config: DecoderConfig) -> DecoderConfig:
    """The configuration with the sizes of DeepSeek-V2's attention."""
    latent = LatentConfig(kv_rank=512, q_rank=None, nope_dim=128, rope_dim=64, value_dim=128)
    rope = RopeConfig(theta=10000.0, rotary_dim=64, interleaved=True)
    head_dim = latent.nope_dim + latent.rope_dim
    kinds = (AttentionType(scale=head_dim**-0.5, rope=rope),)
    return dataclasses.replace(
        config, latent=latent, head_dim=head_dim, num_kv_heads=config.num_heads, attention_types=kinds
    )


def _with_experts(config: DecoderConfig) -> DecoderConfig:
    size = config.intermediate_size // _EXPERTS
    moe = MoEConfig(num_experts=_EXPERTS, experts_per_token=2, intermediate_size=size)
    return dataclasses.replace(config, moe=moe)


def _lowered(case: Case, config: DecoderConfig, device: Any) -> tuple[jax.stages.Lowered, set[int]]:
    """The step lowered for XLA, and the sizes of its integer matrices."""

    def there(make: Callable[[], Any]) -> Any:
        shapes, on = jax.eval_shape(make), SingleDeviceSharding(device)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on), shapes)

    model = there(functools.partial(_model, config, case.weights))
    exits = None if case.kv_strategy is None else there(functools.partial(_exits, config, case))
    integers = {math.prod(leaf.shape) for leaf in jax.tree.leaves(model) if leaf.dtype == jnp.int8}
    with _compiling_for(device):
        if case.program == "generate_tokens":
            program = jax.jit(generate_tokens, static_argnames="capacity")
            traced = program.trace(model, *there(lambda: _call(case.rows)), exits, capacity=SLOTS - PROMPT)
        elif case.program == "prefill":
            cache = there(lambda: init_cache(config, case.rows, case.slots, DTYPE, exits=exits))
            prompt = there(lambda: _prompt(case.rows, LONG_PROMPT))
            traced = jax.jit(prefill, donate_argnames="cache").trace(model, prompt, cache, exits)
        else:
            cache = there(lambda: init_cache(config, case.rows, case.slots, DTYPE, exits=exits))
            rows = there(
                lambda: (*(jnp.zeros((case.rows,), jnp.int32) for _ in range(2)), jnp.ones((case.rows,), bool))
            )
            traced = jax.jit(decode_step, donate_argnames="cache").trace(model, cache, *rows, exits)
        return traced.lower(lowering_platforms=(_LOWERED_FOR[_platform(device)],)), integers


def _prompt(rows: int, tokens: int) -> Prompt:
    return Prompt(jnp.zeros((rows, tokens), jnp.int32), jnp.full((rows,), tokens, jnp.int32))


def _call(rows: int) -> tuple[Prompt, Request]:
    """Prompts and a request for sampled tokens."""
    eos, most = jnp.full((rows, 1), -1, jnp.int32), jnp.int32(SLOTS - PROMPT)
    return _prompt(rows, PROMPT), Request(make_sampling(), jax.random.key(0), eos, jnp.int32(0), most)


def _model(config: DecoderConfig, weights: Weights) -> Decoder:
    model = Decoder(config, dtype=DTYPE, rngs=nnx.Rngs(0))
    return as_int8(model) if weights == "int8" else model


def _exits(config: DecoderConfig, case: Case) -> Exits:
    routers = constant_routers(config, interval=INTERVAL, bottleneck=128)
    strategy: Any = case.kv_strategy
    return Exits.uniform(routers, 0.0, kv_strategy=strategy, implementation=case.implementation)


def _platform(device: Any) -> str:
    return "tpu" if device.platform == "tpu" else "gpu"


@contextlib.contextmanager
def _compiling_for(device: Any) -> Iterator[None]:
    """Makes JAX choose kernels, and from JAX 0.11 on build them, for the absent device."""
    here, pallas_kernels.selection.platform = pallas_kernels.selection.platform, lambda: _platform(device)
    mesh = Mesh(np.array([device]), ("x",), axis_types=(AxisType.Auto,)).abstract_mesh
    asks = hasattr(jax.sharding, "AbstractDevice")
    try:
        with jax.sharding.use_abstract_mesh(mesh) if asks else contextlib.nullcontext():
            yield
    finally:
        pallas_kernels.selection.platform = here

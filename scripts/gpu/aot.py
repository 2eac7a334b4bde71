"""Compiles programs of an 8B model for absent accelerators, and checks them; shared by gpu_aot.py and tpu_aot.py.

A program must not copy weights or the cache, must not convert integer weights to floats, and may use little extra
memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scripts.gpu.aot_programs import DTYPE, INTERVAL, LONG_PROMPT, SLOTS, Case, lower
from scripts.gpu.compiled_program import LargeResult, collectives, float_copies, large_results, moves_only
from scripts.gpu.model import eight_billion_config
from scripts.reporting import reason, save
from tide_jax.functional import DecoderConfig
from tide_jax.generation.generate import PREFILL_CHUNK
from tide_jax.lossless.speculate import MOST_SLOTS

_SMALL = 16 * 2**20  # extra memory that a program may always use, even if a layer's keys and values take less
_PASS_LOGITS = 4  # arrays as large as a lossless pass's logits, float32
_PROMPT_ARRAYS = 8  # arrays as large as a chunk's widest activations, and as its keys and values in all layers

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


class Target(NamedTuple):
    """Absent devices, and the cases to compile for them.

    Attributes:
      name: name in the report.
      devices: by the shape of the mesh.
      cases: what to compile.
    """

    name: str
    devices: Callable[[tuple[int, int]], np.ndarray]
    cases: Sequence[Case]


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--layers", type=int, default=32, help="layers of the model (32)")
    parser.add_argument("--only", action="append", metavar="NAME", help="compile this case; may be repeated")
    return parser.parse_args()


def report(
    args: argparse.Namespace,
    targets: Sequence[Target],
    compiled: Callable[[Case, DecoderConfig, np.ndarray], Step],
) -> int:
    """Compiles the cases, prints and writes the findings, and returns the process's exit code."""
    config = dataclasses.replace(eight_billion_config(), num_layers=args.layers, layer_pattern=(0,) * args.layers)
    model = {"layers": args.layers, "hidden_size": config.hidden_size, "dtype": jnp.dtype(DTYPE).name}
    found = {"jax": jax.__version__, "model": model, "slots": SLOTS, "interval": INTERVAL, "prompt": LONG_PROMPT}
    entries: list[dict[str, Any]] = []
    names = [case.name for target in targets for case in target.cases]
    problems = [
        f"--only {name!r} is no case, expected one of {', '.join(names)}" for name in set(args.only or ()) - set(names)
    ]
    for target in targets:
        for case in target.cases:
            if args.only and case.name not in args.only:
                continue
            try:
                step = compiled(case, config, target.devices(case.mesh))
            except Exception as error:
                problems.append(f"{target.name}, {case.name}: {reason(error)}")
                continue
            entries.append({"device": target.name, **step.entry})
            print(", ".join(f"{key} {value}" for key, value in entries[-1].items()), flush=True)
            problems += [f"{target.name}, {case.name}: {each}" for each in step.problems]
            save(args.out, found | {"cases": entries, "problems": problems})
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problems))


def compiled(
    case: Case,
    config: DecoderConfig,
    devices: np.ndarray,
    *,
    options: dict[str, Any] | None = None,
    spare: int = 0,
) -> Step:
    """Compiles a case with XLA for absent devices, and checks the result.

    Args:
      devices: an array of the case's mesh.
      options: options of the compiler.
      spare: extra bytes allowed for each layer, besides one layer's keys and values.
    """
    config = case.config(config)
    lowered = lower(case, config, devices)
    program = lowered.program.compile(compiler_options=options)
    hlo, memory = program.as_text(), program.memory_analysis()
    assert hlo is not None
    assert memory is not None
    item = jnp.dtype(DTYPE).itemsize
    heads, channels, _ = config.cache_shape
    keys = case.rows * heads * case.slots * channels * item // devices.size
    kernel = 2 * config.num_kv_heads * config.head_dim * config.hidden_size * item // devices.size
    entry = {
        "name": case.name,
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "large_results": _counted(
            each for each in _copies(case, hlo, keys, kernel) if not _is_state(config, case, each)
        ),
        "float_copies": _counted(_float_copies(case, hlo, lowered.integers)),
    }
    if devices.size > 1:
        entry["collectives"] = dict(collectives(hlo))
    limit = max(2 * keys, _SMALL) + spare * config.num_layers
    if case.makes_cache:
        limit += 2 * keys * config.num_layers
    if case.program == "advance_lossless":
        limit += _PASS_LOGITS * case.rows * MOST_SLOTS * config.vocab_size * 4 // devices.size
    if case.program == "prefill":
        row = 2 * config.intermediate_size + 2 * config.num_layers * config.num_kv_heads * config.head_dim
        limit += _PROMPT_ARRAYS * PREFILL_CHUNK * row * item
    if case.copies:  # known ones take memory, too
        limit += sum(size * count for _, _, size, count in entry["large_results"])
    return Step(hlo, entry, _problems(entry, limit, copies=case.copies))


def _copies(case: Case, hlo: str, keys: int, kernel: int) -> list[LargeResult]:
    """Large arrays that the program writes.

    A prompt's activations are large, and so are scores of many slots; there only copies count.
    """
    if case.program == "prefill" or case.slots > SLOTS:
        moved = (result for result in large_results(hlo, min(keys, kernel) // 2) if moves_only(result))
        return [result for result in moved if PREFILL_CHUNK not in result.sizes]  # no weight has that size
    return [result for result in large_results(hlo, min(keys, kernel) // 2) if not _makes_cache(case, result)]


def _float_copies(case: Case, hlo: str, integers: set[int]) -> list[LargeResult]:
    """Integer weights as floats; of a prompt only what could be weights, for its scores may be as large."""
    found = float_copies(hlo, integers)
    if case.program != "prefill":
        return found
    return [each for each in found if moves_only(each, scaled=True) and PREFILL_CHUNK not in each.sizes]


def _makes_cache(case: Case, result: LargeResult) -> bool:
    """Whether a generation makes its cache there: zeros, or the prompt's rows and zeros behind them."""
    return case.makes_cache and result.kind.split("+")[-1] in ("broadcast", "pad")


def _is_state(config: DecoderConfig, case: Case, result: LargeResult) -> bool:
    """Whether a step computes a layer's new state there."""
    shapes = {(case.rows, *kind.sizes(config.hidden_size).matrix) for kind in config.recurrent_types}
    return tuple(result.sizes) in shapes and not moves_only(result)


def _counted(results: Iterable[LargeResult]) -> list[list[Any]]:
    return [[*result, count] for result, count in Counter(results).items()]


def _problems(entry: dict[str, Any], limit: int, *, copies: bool) -> list[str]:
    """Failed checks.

    Args:
      limit: extra bytes that the program may use.
      copies: whether copies are known.
    """
    found = (
        []
        if copies
        else [
            f"{what} {shape} by {kind}, {count} times: {size / 2**20:.1f} MiB each"
            for what, key in (("writes", "large_results"), ("makes floats of integers,", "float_copies"))
            for kind, shape, size, count in entry[key]
        ]
    )
    if entry["temporary_bytes"] > limit:
        found.append(f"uses {entry['temporary_bytes'] / 2**20:.1f} MiB besides, more than {limit / 2**20:.1f}")
    return found

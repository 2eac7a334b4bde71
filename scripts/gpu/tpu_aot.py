"""Compiles decode steps of an 8B model for an absent TPU v5e, and checks XLA's programs.

  make tpu-aot

installs XLA's compiler for TPUs (one wheel, no TPU) into .tpu_aot and runs this script with it. Weights are only
shapes. A step must not copy weights or the cache, must not convert integer weights to floats, and may use little extra
memory. The script prints its findings, writes them with --out, and exits with 1 if a check fails.
"""

from __future__ import annotations

import functools
import sys

import jax
from jax.experimental import topologies

from scripts.gpu import aot
from scripts.gpu.aot import Case

SPARE = 2 * 2**20  # XLA's use per layer on a TPU, in smaller arrays
CASES = (
    Case("full depth"),
    Case("propagate", "propagate"),
    Case("full depth, 8 rows, 16,384 slots", rows=8, slots=16384),
    Case("prompt, full depth", program="prefill"),
    Case("generate_tokens, full depth", program="generate_tokens"),
    *aot.INT8,
)


def main() -> int:
    args = aot.arguments(__doc__)
    try:
        tpu = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    except Exception as error:
        print(f"error: no TPU compiler for jax {jax.__version__} ({error}); run `make tpu-aot`", file=sys.stderr)
        return 2
    return aot.report(args, CASES, tpu, functools.partial(aot.compiled, device=tpu, spare=SPARE))


if __name__ == "__main__":
    raise SystemExit(main())

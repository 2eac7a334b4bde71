"""Compiles decode steps of an 8B model for a TPU v5e that is not there, and checks what XLA made of them.

  make tpu-aot

installs XLA's compiler for TPUs (one wheel, no TPU) into .tpu_aot and runs this with it. Weights are shapes alone. A
step must not copy weights or the cache, nor make floats of weights that are integers, and may use little memory
besides. Prints what was found, writes it with --out, and exits with 1 where a check fails.
"""

from __future__ import annotations

import functools
import sys

import jax
from jax.experimental import topologies

from scripts.gpu import aot
from scripts.gpu.aot import Case

SPARE = 2 * 2**20  # what XLA for a TPU uses for each layer, in arrays of less than that
CASES = (
    Case("full depth"),
    Case("propagate", "propagate"),
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

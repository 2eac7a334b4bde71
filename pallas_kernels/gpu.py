"""Properties of the GPU at run time, from which kernels choose their shapes."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Gpu(NamedTuple):
    """A GPU.

    Attributes:
      architecture: CUDA compute capability, such as "9.0".
      multiprocessors: at least this many programs run in parallel.
    """

    architecture: str
    multiprocessors: int


DEFAULT = Gpu("9.0", 132)
"""An H100; assumed when a program is built for a GPU without one present."""


def current() -> Gpu:
    """The first local GPU, or `DEFAULT` if there is none."""
    try:
        device = jax.local_devices(backend="gpu")[0]
    except RuntimeError:  # no such backend
        return DEFAULT
    architecture = str(getattr(device, "compute_capability", DEFAULT.architecture))
    return Gpu(architecture, int(getattr(device, "core_count", DEFAULT.multiprocessors)))

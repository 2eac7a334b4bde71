"""Facts about the GPU that kernels are shaped for, found at run time."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Gpu(NamedTuple):
    """A GPU.

    Attributes:
      architecture: CUDA compute capability, such as "9.0".
      multiprocessors: programs that run side by side, at the least.
    """

    architecture: str
    multiprocessors: int


DEFAULT = Gpu("9.0", 132)
"""An H100, assumed where a program is made for a GPU that is not there."""


def current() -> Gpu:
    """The first local GPU; `DEFAULT` without one."""
    try:
        device = jax.local_devices(backend="gpu")[0]
    except RuntimeError:  # no such backend
        return DEFAULT
    architecture = str(getattr(device, "compute_capability", DEFAULT.architecture))
    return Gpu(architecture, int(getattr(device, "core_count", DEFAULT.multiprocessors)))

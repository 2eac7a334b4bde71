"""Which implementation of an operation runs: the one that was named, or the best there is on this platform."""

from __future__ import annotations

import functools
import importlib
import importlib.resources
import json
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax

logger = logging.getLogger(__name__)

_MODULES = {
    "pallas_triton": "jax.experimental.pallas.triton",
    "triton": "jax_triton",
    "mosaic_gpu": "jax.experimental.pallas.mosaic_gpu",
    "llvm": "llvmlite.binding",
}
"""What an implementation imports that may be missing."""


class Unfit(ValueError):
    """The implementation that was named can't run here, or not with these arguments."""


class Choices(NamedTuple):
    """The implementations of one operation.

    Attributes:
      operation: its name, for messages.
      names: all implementations.
      on_gpu: those that run on a GPU alone; None tries them there in this order, and the reference is what is left.
      proven: whether a GPU has found all of `on_gpu` right; by default what ``proven.json`` says of each. Others are
        never what None takes.
    """

    operation: str
    names: tuple[str, ...]
    on_gpu: tuple[str, ...]
    proven: bool | None = None

    def refusal(self, name: str | None) -> str | None:
        """Why `name` can't run in this process, whatever its arguments; None where it can."""
        if name is None:
            return None
        if not isinstance(name, str):
            return f"implementation is {type(name).__name__}; choose None or one of {', '.join(self.names)}"
        if name == "reference":
            return None
        if name not in self.names:
            return f"implementation={name!r} is not known; choose None or one of {', '.join(self.names)}"
        if name in self.on_gpu and platform() != "gpu":
            return (
                f"{self.operation}: {name!r} runs on a GPU, this process computes on a {platform()}; "
                "leave implementation= out to choose by platform"
            )
        missing = _import_error(_MODULES["pallas_triton" if name == "pallas_interpret" else name])
        return None if missing is None else f"{self.operation}: {name!r} can't be imported: {missing}"

    def own(self, name: str | None) -> str | None:
        """`name`, given for several operations: None where this one has no implementation of that name."""
        return name if name in self.names else None

    def plain(self, name: str | None) -> bool:
        """Whether `name` is plain JAX in this process, whatever the arguments."""
        return name == "reference" or (name is None and not self._automatic())

    def choose(self, name: str | None, misfit: Callable[[str], str | None]) -> str:
        """The implementation to run.

        Args:
          name: the caller's; None chooses by platform.
          misfit: why the kernel of a name can't take the arguments; None where it can.

        Raises:
          Unfit: `name` can't run here, with the reason.
        """
        if name is not None:
            reason = self.refusal(name) or (misfit(name) if name != "reference" else None)
            if reason is not None:
                raise Unfit(reason)
            return name
        for candidate in self._automatic():
            reason = self.refusal(candidate) or misfit(candidate)
            if reason is None:
                return candidate
            _warn_once(reason)
        return "reference"

    def _automatic(self) -> tuple[str, ...]:
        """What None tries in this process: on a GPU, those of `on_gpu` that one has found right."""
        if platform() != "gpu":
            return ()
        if self.proven is None:
            return tuple(name for name in self.on_gpu if name in _proven_kernels().get(self.operation, ()))
        return self.on_gpu if self.proven else ()


def platform() -> str:
    """Where computations go that are not placed by hand: "cpu", "gpu" or "tpu"."""
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return getattr(device, "platform", device)


@functools.cache
def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # jax_triton raises what its parts raise where there is no CUDA
        return f"{type(error).__name__}: {error}"
    return None


@functools.cache
def _proven_kernels() -> dict[str, list[str]]:
    """Implementations that a GPU has found right, by operation: what scripts/verify_gpu.py wrote."""
    text = (importlib.resources.files("pallas_kernels") / "proven.json").read_text(encoding="utf-8")
    return json.loads(text)["operations"]


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("%s; falling back", reason)

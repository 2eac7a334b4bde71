"""Chooses the implementation of an operation: the named one, or the best one on this platform."""

from __future__ import annotations

import functools
import importlib
import importlib.resources
import json
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

logger = logging.getLogger(__name__)

_MODULES = {
    "pallas_triton": "jax.experimental.pallas.triton",
    "triton": "jax_triton",
    "mosaic_gpu": "jax.experimental.pallas.mosaic_gpu",
    "llvm": "llvmlite.binding",
}
"""The optional import that each implementation needs."""


OUTSIDE_GRAPHS = ("triton",)
"""Implementations that XLA leaves out of CUDA graphs: each would split a decode step into launches from the host."""


class ImplementationError(ValueError):
    """The named implementation can't run here, or not with these arguments."""


class Choices(NamedTuple):
    """The implementations of one operation.

    Attributes:
      operation: its name, for messages, which is also its folder's.
      names: all implementations.
      on_gpu: those that run only on a GPU. None tries them there in this order, without `OUTSIDE_GRAPHS`, then the
        reference.
      proven: whether all of `on_gpu` gave correct results on a GPU; if None, ``proven.json`` says so for each. Unproven
        implementations are never chosen for None.
      least_rows: for fewer rows None chooses the reference, whose few kernels cost less than a kernel's buffers.
    """

    operation: str
    names: tuple[str, ...]
    on_gpu: tuple[str, ...]
    proven: bool | None = None
    least_rows: int = 1

    def refusal(self, name: str | None) -> str | None:
        """Reason why `name` can't run in this process, whatever its arguments; None if it can."""
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
        """`name`, which was given for several operations, or None if this operation has no such implementation."""
        return name if name in self.names else None

    def plain(self, name: str | None, rows: int) -> bool:
        """Whether `name` means plain JAX in this process for `rows` rows, whatever the other arguments."""
        return name == "reference" or (name is None and not self._automatic(rows))

    def choose(self, name: str | None, argument_refusal: Callable[[str], str | None], rows: int) -> str:
        """The implementation to run.

        None chooses the reference, except on a GPU with proven kernels (`proven`) and from `least_rows` rows on: there
        it chooses the first one that can be imported and takes the arguments, or else the reference, with a warning in
        the log. It never chooses a kernel that CUDA graphs leave out.

        Args:
          name: the caller's choice; None chooses by platform.
          argument_refusal: for a name, the reason why its kernel can't take the arguments; None if it can.
          rows: rows or tokens that the operation takes.

        Raises:
          ImplementationError: `name` can't run here; the message has the reason.
        """
        if name is not None:
            reason = self.refusal(name) or (argument_refusal(name) if name != "reference" else None)
            if reason is not None:
                raise ImplementationError(reason)
            return name
        for candidate in self._automatic(rows):
            reason = self.refusal(candidate) or argument_refusal(candidate)
            if reason is None:
                return candidate
            _warn_once(reason)
        return "reference"

    def function(self, name: str) -> Callable[..., Any]:
        """The operation's function in implementation `name`, from that implementation's module; imports no other.

        A module has its implementation's name, except that "pallas_interpret" is `pallas_triton` with ``interpret``.
        """
        file = "pallas_triton" if name == "pallas_interpret" else name
        function = getattr(importlib.import_module(f"pallas_kernels.{self.operation}.{file}"), self.operation)
        return functools.partial(function, interpret=True) if name == "pallas_interpret" else function

    def _automatic(self, rows: int) -> tuple[str, ...]:
        """Implementations that None tries in this process: on a GPU, the proven ones of `on_gpu`; elsewhere none."""
        if platform() != "gpu" or rows < self.least_rows:
            return ()
        proven = self.on_gpu if self.proven else ()
        if self.proven is None:
            proven = tuple(name for name in self.on_gpu if name in _proven_kernels().get(self.operation, ()))
        return tuple(name for name in proven if name not in OUTSIDE_GRAPHS)


def platform() -> str:
    """Default platform of computations: "cpu", "gpu" or "tpu"."""
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return getattr(device, "platform", device)


@functools.cache
def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # without CUDA, jax_triton raises whatever its parts raise
        return f"{type(error).__name__}: {error}"
    return None


@functools.cache
def _proven_kernels() -> dict[str, list[str]]:
    """Implementations with correct results on a GPU, by operation, as recorded by scripts/verify_gpu.py."""
    text = (importlib.resources.files("pallas_kernels") / "proven.json").read_text(encoding="utf-8")
    return json.loads(text)["operations"]


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("%s; falling back", reason)

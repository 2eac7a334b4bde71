"""Options of commands that run on several devices or machines."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tide_jax.errors import TideError

if TYPE_CHECKING:
    from jax.sharding import Mesh

_PROCESS_OPTIONS = ("coordinator", "processes", "process_id")
"""Options that place a process among the others."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--mesh`` and ``--distributed``."""
    parser.add_argument(
        "--mesh",
        metavar="DATAxMODEL",
        help="devices to run on, such as 1x4: rows are split over DATA groups, the model over MODEL devices in each",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="run as one of several processes that share the work of this command over --mesh; only the first prints",
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of the first process, if JAX can't find it")
    parser.add_argument("--processes", type=int, help="number of processes, if JAX can't find it")
    parser.add_argument("--process-id", type=int, help="number of this process, from 0, if JAX can't find it")


def open_mesh(args: argparse.Namespace) -> Mesh | None:
    """Joins the other processes, if there are any, and returns the requested mesh.

    Call this before anything else uses a device.

    Raises:
      TideError: options that do not go together, no other process found, or a mesh that cannot be built.
    """
    given = [name for name in _PROCESS_OPTIONS if getattr(args, name) is not None]
    if given and not args.distributed:
        raise TideError(f"--{given[0].replace('_', '-')} applies to several processes; it needs --distributed")
    if args.distributed:
        if args.mesh is None:
            raise TideError("--distributed needs --mesh: without it, each process would do all the work")
        _join(args)
    from tide_jax.model.sharding import make_mesh

    return None if args.mesh is None else make_mesh(args.mesh)


def first_process() -> bool:
    """Whether this is the process that prints."""
    import jax

    return jax.process_index() == 0


class SilentStreamer:
    """Replaces the streamer in processes that do not print."""

    def put(self, tokens: Any) -> None:
        """Ignores tokens."""

    def end(self) -> None:
        """Does nothing."""


def _join(args: argparse.Namespace) -> None:
    import jax

    try:
        jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
    except (RuntimeError, ValueError, TypeError) as error:
        raise TideError(
            f"--distributed: the processes can't be joined ({' '.join(str(error).split())}); give each of them "
            "--coordinator HOST:PORT, --processes N and its own --process-id"
        ) from error

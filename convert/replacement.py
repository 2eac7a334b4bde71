"""A directory that appears complete or not at all, and spares what it replaces until it is there."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from tide_jax.errors import TideError

_PARTIAL, _OLD = ".partial", ".old"


@contextlib.contextmanager
def replacing(destination: Path, size: int, check: Callable[[], None]) -> Iterator[Path]:
    """A directory beside `destination` that takes its place on success and is removed on any failure.

    Args:
      size: bytes that will be written.
      check: raises if `destination` may not be replaced; asked again at the end, when another run may have made it.

    Raises:
      TideError: the directory cannot be written.
    """
    partial = destination.parent / f".{destination.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{_PARTIAL}"
    try:
        _remove_leftovers(destination, _PARTIAL)
        partial.mkdir(parents=True)
        if (free := shutil.disk_usage(partial).free) < size:
            raise OSError(errno.ENOSPC, f"{size} bytes needed, {free} free")
        yield partial
        check()
        _swap(partial, destination)
        _remove_leftovers(destination, _OLD)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise TideError(f"no space left for {destination} ({error.strerror}): free some") from error
        raise TideError(f"{destination} cannot be written ({error.strerror or error}): choose another") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(partial: Path, destination: Path) -> None:
    old = partial.with_suffix(_OLD)
    try:
        if destination.exists():
            destination.rename(old)
        partial.rename(destination)
    except BaseException:
        if old.exists() and not destination.exists():
            old.rename(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(destination: Path, suffix: str) -> None:
    """Removes what runs left that were killed; those of runs still alive stay."""
    name = re.compile(rf"\.{re.escape(destination.name)}\.(\d+)-[0-9a-f]+{re.escape(suffix)}")
    for path in destination.parent.glob(f".*{suffix}"):
        if (match := name.fullmatch(path.name)) and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True

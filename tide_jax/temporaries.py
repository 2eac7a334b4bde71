"""Temporary files and folders that later runs can distinguish from leftovers.

A run holds a lock on what it is writing. The lock ends with the process, however the process ends. It also works
between containers that share a disk, where process ids are meaningless. If a file system has no locks, the host and
process id in the name are used instead.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_LOCK_MARK, _SUFFIX = "-lock", ".partial"
_NAME = re.compile(rf"\.(?P<of>.+)\.(?P<pid>\d+)-[0-9a-f]+(@(?P<host>[^@]*?))?(?P<locked>{_LOCK_MARK})?{_SUFFIX}", re.S)


@contextlib.contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """An empty folder in `parent`, to be renamed; removed at the end if it still exists.

    Leftovers with the same name are removed first. Raises OSError if the folder can't be made.
    """
    with _make_temporary(parent, name, Path.mkdir) as (folder, _):
        yield folder


@contextlib.contextmanager
def temporary_file(parent: Path, name: str) -> Iterator[tuple[Path, int]]:
    """Same as `temporary_folder` for a file: its path, and a handle open for writing."""
    with _make_temporary(parent, name, lambda path: path.touch(exist_ok=False)) as file_and_handle:
        yield file_and_handle


def discard(path: Path, name: str) -> None:
    """Removes a file or folder; if the process is killed meanwhile, the rest is a leftover called `name`."""
    leftover = path.with_name(f".{name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{_LOCK_MARK}{_SUFFIX}")
    os.rename(path, leftover)
    _remove(leftover)


def remove_leftovers(parent: Path, name: str) -> None:
    """Removes temporaries called `name` that killed runs left behind; those of live runs stay."""
    for path in parent.glob(f".*{_SUFFIX}"):
        if (match := _NAME.fullmatch(path.name)) and match["of"] == name and _is_leftover(path, match):
            _remove(path)


def is_temporary(name: str) -> bool:
    """Whether this is the name of a temporary file or folder."""
    return _NAME.fullmatch(name) is not None


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Waits until no other process is in this block for the same folder, if the file system has locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, wait=True)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _make_temporary(parent: Path, name: str, make: Callable[[Path], None]) -> Iterator[tuple[Path, int]]:
    remove_leftovers(parent, name)
    plain = f".{name}.{os.getpid()}-{uuid.uuid4().hex[:8]}"
    # The name first has host and process id, and is changed once the lock is held.
    path, handle = parent / f"{plain}@{_host()}{_SUFFIX}", -1
    try:
        make(path)
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        if _lock(handle):
            renamed = parent / f"{plain}{_LOCK_MARK}{_SUFFIX}"
            os.rename(path, renamed)
            path = renamed
        yield path, handle
    finally:
        _remove(path)
        if handle >= 0:
            os.close(handle)  # releases the lock


def _lock(handle: int, *, wait: bool = False) -> bool | None:
    """Whether the process now has the lock: False if another process has it, None if there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # for example for folders on NFS
        return None
    return True


def _is_leftover(path: Path, match: re.Match[str]) -> bool:
    if match["locked"] is None:
        # Without a lock, only a process on this host can be checked.
        return match["host"] in (None, _host()) and not _is_running(int(match["pid"]))
    try:
        # If the lock can be taken, the process that held it has ended.
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _lock(handle) is True
    finally:
        os.close(handle)


def _host() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname())[:64]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's process
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()

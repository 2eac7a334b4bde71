"""Work folder: stores the arrays and the progress of a long pass, so that a killed run can resume."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tide_jax.errors import TideError

JOURNAL, _NEW_JOURNAL = "journal.json", "journal.json.new"
_FORMAT = 2
_JOURNAL_SECONDS = 10.0  # between journal entries: a kill loses at most this much work


class WorkFolder:
    """Memory maps and a journal of finished batches.

    The journal records the identity of the pass: everything its result depends on. A batch counts as finished only
    after its rows are on disk. Storing a batch again writes the same values to the same places, so a run may be killed
    at any time. The journal keeps a checksum of every finished batch, and a resumed run checks the maps against them.
    Disk space for a map is allocated before writing to it: writing to a map on a full disk would kill the process.

    Args:
      path: an empty or missing folder, or the folder of an earlier run. Its parent must exist.
      identity: everything the result depends on, JSON-ready; error messages use its names.

    Raises:
      TideError: the folder belongs to another identity, holds other files, is damaged, or can't be written.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any]) -> None:
        self._path = Path(path).expanduser()
        self._identity = identity
        self._arrays: list[np.memmap] = []
        self._last_write = time.monotonic()
        # A folder without a journal must be empty; a journal must match the identity.
        try:
            self._path.mkdir(exist_ok=True)
            names = {entry.name for entry in self._path.iterdir()} - {_NEW_JOURNAL}
        except OSError as error:
            raise TideError(
                f"can't write work_dir {path}: {error.strerror or error}; pass a folder in an existing, writable one"
            ) from error
        if names and JOURNAL not in names:
            raise TideError(f"work_dir {path} holds other files and no {JOURNAL}; pass an empty or missing folder")
        self._checksums = self._read_journal() if names else list[int]()
        self._finished = len(self._checksums)
        if not names:
            self._write_journal()

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Memory map of this name: the earlier run's, or a new one if no batch is finished."""
        file = self._path / f"{name}.npy"
        if 0 in shape:
            return np.empty(shape, dtype)
        if self._finished:
            memory_map = self._open_map(file)
            if memory_map.shape != shape or memory_map.dtype != dtype:
                raise self._damage_error(file.name)
            self._allocate_blocks(file)
        else:
            memory_map = self._make_map(file, shape, np.dtype(dtype))
        self._arrays.append(memory_map)
        return memory_map.view(np.ndarray)

    def count_finished(self, total: int, checksum: Callable[[int], int]) -> int:
        """Number of finished batches, of `total`, that need not run again.

        Args:
          total: number of batches of the pass.
          checksum: computes the checksum of a batch's content in the arrays.

        Raises:
          TideError: a checksum differs from the journal's.
        """
        if self._finished > total:
            raise self._damage_error(JOURNAL)
        for number, stored in enumerate(self._checksums):
            if checksum(number) != stored:
                raise TideError(
                    f"work_dir {self._path}: batch {number} differs from what was stored: the files were damaged or "
                    "changed; delete the folder to start over"
                )
        return self._finished

    def record_batch(self, checksum: int, total: int) -> None:
        """Records that the next of `total` batches is stored; the journal is written every few seconds, and at the end.

        Raises:
          TideError: the folder can't be written.
        """
        self._checksums.append(checksum)
        if len(self._checksums) == total or time.monotonic() - self._last_write >= _JOURNAL_SECONDS:
            # Rows first, then the journal that says they are on disk.
            try:
                for array in self._arrays:
                    array.flush()
            except OSError as error:
                raise self._write_error(error) from error
            self._write_journal()
            self._last_write = time.monotonic()

    def _open_map(self, file: Path) -> np.memmap:
        try:
            np.lib.format.open_memmap(file, mode="r")  # unlike "r+", this does not extend a truncated file
            return np.lib.format.open_memmap(file, mode="r+")
        except (OSError, ValueError) as error:
            raise self._damage_error(file.name) from error

    def _make_map(self, file: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
        self._check_space(int(np.prod(shape)) * dtype.itemsize)
        try:
            memory_map = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
        except OSError as error:
            raise self._write_error(error) from error
        # Without room on the disk, no half-made file stays behind.
        try:
            self._allocate_blocks(file)
        except TideError:
            file.unlink()
            raise
        return memory_map

    def _allocate_blocks(self, file: Path) -> None:
        """Allocates all disk blocks of a file; its content stays."""
        try:
            with file.open("r+b") as opened:
                size = os.fstat(opened.fileno()).st_size
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(opened.fileno(), 0, size)
        except OSError as error:
            raise self._write_error(error) from error

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self._path).free
        if needed > free:
            raise TideError(
                f"work_dir {self._path} needs {needed / 1e6:.0f} MB more, but only {free / 1e6:.0f} MB are free; "
                "free some space or lower reservoir_bytes"
            )

    def _write_error(self, error: OSError) -> TideError:
        return TideError(
            f"can't write work_dir {self._path} ({error.strerror or error}); free some space or lower reservoir_bytes"
        )

    def _read_journal(self) -> list[int]:
        """Reads the checksums of finished batches from the journal, and checks its identity."""
        try:
            journal = json.loads((self._path / JOURNAL).read_text(encoding="utf-8"))
            identity, checksums, is_current = journal["identity"], journal["checksums"], journal["format"] == _FORMAT
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damage_error(JOURNAL) from error
        if not is_current or not isinstance(identity, dict) or not isinstance(checksums, list):
            raise self._damage_error(JOURNAL)
        if not all(type(checksum) is int for checksum in checksums) or journal.get("done") != len(checksums):
            raise self._damage_error(JOURNAL)
        for name, value in self._identity.items():
            if identity.get(name) != value:
                raise TideError(
                    f"work_dir {self._path} was started with another {name} ({identity.get(name)}, now {value}); "
                    "pass another folder, or delete this one to start over"
                )
        return checksums

    def _write_journal(self) -> None:
        journal = {"format": _FORMAT, "identity": self._identity, "done": len(self._checksums)}
        text = json.dumps(journal | {"checksums": self._checksums}, indent=2)
        try:
            with open(self._path / _NEW_JOURNAL, "w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(self._path / _NEW_JOURNAL, self._path / JOURNAL)
        except OSError as error:
            raise TideError(f"can't write {self._path / JOURNAL}: {error.strerror or error}") from error

    def _damage_error(self, name: str) -> TideError:
        return TideError(f"work_dir {self._path}: {name} is missing or damaged; delete the folder to start over")

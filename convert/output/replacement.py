"""Replaces a directory completely or not at all; the old content stays until the new one is complete.

A new directory is written beside its place and renamed. An existing directory may be a mount point or somebody's
working directory, which no rename can replace, and it may hold the user's own files. So the new content goes into a
folder inside it, and one rename declares that folder to be the model (`tide_jax.model.files.model_directory`): a
process killed before the rename leaves the old model, one killed after it leaves the new one. Then the files are linked
to their final places, and files of the old model that the new one lacks are removed. If this is interrupted, the folder
stays complete until all files are in place, and the next run finishes the work.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tide_jax.errors import TideError
from tide_jax.json_files import read_json
from tide_jax.model.files.model_directory import COMMITTED, is_inside
from tide_jax.model.files.shards import INDEX_FILE, SINGLE_FILE
from tide_jax.temporaries import discard, is_temporary, lock_folder, temporary_folder

_CONFIG = "config.json"
_STALE, _LINK = ".stale.json", ".link"  # in a committed folder: files to remove; temporary name of a new link
_WORK = "tide_jax"  # folder inside an existing directory that receives its new content
_FILES_OF_EARLIER_VERSIONS = (
    *(_CONFIG, "generation_config.json", SINGLE_FILE, INDEX_FILE),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)


@contextlib.contextmanager
def replace_directory(destination: Path, size: int, check: Callable[[], None], record: str) -> Iterator[Path]:
    """Yields a folder whose files move to `destination` on success; the folder is removed on any failure.

    Args:
      destination: target directory; a link is followed.
      size: bytes that will be written.
      check: raises if `destination` must not be replaced. It runs again at the end, because another run may have
        created the directory meanwhile.
      record: name of the JSON file in which a run lists its files under "files". Only files listed in the record in
        `destination` are replaced or removed.

    Raises:
      TideError: the directory cannot be written, or a file that no record lists is in the way.
    """
    place = Path(os.path.realpath(destination))
    try:
        with _staging_folder(place) as partial:
            if (free := shutil.disk_usage(partial).free) < size:
                raise OSError(errno.ENOSPC, f"{size} bytes needed, {free} free")
            yield partial
            check()
            _commit(partial, place, record)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise TideError(f"no space left for {destination} ({error.strerror}): free some space") from error
        raise TideError(
            f"{destination} cannot be written ({error.strerror or error}): choose another destination"
        ) from error


def is_free(directory: Path) -> bool:
    """Whether a directory holds only remains of killed runs and entries of the file system."""
    return all(is_temporary(path.name) or path.name == "lost+found" for path in directory.iterdir())


def files_of(directory: Path) -> list[str]:
    """Sorted names of the files in a directory and its folders."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def check_no_foreign_files(partial: Path, destination: Path, record: str) -> None:
    """Raises TideError if a file of `partial` would replace a file in `destination` that no run wrote."""
    existing = [name for name in files_of(partial) if os.path.lexists(destination / name)]
    if foreign := sorted(set(existing) - _files_of_earlier_runs(destination, record)):
        raise TideError(
            f"{destination} holds {foreign[0]}, which no conversion wrote and this one would replace: move it away, or "
            "choose another destination"
        )


@contextlib.contextmanager
def _staging_folder(place: Path) -> Iterator[Path]:
    """Yields a new folder on the same disk as `place`."""
    if place.is_dir():
        with lock_folder(place):
            _finish_commit(place)
        with temporary_folder(place, _WORK) as partial:
            yield partial
        return
    missing = [path for path in (place.parent, *place.parent.parents) if not path.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_folder(place.parent, place.name) as partial:
            yield partial
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def _commit(partial: Path, place: Path, record: str) -> None:
    """Moves a complete folder into place."""
    # Flush all data first: the rename must never reach the disk before the files do.
    for name in files_of(partial):
        _sync(partial / name)
    _sync(partial)
    if not place.exists():
        try:
            partial.rename(place)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another run created it meanwhile
                raise
    # The directory exists: commit with one rename inside it, then move the files out.
    with lock_folder(place):
        _finish_commit(place)
        check_no_foreign_files(partial, place, record)
        stale = _files_of_earlier_runs(place, record) - set(files_of(partial))
        (partial / _STALE).write_text(json.dumps(sorted(stale)), encoding="utf-8")
        partial.rename(place / COMMITTED)
        _sync(place)
        _finish_commit(place)


def _finish_commit(place: Path) -> None:
    """Moves the files of a committed folder to their places. May be interrupted anywhere and called again."""
    folder = place / COMMITTED
    if not folder.is_dir():
        return
    # Programs that don't know the folder find no configuration, rather than a mix of two models.
    (place / _CONFIG).unlink(missing_ok=True)
    (folder / _LINK).unlink(missing_ok=True)
    names = [name for name in files_of(folder) if name != _STALE]
    # config.json comes last: with it, the directory is a model again.
    for name in sorted(names, key=lambda name: name == _CONFIG):
        if name == _CONFIG:
            _remove_stale(place, folder)
        _link_or_copy(folder / name, place / name, folder / _LINK)
    _sync(place)
    discard(folder, _WORK)


def _link_or_copy(source: Path, target: Path, link: Path) -> None:
    """Makes `target` a link to `source` in one step, or a copy if the file system has no links."""
    if target.exists() and target.samefile(source):  # renaming one link of a file onto another does nothing
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, link)
    except OSError:
        shutil.copyfile(source, link)
        _sync(link)
    os.replace(link, target)


def _remove_stale(place: Path, folder: Path) -> None:
    try:
        stale = json.loads((folder / _STALE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stale = []
    for path in (place / name for name in stale):
        if path.is_file() or path.is_symlink():
            path.unlink()
        if path.parent != place:
            with contextlib.suppress(OSError):  # not empty
                path.parent.rmdir()


def _files_of_earlier_runs(directory: Path, record: str) -> set[str]:
    """Names of the files that earlier runs wrote into a directory."""
    try:
        values = read_json(directory / record)
    except TideError:
        values = {}
    listed, shards = values.get("files"), values.get("shards")
    if not isinstance(listed, list):
        listed = [record, *_FILES_OF_EARLIER_VERSIONS, *(shards if isinstance(shards, list) else [])]
    return {name for name in listed if isinstance(name, str) and is_inside(name)}


def _sync(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems can't sync a folder
            raise
    finally:
        os.close(handle)

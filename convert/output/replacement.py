"""A directory that appears complete or not at all, and spares what it replaces until it is there.

A new directory is written beside its place and renamed. A directory that exists may be a mount point or the folder
somebody works in, which no rename can replace, and may hold files of its user's. So its new content is written into a
folder within it, and one rename declares that folder to be the model (`tide_jax.model.files.model_directory`): a
process that is killed before leaves the old model, one that is killed after leaves the new one. Then the files are
linked to where they belong, and those of the old model that the new one has not are removed. Whatever cuts this short,
the folder stays complete until all files are in place, and the next run finishes the work.
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
from tide_jax.temporaries import discard, is_temporary, locked, temporary_folder

_CONFIG = "config.json"
_STALE, _LINK = ".stale.json", ".link"  # in a committed folder: what is to be removed, and a file on its way
_WORK = "tide_jax"  # name of the folder in which an existing directory's new content is written
_EARLIER_VERSIONS_WROTE = (
    *(_CONFIG, "generation_config.json", SINGLE_FILE, INDEX_FILE),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)


@contextlib.contextmanager
def replacing(destination: Path, size: int, check: Callable[[], None], record: str) -> Iterator[Path]:
    """A directory whose files take their place in `destination` on success; it is removed on any failure.

    Args:
      destination: where to; a link is followed.
      size: bytes that will be written.
      check: raises if `destination` may not be replaced; asked again at the end, when another run may have made it.
      record: name of the JSON file in which a run lists under "files" what it wrote. Of what `destination` holds, only
        the files that its own record lists are replaced or removed.

    Raises:
      TideError: the directory cannot be written, or a file that no record lists is in the way.
    """
    place = Path(os.path.realpath(destination))
    try:
        with _staged(place) as partial:
            if (free := shutil.disk_usage(partial).free) < size:
                raise OSError(errno.ENOSPC, f"{size} bytes needed, {free} free")
            yield partial
            check()
            _commit(partial, place, record)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise TideError(f"no space left for {destination} ({error.strerror}): free some") from error
        raise TideError(f"{destination} cannot be written ({error.strerror or error}): choose another") from error


def is_free(directory: Path) -> bool:
    """Whether a directory holds nothing but what killed runs left and what a file system puts there."""
    return all(is_temporary(path.name) or path.name == "lost+found" for path in directory.iterdir())


def files_of(directory: Path) -> list[str]:
    """Names of the files in a directory and its folders, sorted."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def check_spared(partial: Path, destination: Path, record: str) -> None:
    """Raises TideError where a file of `partial` would replace one in `destination` that no run wrote."""
    in_the_way = [name for name in files_of(partial) if os.path.lexists(destination / name)]
    if foreign := sorted(set(in_the_way) - _written(destination, record)):
        raise TideError(
            f"{destination} holds {foreign[0]}, which no conversion wrote and this one would replace: move it away, or "
            "choose another destination"
        )


@contextlib.contextmanager
def _staged(place: Path) -> Iterator[Path]:
    """A new folder on the same disk as `place`."""
    if place.is_dir():
        with locked(place):
            _finish(place)
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
            with contextlib.suppress(OSError):  # where it is not empty
                path.rmdir()


def _commit(partial: Path, place: Path, record: str) -> None:
    """Puts a complete folder in place."""
    for name in files_of(partial):
        _sync(partial / name)
    _sync(partial)
    if not place.exists():
        try:
            partial.rename(place)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another run made it
                raise
    with locked(place):
        _finish(place)
        check_spared(partial, place, record)
        stale = _written(place, record) - set(files_of(partial))
        (partial / _STALE).write_text(json.dumps(sorted(stale)), encoding="utf-8")
        partial.rename(place / COMMITTED)
        _sync(place)
        _finish(place)


def _finish(place: Path) -> None:
    """Moves the files of a committed folder to where they belong. May be cut short anywhere and called again."""
    folder = place / COMMITTED
    if not folder.is_dir():
        return
    # Programs that know nothing of the folder find no configuration rather than a mix of two models.
    (place / _CONFIG).unlink(missing_ok=True)
    (folder / _LINK).unlink(missing_ok=True)
    names = [name for name in files_of(folder) if name != _STALE]
    for name in sorted(names, key=lambda name: name == _CONFIG):
        if name == _CONFIG:
            _remove_stale(place, folder)
        _put(folder / name, place / name, folder / _LINK)
    _sync(place)
    discard(folder, _WORK)


def _put(source: Path, target: Path, link: Path) -> None:
    """Makes `target` the same file as `source`, or a copy where the file system has no links, in one step."""
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
            with contextlib.suppress(OSError):  # where it is not empty
                path.parent.rmdir()


def _written(directory: Path, record: str) -> set[str]:
    """The files that earlier runs wrote into a directory."""
    try:
        values = read_json(directory / record)
    except TideError:
        values = {}
    listed, shards = values.get("files"), values.get("shards")
    if not isinstance(listed, list):
        listed = [record, *_EARLIER_VERSIONS_WROTE, *(shards if isinstance(shards, list) else [])]
    return {name for name in listed if isinstance(name, str) and is_inside(name)}


def _sync(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems have nothing to wait for
            raise
    finally:
        os.close(handle)

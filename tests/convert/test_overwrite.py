"""A model that takes the place of another: what is spared, where it can be, and what a kill at any moment leaves."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killed_runs import ALWAYS, Killer, killer, write_text_model
from safetensors.numpy import load_file
from tiny_llama import random_tensors, refusal, save

import tide_jax
from convert import convert, export
from convert.output.replacement import files_of
from tide_jax.model.decoder import parameters
from tide_jax.model.files.model_directory import COMMITTED, model_directory
from tide_jax.temporaries import is_temporary

EXAMPLES = int(os.environ.get("TIDE_EXAMPLES", "3"))
SOURCES = {"old": 1.0, "new": 2.0}  # what the weights are multiplied with
OPTIONS: dict[str, dict[str, Any]] = {"old": {"max_shard_bytes": 3000}, "new": {}}


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """Two checkpoints of one shape, whose weights and tokenizers differ."""
    return {name: _source(tmp_path / name, name) for name in SOURCES}


def _source(path: Path, name: str) -> Path:
    save(path, {key: SOURCES[name] * value for key, value in random_tensors().items()})
    (path / "tokenizer_config.json").write_text(json.dumps({"made_for": name}))
    if name == "old":
        (path / "special_tokens_map.json").write_text("{}")
    return path


def found(directory: Path) -> str:
    """Which model a directory holds, all of it."""
    embedding = np.asarray(parameters(tide_jax.load(directory))["embed.kernel"])
    expected = random_tensors()["model.embed_tokens.weight"]
    (name,) = (name for name, factor in SOURCES.items() if np.array_equal(embedding, factor * expected))
    folder = model_directory(directory)
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"made_for": name}
    assert str(json.loads((folder / "conversion.json").read_text())["source"]).endswith(name)
    return name


def mine(directory: Path) -> dict[str, bytes]:
    """Adds files as a user does; returns what they hold."""
    (directory / "mine").mkdir()
    for name in ("routers.safetensors", "notes.txt", "mine/model.safetensors", "model-00007-of-00009.safetensors"):
        (directory / name).write_bytes(name.encode())
    return {name: (directory / name).read_bytes() for name in files_of(directory) if _is_mine(directory, name)}


def _is_mine(directory: Path, name: str) -> bool:
    return (directory / name).read_bytes() == name.encode()


def check_only(directory: Path, name: str, kept: dict[str, bytes]) -> None:
    """The model of that name is there, with a user's files, and nothing else."""
    assert found(directory) == name
    record = json.loads((directory / "conversion.json").read_text())
    assert files_of(directory) == sorted([*record["files"], *kept])
    assert all((directory / file).read_bytes() == content for file, content in kept.items())


# ------------------------------------------------------------------------------------------------------- what is spared


def test_only_what_a_conversion_wrote_is_replaced(sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(sources["old"], out, max_shard_bytes=3000)
    kept = mine(out)
    assert len(kept) == 4
    convert(sources["new"], out, overwrite=True)
    check_only(out, "new", kept)
    convert(sources["old"], out, overwrite=True, max_shard_bytes=3000)
    check_only(out, "old", kept)


def test_a_conversion_without_a_list_of_its_files(sources: dict[str, Path], tmp_path: Path) -> None:
    """Earlier versions recorded the weight files alone."""
    out = tmp_path / "out"
    convert(sources["old"], out, max_shard_bytes=3000)
    record = json.loads((out / "conversion.json").read_text())
    del record["files"]
    (out / "conversion.json").write_text(json.dumps(record))
    kept = mine(out)
    convert(sources["new"], out, overwrite=True)
    check_only(out, "new", kept)


@pytest.mark.parametrize("listed", [["../notes.txt", "/etc/hostname", 3, "mine", "", "\0"], "notes.txt"])
def test_a_record_names_nothing_outside(listed: Any, sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(sources["old"], out)
    (tmp_path / "notes.txt").write_text("years of work")
    kept = mine(out)
    record = json.loads((out / "conversion.json").read_text())
    record["files"] = [*record["files"], *listed] if isinstance(listed, list) else listed
    (out / "conversion.json").write_text(json.dumps(record))
    convert(sources["new"], out, overwrite=True)
    check_only(out, "new", kept)
    assert (tmp_path / "notes.txt").read_text() == "years of work"


def test_a_users_file_in_the_way_is_refused_before_the_work(sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(sources["new"], out)
    (out / "special_tokens_map.json").write_text("mine")

    def never(done: int, total: int) -> None:
        raise AssertionError("no weight is read")

    message = refusal(sources["old"], overwrite=True, progress=never)
    assert "holds special_tokens_map.json, which no conversion wrote" in message
    assert found(out) == "new"
    assert (out / "special_tokens_map.json").read_text() == "mine"
    assert not any(is_temporary(path.name) for path in out.iterdir())


def test_exports_spare_other_files_too(sources: dict[str, Path], tmp_path: Path) -> None:
    for name, source in sources.items():
        convert(source, tmp_path / f"converted-{name}")
    out = tmp_path / "out"
    export(tmp_path / "converted-old", out, max_shard_bytes=3000)
    kept = mine(out)
    export(tmp_path / "converted-new", out, overwrite=True)
    assert files_of(out) == sorted([*json.loads((out / "export.json").read_text())["files"], *kept])
    assert all((out / file).read_bytes() == content for file, content in kept.items())
    embedding = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(embedding, 2 * random_tensors()["model.embed_tokens.weight"])


# ------------------------------------------------------------------------------------------------------------ where to


def test_through_a_link(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "link"
    link.symlink_to("disk/out", target_is_directory=True)
    for name in ("old", "new", "old"):
        convert(sources[name], link, overwrite=True)
        assert link.is_symlink()
        assert found(link) == found(tmp_path / "disk" / "out") == name
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "new", "old"]


def test_into_the_working_directory(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = os.stat(".").st_ino
    for name in ("old", "new"):
        convert(sources[name], ".", overwrite=True)
        assert found(tmp_path / "here") == found(Path()) == name
    assert os.stat(".").st_ino == before


def test_onto_a_mount_point(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can neither be renamed nor replaced, and what is beside it is another disk."""
    mount = tmp_path / "mount"
    (mount / "lost+found").mkdir(parents=True)

    def disk(path: Any) -> Path:
        return mount if mount in Path(path).parents else tmp_path

    def guarded(move: Any) -> Any:
        def moved(source: Any, target: Any) -> None:
            if Path(source) == mount or Path(target) == mount:
                raise OSError(errno.EBUSY, "Device or resource busy")
            if disk(source) != disk(target):
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            move(source, target)

        return moved

    for name in ("rename", "replace", "link"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    for name in ("old", "new", "old"):
        convert(sources[name], mount, overwrite=True)
        assert found(mount) == name
    assert not any(is_temporary(path.name) for path in mount.iterdir())


def test_free_space_is_checked_at_the_destination(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    asked = []

    def usage(path: Path) -> Any:
        asked.append(path)
        return type("Usage", (), {"free": 10**9})

    monkeypatch.setattr("shutil.disk_usage", usage)
    convert(sources["old"], tmp_path / "link")
    assert all(tmp_path / "disk" / "out" in path.parents for path in asked)
    assert asked


def test_file_systems_without_links_or_locks(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", unsupported)
    monkeypatch.setattr("fcntl.flock", unsupported)
    for name in ("old", "new", "old"):
        convert(sources[name], tmp_path / "out", overwrite=True, **OPTIONS[name])
    check_only(tmp_path / "out", "old", {})


def test_parents_of_a_failed_conversion_are_removed(sources: dict[str, Path], tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert (tmp_path / "a" / "b").is_dir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(sources["old"], tmp_path / "a" / "b" / "out", progress=interrupt)
    assert not (tmp_path / "a").exists()


# --------------------------------------------------------------------------------------------------------- other runs

_HOLDS = """
import fcntl, os, sys
handle = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("exists", [False, True])
def test_a_lock_shows_whether_a_run_is_alive(exists: bool, sources: dict[str, Path], tmp_path: Path) -> None:
    """Two containers have the same process ids: the one in a folder's name says nothing."""
    out, name = tmp_path / "out", "out"
    parent = tmp_path
    if exists:
        convert(sources["old"], out)
        parent, name = out, "tide_jax"
    live, dead = parent / f".{name}.999999999-0a1b-lock.partial", parent / f".{name}.{os.getppid()}-0a1b-lock.partial"
    elsewhere = parent / f".{name}.999999999-0a1b@some-other-host.partial"
    for folder in (live, dead, elsewhere):
        folder.mkdir()
    command = [sys.executable, "-c", _HOLDS, str(live)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        convert(sources["new"], out, overwrite=True)
        assert [live.exists(), dead.exists(), elsewhere.exists()] == [True, False, True]
        holder.communicate()
    convert(sources["old"], out, overwrite=True)
    if exists:
        assert [live.exists(), elsewhere.exists()] == [False, True]
    assert found(out) == "old"


def test_the_later_of_two_concurrent_runs_stays_complete(sources: dict[str, Path], tmp_path: Path) -> None:
    out, started = tmp_path / "out", list[str]()
    convert(sources["new"], out)

    def convert_again(done: int, total: int) -> None:
        if not started:
            started.append("new")
            convert(sources["new"], out, overwrite=True)
            assert found(out) == "new"

    convert(sources["old"], out, overwrite=True, progress=convert_again, max_shard_bytes=3000)
    check_only(out, "old", {})


def test_a_model_that_is_replaced_while_it_is_read(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    convert(sources["old"], out)
    config = tide_jax.model.files.checkpoint.DecoderConfig.from_dict

    def slowly(values: dict[str, Any]) -> Any:
        convert(sources["new"], out, overwrite=True)
        return config(values)

    monkeypatch.setattr(tide_jax.model.files.checkpoint.DecoderConfig, "from_dict", slowly)
    with pytest.raises(tide_jax.TideError, match="was replaced while it was read: load it again"):
        tide_jax.load(out)


# --------------------------------------------------------------------------------------------------------------- kills


@pytest.fixture(scope="module")
def run() -> Iterator[Killer]:
    """Conversions in a process of their own, which can be killed."""
    with killer() as process:
        yield process


def found_text(directory: Path) -> str | None:
    """Which text model a directory holds, all of it; None where it has no config.json."""
    if not (directory / "config.json").exists():
        return None
    record = json.loads((directory / "conversion.json").read_text())
    for file in record["files"][:-1]:
        assert (directory / file).read_text() == f"{record['name']} {file}"
    return str(record["name"])


@pytest.mark.slow
def test_killed_before_any_change_to_a_file(run: Killer, tmp_path: Path) -> None:
    """At every point there is the old model or the new one, with the user's files. Programs that do not know of folders
    on their way find one of the two or none, and never a mix. The next run leaves no trace."""
    for names in (("old", "new"), ("new", "old")):
        outcomes, code = list[str | None](), 1
        while code:
            out = tmp_path / f"{names[0]}-{len(outcomes)}"
            write_text_model(names[0], out)
            kept = mine(out)
            code = run(names[1], out, kill=len(outcomes))
            assert found_text(out) in (*names, None)
            outcomes.append(found_text(model_directory(out)))
            assert all((out / file).read_bytes() == content for file, content in kept.items())
            assert run(names[1], out) == 0
            assert found_text(out) == names[1]
            record = json.loads((out / "conversion.json").read_text())
            assert files_of(out) == sorted([*record["files"], *kept])
        assert len(outcomes) > 30
        switch = outcomes.index(names[1])
        assert outcomes == [names[0]] * switch + [names[1]] * (len(outcomes) - switch)
        assert 5 < switch < len(outcomes) - 5


def test_a_first_run_killed_before_any_change_to_a_file(run: Killer, tmp_path: Path) -> None:
    code, step = 1, 0
    while code:
        out = tmp_path / f"{step}" / "out"
        code, step = run("new", out, kill=step), step + 1
        assert not out.exists() or found_text(out) == "new"
        assert run("new", out) == 0
        assert found_text(out) == "new"
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert step > 8


@pytest.mark.slow
def test_killed_at_any_time(run: Killer, sources: dict[str, Path], tmp_path: Path) -> None:
    """As many times as TIDE_EXAMPLES says."""
    random, out, last = np.random.default_rng(0), tmp_path / "out", "old"
    convert(sources["old"], out, **OPTIONS["old"])
    kept = mine(out)
    for _ in range(EXAMPLES):
        name = str(random.choice(list(SOURCES)))
        run(sources[name], out, kill=float(random.uniform(0.0, 0.2)), **OPTIONS[name])
        now = found(out)
        assert now in (last, name)
        assert all((out / file).read_bytes() == content for file, content in kept.items())
        last = now
    assert run(sources["new"], out, kill=ALWAYS) == 0
    check_only(out, "new", kept)
    assert not (out / COMMITTED).exists()

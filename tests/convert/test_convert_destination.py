"""Where a conversion goes: what it spares, what it leaves behind, two at once."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_llama
from tiny_llama import refusal

from convert import convert
from convert.output.writer import ShardWriter
from tide_jax.errors import TideError


def test_destination_exists(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert "exists and is not empty" in refusal(source)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    convert(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns != before


def test_overwrite_spares_directories_that_are_no_conversion(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "does not hold a converted model" in refusal(source, overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_converted_models_are_not_converted_again(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "once")
    assert "is already a converted model" in refusal(tmp_path / "once")


def test_unwritable_destination(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(source, destination=tmp_path / "file" / "out")
    assert "is a file" in refusal(source, destination=tmp_path / "file")


def test_disk_full(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
        assert "no space left" in refusal(source)

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", fail)
    assert "no space left" in refusal(source)


def test_interrupted_conversion_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert list(tmp_path.glob(f".out.{os.getpid()}-*.partial"))
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def dead_pid() -> int:
    """The id of a process that has ended."""
    return int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True).stdout)


def test_leftovers_of_killed_runs_are_removed_and_those_of_live_ones_stay(source: Path, tmp_path: Path) -> None:
    dead, alive = tmp_path / f".out.{dead_pid()}-0a1b.partial", tmp_path / f".out.{os.getppid()}-0a1b.partial"
    other = tmp_path / f".outer.{dead_pid()}-0a1b.partial"
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "model-00007-of-00009.safetensors").write_text("half")
    convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([alive.name, other.name, "out", "source"])
    assert not (tmp_path / "out" / "model-00007-of-00009.safetensors").exists()


def test_the_first_of_two_concurrent_conversions_stays(source: Path, tmp_path: Path) -> None:
    started: list[Path] = []

    def convert_again(done: int, total: int) -> None:
        if not started:
            started.append(tmp_path / "out")
            convert(source, tmp_path / "out", dtype="bfloat16")

    with pytest.raises(TideError, match="exists and is not empty"):
        convert(source, tmp_path / "out", progress=convert_again)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tide_jax"]["dtype"] == "bfloat16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_failed_swap_puts_the_old_directory_back(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "out")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    assert "cannot be written (Permission denied)" in refusal(source, overwrite=True, dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tide_jax"]["dtype"] == "float32"


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "out", dry_run=True)
    assert (
        report.bytes
        == 4 * report.parameters
        == 4 * sum(np.prod(s) for s in tiny_llama.shapes(tiny_llama.CONFIG).values())
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_progress_reaches_the_total(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    convert(source, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1]
    assert calls == sorted(calls)

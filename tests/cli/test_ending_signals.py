"""SIGTERM and SIGHUP: what was under way is cleaned up, and the exit code is the signal's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import tide_jax
from convert import convert
from tide_jax.cli.ending_signals import run_with_signals

_SLOW = """
import sys, time
from convert.__main__ import main
from convert.output.writer import ShardWriter

def write(*_):
    print("writing", flush=True)
    while True:
        time.sleep(0.05)

ShardWriter.write = write
raise SystemExit(main())
"""


@pytest.mark.parametrize("exists, name", [(False, "SIGHUP"), (True, "SIGTERM")])
@pytest.mark.slow
def test_a_conversion_leaves_nothing_half_written(exists: bool, name: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if exists:
        convert(source, out)
    before = sorted(path for path in tmp_path.rglob("*"))
    command = [sys.executable, "-c", _SLOW, str(source), str(out), "--overwrite"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        assert sorted(path for path in tmp_path.rglob("*")) != before
        process.send_signal(getattr(signal, name))
        _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (128 + getattr(signal, name), f"ended by {name}\n")
    assert sorted(path for path in tmp_path.rglob("*")) == before
    if exists:
        tide_jax.load(out)


def test_signals_that_are_ignored_stay_ignored() -> None:
    """As under nohup. Handlers are what they were afterwards."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:

        def hang_up() -> int:
            os.kill(os.getpid(), signal.SIGHUP)
            return 7

        assert run_with_signals(hang_up, as_program=False) == 7
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("raised", [ImportError, ValueError, None])
def test_a_signal_that_a_library_makes_something_else_of(
    raised: type[Exception] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned = []

    def run() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            cleaned.append(True)
            if raised is not None:
                raise raised("while importing") from None
            raise
        return 0

    assert run_with_signals(run, as_program=False) == 143
    assert capsys.readouterr().err == "ended by SIGTERM\n"
    assert cleaned == [True]


def test_other_errors_and_threads_are_left_alone() -> None:
    def fail() -> int:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run_with_signals(fail, as_program=False)
    codes = list[int]()
    thread = threading.Thread(target=lambda: codes.append(run_with_signals(lambda: 3, as_program=False)))
    thread.start()
    thread.join()
    assert codes == [3]

"""Ctrl-C: one line and exit code 130, while modules are imported, while a program is compiled, and where it is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import convert
import tide_jax

pytestmark = pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="the signal is ignored here, and children inherit that"
)
ROOT = Path(__file__).resolve().parents[2]
CONSOLE_SCRIPT = "import sys\nfrom tide_jax.cli.main import main\nif __name__ == '__main__':\n    sys.exit(main())\n"
FAKE_JAX = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except BaseException as error:
    if {drops!r} == "converts":
        raise ImportError("Encountered an error while initializing the extension.") from error
"""
COMMANDS: dict[str, list[str]] = {
    "convert": ["-m", "convert", "SOURCE", "OUT"],
    "tide-jax convert": ["-c", CONSOLE_SCRIPT, "convert", "SOURCE", "OUT"],
    "tide-jax export": ["-c", CONSOLE_SCRIPT, "export", "SOURCE", "OUT"],
    "tide-jax generate": ["-c", CONSOLE_SCRIPT, "generate", "SOURCE", "--prompt", "a"],
    "tide-jax calibrate": ["-c", CONSOLE_SCRIPT, "calibrate", "SOURCE", "--text", "a.txt", "--output", "OUT"],
    "tide-jax inspect": ["-m", "tide_jax.cli", "inspect", "SOURCE"],
}
WORKING = """
import gc, os, signal, sys, threading, time
from tide_jax.cli.command_line import Parser, execute
from tide_jax.cli.interrupts import Interrupts

def interrupt(): os.kill(os.getpid(), signal.SIGINT)

class Dropped:
    def __del__(self):
        interrupt()
        time.sleep(60)

def destructor(args):
    Dropped()
    time.sleep(60)

def converted(args):
    try:
        interrupt()
        time.sleep(60)
    except KeyboardInterrupt as error:
        raise ImportError("an extension module says this") from error

def refused(args):
    from tide_jax.errors import TideError
    try:
        interrupt()
        time.sleep(60)
    except KeyboardInterrupt as error:
        raise TideError("a package is missing") from error

def cleaning(args):
    try:
        interrupt()
        time.sleep(60)
    finally:
        interrupt()  # a key that bounces
        time.sleep(0.1)
        print("cleaned")

def compiling(args):
    import jax, jax.numpy as jnp
    def program(x):
        for i in range(150):
            x = jnp.sin(x @ x + i) / (1 + jnp.sum(jnp.exp(x[: i % 7 + 1])))
        return x
    lowered = jax.jit(program).lower(jnp.ones((40, 40)))
    threading.Timer(0.3, interrupt).start()
    for _ in range(100):
        lowered.compile()
    return 0

def done(args):
    import atexit
    atexit.register(lambda: (interrupt(), time.sleep(60)))
    return 0

def parser():
    made = Parser()
    made.set_defaults(run=globals()[sys.argv.pop()])
    return made

Interrupts.install()
raise SystemExit(execute(parser, None))
"""


def run(arguments: list[str], *paths: Path) -> tuple[int, str, str]:
    """Exit code, output and errors of Python, with `paths` before the project's own."""
    places = os.pathsep.join(map(str, (*paths, ROOT)))
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": places},
        timeout=100,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("drops", ["converts", "drops"])
@pytest.mark.parametrize("command", COMMANDS)
def test_while_modules_are_imported(command: str, drops: str, source: Path, tmp_path: Path) -> None:
    """Extension modules make ImportError of KeyboardInterrupt, or drop it."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    (fakes / "jax.py").write_text(FAKE_JAX.format(drops=drops))
    places = {"SOURCE": str(source), "OUT": str(tmp_path / "out")}
    assert run([places.get(a, a) for a in COMMANDS[command]], fakes) == (130, "", "interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["destructor", "converted", "refused", "compiling", "done"])
def test_while_work_goes_on(how: str) -> None:
    assert run(["-c", WORKING, how]) == (130, "", "interrupted\n")


def test_what_is_cleaned_up_is_not_disturbed() -> None:
    assert run(["-c", WORKING, "cleaning"]) == (130, "cleaned\n", "interrupted\n")


def test_commands_start_without_slow_imports() -> None:
    """Until a command knows what it is to do, nothing is imported during which Ctrl-C would have to wait."""
    slow = "{'jax', 'numpy', 'transformers'}"
    script = f"import sys, tide_jax.cli.main, convert.__main__; print(sorted({slow} & {{*sys.modules}}))"
    assert run(["-c", script]) == (0, "[]\n", "")


@pytest.mark.parametrize("package", [tide_jax, convert])
def test_public_names_are_there_when_asked_for(package: object) -> None:
    names = package.__all__  # type: ignore[attr-defined]
    assert set(names) == set(package._HOMES)  # type: ignore[attr-defined]
    assert all(getattr(package, name).__name__ == name for name in names)
    assert set(names) <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        package.magic  # type: ignore[attr-defined]  # noqa: B018

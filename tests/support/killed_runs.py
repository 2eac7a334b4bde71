"""Runs that are killed: a process that forks one for each line it reads, and ends it where the line says.

A line holds, between tabs: how many changes to files the run lives for (or "after" and seconds), the keyword arguments
of `convert` as JSON, the source and the destination. The answer is the exit code, -9 for a run that was killed. A
source that is no directory stands for a model of that name, whose files are plain text: they are written in no time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convert import convert
from convert.output.replacement import replace_directory

ALWAYS = 10**9
_CHANGES = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


class Killer:
    """Conversions in a process of their own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, source: Path | str, destination: Path, *, kill: int | float = ALWAYS, **options: Any) -> int:
        """Converts; killed before it changes a file for the `kill`-th time, or after that many seconds (a float)."""
        when = f"after {kill}" if isinstance(kill, float) else str(kill)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{when}\t{json.dumps(options)}\t{source}\t{destination}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def killer() -> Iterator[Killer]:
    """The process, which ends with the block."""
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Killer(process)
        assert process.stdin is not None
        process.stdin.close()


def _run(kill: int, options: dict[str, Any], source: str, destination: str) -> None:
    left = kill

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in _CHANGES:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    if os.path.isdir(source):
        convert(source, destination, overwrite=True, **options)
    else:
        write_text_model(source, Path(destination))


def write_text_model(name: str, destination: Path) -> None:
    """Puts files in place that hold the model's name and their own; "old" has more of them."""
    files = ["config.json", "tokenizer.json", "model.safetensors", "templates/two.jinja"]
    if name == "old":
        shards = (f"model-{i}-of-3.safetensors" for i in range(1, 4))
        files = ["config.json", "tokenizer.json", *shards, "templates/one.jinja"]
    with replace_directory(destination, 0, lambda: None, "conversion.json") as partial:
        (partial / "templates").mkdir()
        for file in files:
            (partial / file).write_text(f"{name} {file}")
        (partial / "conversion.json").write_text(json.dumps({"name": name, "files": [*files, "conversion.json"]}))


def _serve() -> None:
    warm = False
    for line in sys.stdin:
        when, options, source, destination = line.rstrip("\n").split("\t")
        if os.path.isdir(source) and not warm:  # what a conversion imports, every child has from here on
            with tempfile.TemporaryDirectory() as folder:
                convert(source, folder)
            warm = True
        delay = float(when.removeprefix("after ")) if when.startswith("after ") else None
        if (child := os.fork()) == 0:
            try:
                _run(ALWAYS if delay is not None else int(when), json.loads(options), source, destination)
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        if delay is not None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()

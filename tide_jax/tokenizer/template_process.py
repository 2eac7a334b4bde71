"""Renders a chat template in its own process, with limits on time, memory and text."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

_WORKER = Path(__file__).with_name("template_worker.py")
_CPU_SECONDS = 5  # CPU time for one text; templates take milliseconds
_WALL_SECONDS = 60.0  # for systems that do not limit CPU time, and for overloaded machines
_BYTES = 1 << 30
_CHARACTERS = 10_000_000
_LIMIT_MESSAGES = {
    "bytes": f"needs more than {_BYTES >> 30} GiB of memory",
    "characters": f"writes more than {_CHARACTERS} characters",
    "seconds": f"takes longer than {_CPU_SECONDS} seconds",
}


class TemplateFailure(Exception):
    """A template could not be rendered; the message completes the sentence "the template ...".

    Attributes:
      out_of_bounds: the template took too much time or memory or wrote too much, and would do so again.
    """

    def __init__(self, reason: str, *, out_of_bounds: bool = False) -> None:
        super().__init__(reason)
        self.out_of_bounds = out_of_bounds


class TemplateProcess:
    """Renders one template; its process starts with the first text and ends with this object. Thread-safe."""

    def __init__(self, template: str) -> None:
        self._template = template
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop = weakref.finalize(self, lambda: None)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The template's text for these variables, which are JSON values.

        Raises:
          TemplateFailure: the template has an error, raises one, or exceeds a limit.
        """
        try:
            request = json.dumps(variables).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateFailure(f"can't be rendered ({_shorten(str(error))})") from error
        with self._lock:
            process, greeting = self._ensure_process()
            try:
                line, is_in_time = _exchange_line(process, greeting + request)
            except BaseException:  # stop the process: its late answer would be taken for the next one's
                self._stop()
                raise
            if not line.endswith(b"\n"):
                code = process.wait()
                self._stop()
                raise _exit_failure(code, is_in_time)
        answer = json.loads(line.decode("utf-8", "surrogatepass"))
        if "bound" in answer:
            raise TemplateFailure(_LIMIT_MESSAGES[answer["bound"]], out_of_bounds=True)
        if "error" in answer:
            raise TemplateFailure(f"can't be rendered ({_shorten(answer['error'])})")
        return answer["text"]

    def _ensure_process(self) -> tuple[subprocess.Popen[bytes], bytes]:
        """The process, and the bytes to send first: the settings for a new process, otherwise nothing."""
        if self._process is not None and self._stop.alive and self._process.poll() is None:
            return self._process, b""
        self._stop()
        # -S and -s skip site packages, because the parent sends its own search path. -P keeps the script's folder off
        # the path, so this package's modules cannot be imported by their bare names.
        command = [sys.executable or "python3", "-P", "-S", "-s", str(_WORKER)]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        try:
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere)
        except OSError as error:
            raise TemplateFailure(f"can't be rendered (its process can't be started: {error.strerror})") from error
        self._process, self._stop = process, weakref.finalize(self, _stop, process)
        settings = {
            "path": [str(entry) for entry in sys.path],
            "template": self._template,
            "seconds": _CPU_SECONDS,
            "bytes": _BYTES,
            "characters": _CHARACTERS,
        }
        return process, json.dumps(settings).encode() + b"\n"


def _exchange_line(process: subprocess.Popen[bytes], request: bytes) -> tuple[bytes, bool]:
    """The line that a process answers, empty if the process ends, and whether it met the wall clock limit."""
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(_WALL_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        _send(process, request)
        return cast(IO[bytes], process.stdout).readline(), not late.is_set()
    finally:
        timer.cancel()


def _send(process: subprocess.Popen[bytes], line: bytes) -> None:
    stdin = cast(IO[bytes], process.stdin)
    with contextlib.suppress(OSError):  # the process has ended; the caller notices the missing answer
        stdin.write(line)
        stdin.flush()


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            cast(IO[bytes], stream).close()
    process.wait()


def _exit_failure(code: int, is_in_time: bool) -> TemplateFailure:
    import signal

    if not is_in_time or code == -getattr(signal, "SIGXCPU", 0):
        return TemplateFailure(_LIMIT_MESSAGES["seconds"], out_of_bounds=True)
    if code == -getattr(signal, "SIGKILL", 0):  # the system kills processes when the machine runs out of memory
        return TemplateFailure(_LIMIT_MESSAGES["bytes"], out_of_bounds=True)
    return TemplateFailure(f"ends the process that renders it (exit code {code})", out_of_bounds=True)


def _shorten(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."

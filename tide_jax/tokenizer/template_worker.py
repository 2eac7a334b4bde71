"""Renders one Jinja chat template, as a script in its own process, for `tide_jax.tokenizer.template_process`.

A chat template is a program by someone else. Jinja's sandbox denies it files and Python's internals, but it does not
stop a single expression from running forever or filling the memory. The operating system limits both for a process.
This script imports only Jinja, so it starts in a tenth of a second.

Standard input has one JSON value per line: first {"path", "template", "seconds", "bytes", "characters"}, then a mapping
of variables for each text to render. The script answers each mapping with a line: {"text"}, {"error"} or {"bound"}.
"""

from __future__ import annotations

import json
import signal
import sys
from datetime import datetime
from typing import Any


def main() -> None:
    """Answers requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C stops
    settings = json.loads(sys.stdin.buffer.readline())
    sys.path[:] = settings["path"]
    _limit_memory(settings["bytes"])
    renderer = _Renderer(settings["template"], settings["characters"])
    for line in sys.stdin.buffer:
        _limit_time(settings["seconds"])
        sys.stdout.buffer.write(_answer(renderer, line) + b"\n")
        sys.stdout.buffer.flush()


def _answer(renderer: _Renderer, line: bytes) -> bytes:
    try:
        answer = renderer.render(json.loads(line))
        return json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except MemoryError:
        return b'{"bound": "bytes"}'
    except Exception as error:
        return json.dumps({"error": _describe(error)}).encode()


class _Renderer:
    def __init__(self, template: str, characters: int) -> None:
        self._source, self._characters = template, characters
        self._template: Any = None

    def render(self, variables: dict[str, Any]) -> dict[str, str]:
        if self._template is None:
            self._template = _environment().from_string(self._source)
        pieces, length = [], 0
        for piece in self._template.generate(**variables):
            pieces.append(piece)
            length += len(piece)
            if length > self._characters:
                return {"bound": "characters"}
        return {"text": "".join(pieces)}


def _environment() -> Any:
    """An environment equal to that of transformers, so that templates mean the same."""
    from jinja2 import ext, nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(ext.Extension):
        """``{% generation %}`` marks an assistant's text for training; here its text is rendered unchanged."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

        def parse(self, parser: Any) -> nodes.CallBlock:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_text"), [], [], body, lineno=line)

        def _text(self, caller: Any) -> str:
            return caller()

    class PlainNamespace(Namespace):
        """A namespace without names that could reach Python's internals."""

        def __init__(*args: Any, **values: Any) -> None:
            self, *rest = args
            for name in (attributes := dict(*rest, **values)):
                _check(name)
            Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _check(name)
            Namespace.__setitem__(self, name, value)

    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}: the name starts with an underscore")

    class PlainDict:
        """Makes dictionaries, without the attributes of Python's class."""

        def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
            return dict(*args, **values)

        def fromkeys(self, *args: Any, **values: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args, **values)

    def raise_exception(message: Any) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": PlainDict(),
        "namespace": PlainNamespace,
    }
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _describe(error: Exception) -> str:
    try:
        message = " ".join(str(error)[:1000].split())
    except Exception:  # the template made the message, and it has no text
        message = ""
    line = getattr(error, "lineno", None)
    name = type(error).__name__ if line is None else f"{type(error).__name__} in line {line}"
    return f"{name}: {message}" if message else name


def _limit_memory(most: int) -> None:
    if sys.platform != "win32":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(seconds: int) -> None:
    """Allows the process this many more seconds of CPU time, after which the system ends it."""
    if sys.platform != "win32":
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        most, hard = int(used.ru_utime + used.ru_stime) + 1 + seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()

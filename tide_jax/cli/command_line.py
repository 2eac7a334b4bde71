"""The common behaviour of all commands of the project: any failure gives one line and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tide_jax.cli.ending_signals import run_with_signals
from tide_jax.cli.interrupts import INTERRUPTED, Interrupts, end_interrupted_process
from tide_jax.cli.standard_streams import discard_output, prepare_streams, print_to_stderr
from tide_jax.errors import TideError, out_of_memory

BAD_INPUT, BROKEN_PIPE = 2, 141  # 141 as for a program that SIGPIPE ends
_OPTION_NAMES = {
    "calibration_samples": "samples",
    "rate": "audit",
    "router_bottleneck_dim": "bottleneck",
}
_POSITIONAL_ARGUMENTS = ("source", "destination")
"""Positional arguments, which have no flag."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line; its subparsers have the same class."""

    def error(self, message: str) -> NoReturn:
        """Raises TideError."""
        raise TideError(f"{message}; see '{self.prog} --help'")


def execute(make_parser: Callable[[], argparse.ArgumentParser], arguments: Sequence[str] | None) -> int:
    """Parses the arguments, calls their ``run(args)`` and returns its exit code.

    A parser may also set ``modules``, the names of slow modules that `run` needs. They are imported first, while Ctrl-C
    still ends the process at once. ``args.as_program`` tells commands whether they own the process, and with it JAX's
    configuration.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # otherwise it reports a missing torch on standard error
    args = argparse.Namespace(as_program=arguments is None)
    try:
        return _run(make_parser, arguments, args)
    except TideError as error:
        return _fail(_use_option_names(str(error), args))
    except BrokenPipeError:
        discard_output(sys.stdout)
        return BROKEN_PIPE
    except OSError as error:
        discard_output(sys.stdout)
        return _fail(f"{error.filename or 'the output'} cannot be read or written ({error.strerror or error})")
    except BaseException as error:
        if (reason := out_of_memory(error)) is not None:
            return _fail(str(reason))
        if not isinstance(error, KeyboardInterrupt) and not _was_interrupted():
            raise
        return _end_interrupted()


def _run(
    make_parser: Callable[[], argparse.ArgumentParser], arguments: Sequence[str] | None, args: argparse.Namespace
) -> int:
    if args.as_program:
        prepare_streams()
    try:
        make_parser().parse_args(arguments, args)
        if args.as_program:
            _begin_work(getattr(args, "modules", ()))
        code = run_with_signals(lambda: args.run(args), as_program=args.as_program)
    except SystemExit:  # --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    _end_work()
    return code


def model_command(
    subparsers: Any, name: str, summary: str, examples: str, run: Callable[..., int], *, modules: Sequence[str]
) -> Any:
    """Adds a command for a model, with ``--json``, and returns its parser; for `modules` see `execute`."""
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="MODEL",
        help="converted directory, Hugging Face directory, hub id (org/name or org/name@revision) or .gguf file",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run, modules=modules)
    return parser


def show(args: argparse.Namespace, facts: dict[str, Any], text: str) -> None:
    """Prints a result: with ``--json`` the facts, otherwise the text."""
    print(json.dumps(facts, indent=2) if args.json else text)


def print_piece(text: str) -> None:
    """Prints a part of a result immediately and unchanged."""
    print(text, end="", flush=True)


def note(text: str) -> None:
    """Prints information about the result to standard error."""
    print_to_stderr(text)


def cache_programs() -> None:
    """Caches compiled programs on disk for later runs.

    The folder is ``$XDG_CACHE_HOME/tide_jax`` (``~/.cache/tide_jax``), unless the user set JAX's own
    (JAX_COMPILATION_CACHE_DIR).
    """
    import jax

    if jax.config.jax_compilation_cache_dir is not None:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(home / "tide_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
    _replace_damaged_programs(home / "tide_jax")


def _replace_damaged_programs(folder: Path) -> None:
    """Deletes cached programs that JAX warns it cannot read.

    JAX compiles such a program but never overwrites an existing file. Without this, each run would compile and warn
    again.
    """
    show = warnings.showwarning

    def replace(message: Warning | str, *arguments: Any, **options: Any) -> None:
        match = re.match(r"Error reading persistent compilation cache entry for '([\w.-]+)'", str(message))
        if match is None:
            show(message, *arguments, **options)
            return
        for file in folder.glob(f"{match[1]}-*"):  # other programs of this name are merely compiled again
            with contextlib.suppress(OSError):
                file.unlink()

    warnings.simplefilter("always", UserWarning)  # report repeats too: a second damaged program may have the same name
    warnings.showwarning = replace


def parse_seed(text: str) -> int:
    """An argument that seeds a random generator, in the range that both JAX and numpy accept."""
    if not re.fullmatch(r"\d+", text) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2**63 - 1")
    return int(text)


def _use_option_names(message: str, args: argparse.Namespace) -> str:
    """Replaces parameter names in a library's message by the command's options.

    ``min_layers=9`` becomes ``--min-layers 9``.
    """

    def flag(match: re.Match[str]) -> str:
        name = match[1]
        if name in _POSITIONAL_ARGUMENTS:
            return f"{name} "
        return f"--{_OPTION_NAMES.get(name, name).replace('_', '-')} " if name in args else match[0]

    return re.sub(r"\b([a-z_]+)=", flag, message)


def _begin_work(modules: Sequence[str]) -> None:
    for name in modules:
        with contextlib.suppress(ImportError):  # the command itself reports what is missing and what to do
            importlib.import_module(name)
    if (interrupts := Interrupts.current()) is not None:
        interrupts.begin_work()


def _end_work() -> None:
    if (interrupts := Interrupts.current()) is not None:
        interrupts.end_work()


def _was_interrupted() -> bool:
    """Whether Ctrl-C was pressed; libraries may turn KeyboardInterrupt into other exceptions."""
    interrupts = Interrupts.current()
    return interrupts is not None and interrupts.has_signal


def _end_interrupted() -> int:
    if Interrupts.current() is not None:
        end_interrupted_process()
    print_to_stderr("interrupted")
    return INTERRUPTED


def _fail(message: str) -> int:
    if _was_interrupted():
        return _end_interrupted()
    _end_work()
    print_to_stderr(f"error: {' '.join(message.split())}")
    return BAD_INPUT

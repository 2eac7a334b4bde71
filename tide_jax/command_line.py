"""What every command line of the project does alike: one line and an exit code for whatever goes wrong."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

from tide_jax.errors import TideError

BAD_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 141  # the latter two as of a program that the signal ends
_FLAGS = {"calibration_samples": "samples", "router_bottleneck_dim": "bottleneck", "exit_threshold": "threshold"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line; its subparsers are of this class too."""

    def error(self, message: str) -> NoReturn:
        """Raises TideError."""
        raise TideError(f"{message}; see '{self.prog} --help'")


def execute(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Parses the arguments, which carry ``run(args) -> exit code``, and runs; returns the exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it announces a missing torch on standard error
    args = argparse.Namespace()
    try:
        parser.parse_args(arguments, args)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except TideError as error:
        return _fail(_with_flags(str(error), args))
    except BrokenPipeError:
        _drop(sys.stdout)
        return BROKEN_PIPE
    except OSError as error:
        _drop(sys.stdout)
        return _fail(f"{error.filename or 'the output'} cannot be read or written ({error.strerror or error})")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def seed(text: str) -> int:
    """An argument that seeds a random generator: what JAX and numpy both take."""
    if not re.fullmatch(r"\d+", text) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 to 2**63 - 1")
    return int(text)


def _with_flags(message: str, args: argparse.Namespace) -> str:
    """A library's message with the command's option in place of the parameter's name: ``min_layers=9`` becomes
    ``--min-layers 9``."""

    def flag(match: re.Match[str]) -> str:
        name = match[1]
        return f"--{_FLAGS.get(name, name).replace('_', '-')} " if name in args else match[0]

    return re.sub(r"\b([a-z_]+)=", flag, message)


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def _drop(stream: TextIO) -> None:
    """Gives up what could not be written: the interpreter would try again as it ends, and complain."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())

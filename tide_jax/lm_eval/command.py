"""``tide-jax eval``: lm-evaluation-harness's own command line, with the model "tide" added."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from tide_jax.errors import TideError

_EXAMPLE = (
    "tide-jax eval --model_args pretrained=smollm2,routers=routers.safetensors,exit_threshold=0.9 --tasks arc_easy "
    "--batch_size 8"
)


def add_command(subparsers: Any) -> None:
    """Registers `eval`; all arguments after it belong to lm-eval."""
    parser = subparsers.add_parser(
        "eval",
        help="run tasks of lm-evaluation-harness, with or without exits",
        add_help=False,
        prefix_chars="\0",  # no argument is our own option, not even --help
    )
    parser.add_argument("arguments", nargs="*")
    parser.set_defaults(run=_run, modules=("lm_eval.__main__", "tide_jax.lm_eval.model"))


def _run(args: argparse.Namespace) -> int:
    """Runs lm-eval, which takes its arguments only from `sys.argv`."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import tide_jax.lm_eval.model  # noqa: F401  registers the model
    except ImportError as error:
        raise TideError(f"eval needs lm-evaluation-harness ({error}); run `pip install tide_jax[eval]`") from error
    if not args.arguments:
        raise TideError(f"eval needs arguments; for example: {_EXAMPLE}")
    commands = {"run", "ls", "validate", "-h", "--help"}
    arguments = args.arguments if args.arguments[0] in commands else ["run", *args.arguments]
    if arguments[0] == "run" and not any(a == "-M" or a.split("=")[0] == "--model" for a in arguments):
        arguments = [*arguments, "--model", "tide"]
    log, handler = logging.getLogger("tide_jax"), logging.StreamHandler()
    log.setLevel(logging.INFO)  # logs the depth of each task to standard error, next to lm-eval's own log
    log.addHandler(handler)
    before, sys.argv = sys.argv, ["tide-jax eval", *arguments]
    try:
        cli_evaluate()
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        raise TideError(f"{error}; see `tide-jax eval ls tasks`") from error
    finally:
        sys.argv = before
        log.removeHandler(handler)
    return 0

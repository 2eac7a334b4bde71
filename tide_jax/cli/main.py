"""The command line: ``tide-jax convert | export | calibrate | eval | generate | inspect``.

Each command is an argparse subparser whose arguments carry ``run(args) -> exit code``. Other packages add commands
through the entry point group "tide_jax.commands".
"""

from __future__ import annotations

from tide_jax.cli.interrupts import Interrupts

TYPE_CHECKING = False  # no slow imports before `main`, which installs the handler of Ctrl-C
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Any

    from tide_jax.cli.command_line import Parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 2, with one line on standard error, for bad input."""
    if arguments is None:
        Interrupts.install()
    from tide_jax.cli.command_line import execute

    return execute(_make_parser, arguments)


def _make_parser() -> Parser:
    from importlib.metadata import entry_points

    from tide_jax.cli import calibrate as cli_calibrate
    from tide_jax.cli import generate as cli_generate
    from tide_jax.cli.command_line import Parser

    parser = Parser(prog="tide-jax", description="Language models that spend depth only where a token needs it.")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for entry in sorted(entry_points(group="tide_jax.commands"), key=lambda e: e.name):
        entry.load()(subparsers)
    for add in (cli_calibrate.add_command, cli_generate.add_command, _add_inspect):
        add(subparsers)
    return parser


def _add_inspect(subparsers: Any) -> None:
    from tide_jax.cli.command_line import model_command

    parser = model_command(
        subparsers,
        "inspect",
        "describe a model: architecture, exit points, sizes",
        "  tide-jax inspect smollm2\n  tide-jax inspect smollm2 --checkpoint-interval 3 --json\n"
        "  tide-jax inspect smollm2 --routers routers.safetensors\n",
        _inspect,
        modules=("tide_jax.cli.inspection",),
    )
    parser.add_argument("--checkpoint-interval", type=int, default=4, help="layers between routers (4)")
    parser.add_argument("--bottleneck", type=int, default=128, help="width of a router (128)")
    parser.add_argument("--routers", help="also check and describe a router file and its promise")


def _inspect(args: argparse.Namespace) -> int:
    from tide_jax.cli.command_line import show
    from tide_jax.cli.inspection import describe_model, describe_routers, format_facts

    facts = describe_model(args.source, interval=args.checkpoint_interval, bottleneck=args.bottleneck)
    if args.routers is not None:
        facts["routers"] = describe_routers(args.routers, args.source)
    show(args, facts, format_facts(facts))
    return 0

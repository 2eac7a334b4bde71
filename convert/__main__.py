"""Command line: ``python -m convert SRC DST``, also registered as ``tide-jax convert``; and ``tide-jax export``."""

from __future__ import annotations

if __name__ == "__main__":  # before slow imports: until this runs, Ctrl-C has no effect
    from tide_jax.cli.interrupts import Interrupts

    Interrupts.install()

import argparse
import functools
import json
from collections.abc import Sequence
from typing import Any

from tide_jax.cli.command_line import Parser, execute
from tide_jax.cli.progress import progress_bars

_EPILOG = """examples:
  python -m convert HuggingFaceTB/SmolLM2-135M-Instruct smollm2
  python -m convert HuggingFaceTB/SmolLM2-135M-Instruct@main smollm2
  python -m convert ./Llama-3.2-1B llama --dtype bfloat16
  python -m convert ./Llama-3.2-1B llama --weights int8
  python -m convert model-Q4_1.gguf model --verify
  python -m convert ./Llama-3.2-1B tuned --adapter ./my-lora
  python -m convert ./Qwen3-0.6B qwen3 --dry-run
  python -m convert ./new-model new --trust-remote-code
"""
_EXPORT_EPILOG = """examples:
  tide-jax export smollm2 smollm2-hf
  tide-jax export llama llama-hf --dtype bfloat16 --overwrite
"""
_DTYPES = ["float32", "bfloat16", "float16"]


def add_command(subparsers: Any) -> None:
    """Registers `convert` with the `tide-jax` command; the parsed arguments carry ``run(args) -> exit code``."""
    parser = subparsers.add_parser(
        "convert",
        help="convert a Hugging Face or GGUF checkpoint",
        description="Converts a Hugging Face directory, a hub id or a GGUF file into a directory that tide_jax loads.",
        epilog=_EPILOG.replace("python -m", "tide-jax"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_arguments(parser)


def add_export_command(subparsers: Any) -> None:
    """Registers `export` with the `tide-jax` command."""
    parser = subparsers.add_parser(
        "export",
        help="write a converted model as a Hugging Face checkpoint",
        description="Writes a converted model as a Hugging Face checkpoint, which from_pretrained loads.",
        epilog=_EXPORT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="CONVERTED", help="directory that 'tide-jax convert' made")
    parser.add_argument("destination", metavar="DST", help="directory to write")
    parser.add_argument("--dtype", choices=_DTYPES, help="dtype of the written weights (default: the conversion's)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at DST")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=_run_export, modules=("convert.exporting",))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, 2 for bad input."""
    return execute(_parser, arguments)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m convert",
        description="Converts a Hugging Face directory, a hub id or a GGUF file into a directory that tide_jax loads.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_arguments(parser)
    return parser


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="checkpoint directory, hub id (org/name or org/name@revision) or .gguf file"
    )
    parser.add_argument("destination", metavar="DST", help="directory to write")
    parser.add_argument("--adapter", help="LoRA adapter to merge: a directory that PEFT saved, or a hub id")
    parser.add_argument("--dtype", choices=_DTYPES, help="dtype of the written weights (default: the checkpoint's)")
    parser.add_argument(
        "--weights", choices=["float", "int8"], help="int8 rounds the matrices to 8-bit integers (default: float)"
    )
    parser.add_argument("--verify", action="store_true", help="compare logits with transformers' (needs torch)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code in the checkpoint, to convert a model type that transformers does not know",
    )
    parser.add_argument("--dry-run", action="store_true", help="check names and shapes, write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion at DST")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=_run, modules=("convert.conversion",))


def _run(args: argparse.Namespace) -> int:
    from convert.conversion import convert

    with progress_bars(unit="B", unit_scale=True) as progress:
        report = convert(
            args.source,
            args.destination,
            adapter=args.adapter,
            trust_remote_code=args.trust_remote_code,
            dtype=args.dtype,
            weights=args.weights,
            verify=args.verify,
            dry_run=args.dry_run,
            overwrite=args.overwrite,
            progress=functools.partial(progress, "converting"),
        )
    print(json.dumps(report.to_dict(), indent=2) if args.json else _summary(report))
    return 0


def _run_export(args: argparse.Namespace) -> int:
    from convert.exporting import export

    with progress_bars(unit="B", unit_scale=True) as progress:
        report = export(
            args.source,
            args.destination,
            dtype=args.dtype,
            overwrite=args.overwrite,
            progress=functools.partial(progress, "exporting"),
        )
    print(json.dumps(report.to_dict(), indent=2) if args.json else "\n".join(_report_lines("wrote", report)))
    return 0


def _report_lines(verb: str, report: Any) -> list[str]:
    """Report lines: one for the files written, one for each reason why tensors were left out."""
    kind = report.dtype if getattr(report, "weights", "float") == "float" else f"{report.dtype} with int8 weights"
    shards = f"{len(report.shards)} file{'s' if len(report.shards) > 1 else ''}"
    summary = (
        f"{verb} {report.destination}: {report.model_type}, {report.parameters:,} parameters, {kind}, "
        f"{report.bytes / 1e6:,.1f} MB in {shards}"
    )
    names: dict[str, list[str]] = {}
    for name, reason in report.ignored.items():
        names.setdefault(reason, []).append(name)
    return [summary, *(f"  left out {_summarise_names(group)}: {reason}" for reason, group in names.items())]


def _summarise_names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors ({names[0]}, ...)"


def _summary(report: Any) -> str:
    lines = _report_lines("would write" if report.dry_run else "wrote", report)
    if report.probed is not None:
        lines.append("  the model type is in no table: it was probed, and its logits equal those of its own code")
        if (assumed := report.probed.get("assumed")) is not None:
            lines.append(f"  assumed {assumed}")
    if (proof := report.verification) is not None:
        lines.append(
            f"  logits differ from transformers' by {proof.max_difference:.2e} at most "
            f"({proof.relative:.1e} of their range) over {proof.tokens} tokens in rows of {proof.row_length}"
        )
        if proof.divergence is not None and proof.agreement is not None:
            lines.append(
                f"  8-bit weights: the mean divergence from its predictions is {proof.divergence:.2e} nats, and "
                f"{proof.agreement:.1%} of its likeliest tokens are the same"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

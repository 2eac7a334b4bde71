"""The command line: ``tide-jax convert | export | calibrate | generate | inspect``.

Each command is an argparse subparser whose arguments carry ``run(args) -> exit code``. Other packages add theirs
through the entry point group "tide_jax.commands".
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from tide_jax.command_line import Parser, execute, seed
from tide_jax.errors import TideError
from tide_jax.progress import progress_bars

_SOURCE = "converted directory, Hugging Face directory, hub id or .gguf file"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 2, with one line on standard error, for bad input."""
    parser = Parser(prog="tide-jax", description="Language models that spend depth only where a token needs it.")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for entry in sorted(entry_points(group="tide_jax.commands"), key=lambda e: e.name):
        entry.load()(subparsers)
    for add in (_add_calibrate, _add_generate, _add_inspect):
        add(subparsers)
    return execute(parser, arguments)


def _command(subparsers: Any, name: str, summary: str, examples: str, run: Callable[..., int]) -> Any:
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="MODEL", help=_SOURCE)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)
    return parser


# --- calibrate ---------------------------------------------------------------------------------------------------


def _add_calibrate(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "calibrate",
        "train routers for a model",
        "  tide-jax calibrate smollm2 --text self --output routers.safetensors\n"
        "  tide-jax calibrate smollm2 --text wiki.txt --output routers.safetensors --samples 500\n"
        "  tide-jax calibrate smollm2 --text hub:wikitext:wikitext-2-raw-v1 --output routers.safetensors\n",
        _calibrate,
    )
    parser.add_argument(
        "--text", required=True, help=".txt, .jsonl or .parquet file, hub:NAME[:CONFIG[:SPLIT]], or self"
    )
    parser.add_argument("--field", help="column or key that holds the text")
    parser.add_argument("--output", required=True, type=Path, help="router file to write (.safetensors)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default float32 on a CPU")
    parser.add_argument("--checkpoint-interval", type=int, help="layers between routers (4)")
    parser.add_argument("--samples", type=int, dest="calibration_samples", help="texts to read (2000)")
    parser.add_argument("--max-length", type=int, help="tokens of each text (256)")
    parser.add_argument("--batch-size", type=int, help="texts at once (8)")
    parser.add_argument("--bottleneck", type=int, dest="router_bottleneck_dim", help="width of a router (128)")
    parser.add_argument("--exit-strategy", choices=["identity", "affine"], help="exit heads (affine)")
    parser.add_argument("--exit-head-rank", type=int, help="rank of affine heads (full)")
    parser.add_argument("--label", choices=["agreement", "cosine"], help="when an exit counts as right (agreement)")
    parser.add_argument("--min-layers", type=int, help="layers every token runs, for the report (8)")
    parser.add_argument("--seed", type=seed, help="source of all randomness (0)")


def _calibrate(args: argparse.Namespace) -> int:
    import dataclasses

    import tide_jax
    from tide_jax.checkpoint import load_config
    from tide_jax.texts import load_texts, model_texts

    names = {field.name for field in dataclasses.fields(tide_jax.CalibrationConfig)}
    config = tide_jax.CalibrationConfig(**{k: v for k, v in vars(args).items() if k in names and v is not None})
    if args.min_layers is None:  # the default is not to be above a shallow model's depth; a wish is taken at its word
        depth = load_config(args.source).num_layers
        config = dataclasses.replace(config, min_layers=min(config.min_layers, depth))
    _check_writable(args.output)
    texts = None if args.text == "self" else load_texts(args.text, field=args.field)
    model, tokenizer = tide_jax.load(args.source, args.dtype), tide_jax.load_tokenizer(args.source)
    with progress_bars() as progress:
        if texts is None:
            texts = model_texts(
                model,
                tokenizer,
                config.calibration_samples,
                max_length=config.max_length,
                batch_size=config.batch_size,
                seed=config.seed,
                progress=progress,
            )
        routers = tide_jax.calibrate(model, tokenizer, texts, config, source=args.text, progress=progress)
    routers.save(args.output)
    size = args.output.stat().st_size
    if args.json:
        print(json.dumps({"output": str(args.output), "bytes": size} | routers.metadata.to_dict(), indent=2))
    else:
        print(calibration_summary(routers, model.config.num_layers))
        print(f"wrote {args.output} ({size / 1e6:.2f} MB)")
    return 0


def calibration_summary(routers: Any, num_layers: int) -> str:
    """The report of a calibration as text tables."""
    report = routers.report
    counts = report["counts"]
    lines = [
        f"{counts['texts']} texts, {counts['tokens']} tokens; trained on {counts['routers_tokens']}, "
        f"measured on {counts['validation_tokens']} held out",
        "",
        "checkpoint  agreement  positives in training    AUC",
    ]
    for row in report["checkpoints"]:
        auc = "    -" if row["auc"] is None else f"{row['auc']:.3f}"
        rates = f"{row['agreement']:.3f}                  {row['positives_in_training']:.3f}"
        lines.append(f"  layer {row['layer']:3d}      {rates}  {auc}")
    lines += ["", f"threshold   exits   depth  layers of {num_layers}  agreement  (label alone; held-out text)"]
    for row in report["exits"]:
        shares = f"{row['exit_rate']:6.1%}  {row['depth']:6.1%}     {row['depth'] * num_layers:6.2f}"
        lines.append(
            f"     {row['threshold']:.2f}  {shares}     {row['agreement']:6.1%}     ({row['label_agreement']:.1%})"
        )
    lines.append(f"an oracle would run {report['oracle']['depth']:.1%} of the depth")
    return "\n".join(lines)


# --- generate ----------------------------------------------------------------------------------------------------


def _add_generate(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "generate",
        "continue prompts, with exits where routers are given",
        '  tide-jax generate smollm2 --prompt "What is a volcano?"\n'
        '  tide-jax generate smollm2 --prompt "What is a volcano?" --routers routers.safetensors --threshold 0.9\n'
        '  tide-jax generate smollm2 --raw --prompt "The capital of France is" --temperature 0.7 --seed 1 --json\n',
        _generate,
    )
    parser.add_argument("--prompt", required=True, action="append", help="text to continue; repeat it for a batch")
    parser.add_argument("--raw", action="store_true", help="take prompts as they are, without the chat template")
    parser.add_argument("--routers", help="router file from 'tide-jax calibrate'; without one every layer runs")
    parser.add_argument("--checkpoint-interval", type=int, help="fail unless the router file has this interval")
    parser.add_argument(
        "--threshold",
        type=float,
        dest="exit_threshold",
        default=0.85,
        help="a token exits above this router score (0.85)",
    )
    parser.add_argument("--min-layers", type=int, help="layers every token runs (8)")
    parser.add_argument("--mode", choices=["exit", "full"], help="default: exit when there are routers")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default float32 on a CPU")
    parser.add_argument("--no-stream", action="store_true", help="print the text when it is complete")


def _generate(args: argparse.Namespace) -> int:
    import jax

    import tide_jax

    _check_prompts(args)
    exits = {"exit_threshold": args.exit_threshold} | (
        {} if args.min_layers is None else {"min_layers": args.min_layers}
    )
    config = tide_jax.ExitConfig(**exits)
    model, tokenizer = tide_jax.load(args.source, args.dtype), tide_jax.load_tokenizer(args.source)
    routers = None
    if args.routers is not None:
        routers = tide_jax.Routers.load(args.routers, model=model, checkpoint_interval=args.checkpoint_interval)
    if args.min_layers is None:
        config = tide_jax.ExitConfig(**exits, min_layers=min(config.min_layers, model.config.num_layers))
    engine = tide_jax.TIDE(model, routers, config)
    prompts = [_prompt_ids(tokenizer, text, raw=args.raw) for text in args.prompt]
    dials = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "mode")
    options: dict[str, Any] = {name: getattr(args, name) for name in dials} | {"key": jax.random.key(args.seed)}
    if len(prompts) == 1 and not args.json and not args.no_stream:
        from transformers import TextStreamer

        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    out = engine.generate(prompts, **options)
    texts = [tokenizer.decode(t[:n], skip_special_tokens=True) for t, n in zip(out.tokens, out.lengths, strict=True)]
    if args.json:
        rows = [
            {"prompt": prompt, "text": text, "tokens": t[:n].tolist(), "exit_layers": e[:n].tolist()}
            for prompt, text, t, e, n in zip(args.prompt, texts, out.tokens, out.exit_layers, out.lengths, strict=True)
        ]
        print(json.dumps({"outputs": rows, "stats": out.stats.to_dict()}, indent=2))
        return 0
    if "streamer" not in options:
        print("\n\n".join(texts))
    print(f"\n{out.stats.summary()}", file=sys.stderr)
    return 0


def _check_prompts(args: argparse.Namespace) -> None:
    """Finds out before the model is loaded."""
    if not all(args.prompt):
        raise TideError("the prompt is empty; pass some text")
    if args.mode == "exit" and args.routers is None:
        raise TideError("--mode exit needs --routers; pass a file from 'tide-jax calibrate'")


def _prompt_ids(tokenizer: Any, text: str, *, raw: bool) -> list[int]:
    from tide_jax.texts import chat_ids

    if getattr(tokenizer, "chat_template", None) and not raw:
        return chat_ids(tokenizer, text)
    return list(tokenizer(text)["input_ids"])


# --- inspect -----------------------------------------------------------------------------------------------------


def _add_inspect(subparsers: Any) -> None:
    parser = _command(
        subparsers,
        "inspect",
        "say what a model is: architecture, checkpoints, sizes",
        "  tide-jax inspect smollm2\n  tide-jax inspect smollm2 --checkpoint-interval 3 --json\n"
        "  tide-jax inspect smollm2 --routers routers.safetensors\n",
        _inspect,
    )
    parser.add_argument("--checkpoint-interval", type=int, default=4, help="layers between routers (4)")
    parser.add_argument("--bottleneck", type=int, default=128, help="width of a router (128)")
    parser.add_argument("--routers", help="also check and describe a router file")


def _inspect(args: argparse.Namespace) -> int:
    from tide_jax.inspection import describe, describe_routers, text_table

    facts = describe(args.source, interval=args.checkpoint_interval, bottleneck=args.bottleneck)
    if args.routers is not None:
        facts["routers"] = describe_routers(args.routers, args.source)
    print(json.dumps(facts, indent=2) if args.json else text_table(facts))
    return 0


# --- shared ------------------------------------------------------------------------------------------------------


def _check_writable(path: Path) -> None:
    """Finds out before the work, not after it."""
    if path.is_dir():
        raise TideError(f"can't write {path}: it is a directory, expected a file")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise TideError(
            f"can't write {path} ({error.strerror or error}): {path.parent} must be an existing, writable directory"
        ) from error


if __name__ == "__main__":
    raise SystemExit(main())

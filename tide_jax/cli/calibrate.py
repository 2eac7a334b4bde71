"""The command ``tide-jax calibrate``, which trains routers for a model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tide_jax.cli.command_line import model_command, note, parse_seed, show
from tide_jax.cli.progress import progress_bars
from tide_jax.errors import TideError
from tide_jax.exits.router_file import check_destination
from tide_jax.temporaries import temporary_file

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from tide_jax import CalibrationConfig, Routers
    from tide_jax.calibration.collect import Sample
    from tide_jax.risk.promise import Promise

NOTHING_PROMISED = 1
"""Exit code if routers were written but no threshold qualified for the requested promise."""


def add_command(subparsers: Any) -> None:
    """Registers `calibrate`."""
    parser = model_command(
        subparsers,
        "calibrate",
        "train routers for a model",
        "  tide-jax calibrate smollm2 --text self --output routers.safetensors\n"
        "  tide-jax calibrate smollm2 --text wiki.txt --output routers.safetensors --samples 500\n"
        "  tide-jax calibrate smollm2 --text wiki.txt --output routers.safetensors --risk 0.02 --delta 0.05\n"
        "  tide-jax calibrate smollm2 --text hub:wikitext:wikitext-2-raw-v1 --output routers.safetensors\n\n"
        "exit code 1: the routers are written, but no threshold qualified for --risk and --delta\n",
        _run,
        modules=("tide_jax.calibration.calibrate", "tide_jax.risk.promise"),
    )
    parser.add_argument(
        "--text", required=True, help=".txt, .jsonl or .parquet file, hub:NAME[:CONFIG[:SPLIT]], or self"
    )
    parser.add_argument("--field", help="column or key that holds the text")
    parser.add_argument(
        "--chat-template",
        metavar="NAME",
        help="name of the chat template for --text self, if there are several (default)",
    )
    parser.add_argument("--output", required=True, type=Path, help="router file to write (.safetensors)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default float32 on a CPU")
    parser.add_argument(
        "--weights", choices=["float", "int8"], help="int8 rounds the matrices to 8-bit integers; default: as MODEL is"
    )
    parser.add_argument("--checkpoint-interval", type=int, help="layers between routers (4)")
    parser.add_argument("--samples", type=int, dest="calibration_samples", help="texts to read (2000)")
    parser.add_argument("--max-length", type=int, help="tokens of each text (256)")
    parser.add_argument("--batch-size", type=int, help="texts in a forward pass (8)")
    parser.add_argument("--bottleneck", type=int, dest="router_bottleneck_dim", help="width of a router (128)")
    parser.add_argument("--exit-strategy", choices=["identity", "affine"], help="exit heads (affine)")
    parser.add_argument("--exit-head-rank", type=int, help="rank of affine heads (full)")
    parser.add_argument("--exit-head-steps", type=int, help="gradient steps that tune affine heads; 0 for none (120)")
    parser.add_argument("--translator-rank", type=int, help="rank of the maps for the cache of skipped layers (64)")
    parser.add_argument(
        "--confidence-candidates",
        type=int,
        help="frequent tokens whose logits the second look computes; 0 turns it off (512)",
    )
    parser.add_argument(
        "--label",
        choices=["agreement", "cosine"],
        help="an exit is right if it predicts the full model's token, or if its state is close (agreement)",
    )
    parser.add_argument(
        "--min-layers", type=int, help="layers that every token runs at least, in the report and the promise (8)"
    )
    parser.add_argument("--seed", type=parse_seed, help="seed of all random choices (0)")
    parser.add_argument(
        "--work-dir", type=Path, help="folder for the state of the reading pass; an interrupted run continues there"
    )
    parser.add_argument("--devices", type=int, default=1, help="devices that share the reading pass (1)")
    _add_promise_options(parser.add_argument_group("a threshold with a promise, tested on texts set aside"))


def _add_promise_options(group: Any) -> None:
    group.add_argument("--risk", type=float, help="promise that the mean loss of a text is at most this, such as 0.02")
    group.add_argument("--delta", type=float, help="probability that the promise fails (0.05)")
    group.add_argument(
        "--loss",
        choices=["disagreement", "nll"],
        help="loss of a text: the share of tokens that differ from the full model's, or the increase of its mean "
        "negative log-likelihood in nats (disagreement)",
    )
    group.add_argument(
        "--kv-strategy",
        choices=["propagate", "recompute"],
        help="how the promised runs fill the cache of skipped layers (propagate)",
    )
    group.add_argument(
        "--threshold-tilt",
        type=float,
        help="0 to 1: how much higher the threshold is at deep exit points than at shallow ones, in promised runs (0)",
    )
    group.add_argument("--per-exit-point", action="store_true", default=None, help="a threshold for each exit point")
    group.add_argument(
        "--guarantee-texts",
        type=int,
        metavar="N",
        help="texts to set aside for the test (a fifth of those read, or twice the fewest possible)",
    )


def _run(args: argparse.Namespace) -> int:
    import tide_jax
    from tide_jax.risk.promise import certify_routers, no_guarantee_reason

    # Check everything that can fail early before the model is loaded.
    config, promise, mesh = _make_config(args), _make_promise(args), _make_mesh(args.devices)
    _check_writable(args.output)
    tokenizer = tide_jax.load_tokenizer(args.source)
    read_texts = _make_reader(args, tokenizer, config, promise)
    model = tide_jax.load(args.source, args.dtype, weights=args.weights)
    with progress_bars() as progress:
        texts, test_texts = read_texts(model, progress)
        options = {"source": args.text, "progress": progress, "work_dir": args.work_dir, "mesh": mesh}
        routers = tide_jax.calibrate(model, tokenizer, texts, config, **options)
        routers.save(args.output)
        if promise is not None:  # tests the routers as stored; an interrupt here keeps the file written above
            routers = tide_jax.Routers.load(args.output, model=model)
            routers = certify_routers(model, routers, test_texts, promise, config, progress=progress)
            routers.save(args.output)
    size = args.output.stat().st_size
    facts = {"output": str(args.output), "bytes": size} | routers.metadata.to_dict()
    show(args, facts, _format_summary(args, routers, model.config.num_layers, size))
    if reason := no_guarantee_reason(routers):
        note(f"nothing promised: {reason}")
        return NOTHING_PROMISED
    return 0


def _make_config(args: argparse.Namespace) -> CalibrationConfig:
    import dataclasses

    import tide_jax
    from tide_jax.calibration.calibrate import check_ranks
    from tide_jax.model.files.checkpoint import load_config

    names = {field.name for field in dataclasses.fields(tide_jax.CalibrationConfig)}
    config = tide_jax.CalibrationConfig(**{k: v for k, v in vars(args).items() if k in names and v is not None})
    model = load_config(args.source)
    check_ranks(config, model.hidden_size)
    config = dataclasses.replace(config, max_length=min(config.max_length, model.context_length))
    if args.min_layers is None:  # only the default is capped to a shallow model's depth
        config = dataclasses.replace(config, min_layers=min(config.min_layers, model.num_layers))
    return config


def _make_promise(args: argparse.Namespace) -> Promise | None:
    from tide_jax.risk.promise import Promise

    names = ("delta", "loss", "per_exit_point", "kv_strategy", "threshold_tilt", "guarantee_texts")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.risk is not None:
        return Promise(args.risk, **given)
    if given:
        raise TideError(f"--{next(iter(given)).replace('_', '-')} needs --risk, the mean loss of a text to promise")
    return None


def _make_mesh(count: int) -> Mesh | None:
    import jax
    import numpy as np

    devices = jax.local_devices()
    if not 1 <= count <= len(devices):
        raise TideError(
            f"--devices {count}: JAX has {len(devices)} devices on this machine ({devices[0].platform}); pass a number "
            f"from 1 to {len(devices)}"
        )
    return None if count == 1 else jax.sharding.Mesh(np.asarray(devices[:count]), ("data",))


_ReadTexts = Callable[[Any, Callable[[str, int, int], None]], tuple[Any, "list[Sample]"]]


def _make_reader(
    args: argparse.Namespace, tokenizer: Any, config: CalibrationConfig, promise: Promise | None
) -> _ReadTexts:
    """A function of the model and a progress callback; it returns the texts for routers and those set aside.

    Checks before any model is loaded that there are enough texts, and that the chat template can ask for them.
    """
    from tide_jax.calibration.collect import tokenise
    from tide_jax.model.files.checkpoint import load_config
    from tide_jax.risk.promise import split_test_texts
    from tide_jax.texts import load_texts, model_text_prompts, model_texts

    if args.chat_template is not None and args.text != "self":
        raise TideError("--chat-template only applies to --text self; leave it out for other texts")
    if args.text != "self":
        texts = load_texts(args.text, field=args.field)
        if promise is None:
            return lambda model, progress: (texts, [])
        samples = tokenise(tokenizer, texts, config, load_config(args.source).vocab_size)
        split = split_test_texts(samples, promise, seed=config.seed)
        return lambda model, progress: split
    if promise is not None:
        # Only a check: raises if there are too few texts for the promise.
        promise.text_count(config.calibration_samples)
    # Only a check: raises if the chat template cannot ask a question.
    next(model_text_prompts(tokenizer, seed=config.seed, chat_template=args.chat_template))

    def write_texts(model: Any, progress: Callable[[str, int, int], None]) -> tuple[list[Sample], list[Sample]]:
        texts = model_texts(
            model,
            tokenizer,
            config.calibration_samples,
            max_length=config.max_length,
            batch_size=config.batch_size,
            seed=config.seed,
            chat_template=args.chat_template,
            progress=progress,
        )
        return (texts, []) if promise is None else split_test_texts(texts, promise, seed=config.seed)

    return write_texts


def _format_summary(args: argparse.Namespace, routers: Routers, num_layers: int, size: int) -> str:
    lines = [calibration_summary(routers, num_layers)]
    if (config := routers.exit_config) is not None and config.guarantee is not None:
        lines += ["", config.guarantee.summary()]
    lines.append(f"wrote {args.output} ({size / 1e6:.2f} MB)")
    if args.work_dir is not None:
        lines.append(f"{args.work_dir} keeps the reading pass for other fits; delete it when the routers are good")
    return "\n".join(lines)


def calibration_summary(routers: Routers, num_layers: int) -> str:
    """A calibration's report as text tables."""
    report = routers.report
    counts = report["counts"]
    lines = [
        f"{counts['texts']} texts, {counts['tokens']} tokens; trained on {counts['routers_tokens']}, "
        f"measured on {counts['validation_tokens']} held out",
        "",
        "exit point  agreement  positives in training    AUC",
    ]
    for row in report["exit_points"]:
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


def _check_writable(path: Path) -> None:
    """Checks that the output can be written, before the work instead of after it."""
    check_destination(path)
    try:
        with temporary_file(path.parent, path.name):
            pass
    except OSError as error:
        raise TideError(
            f"can't write {path} ({error.strerror or error}): {path.parent} must be an existing, writable directory"
        ) from error

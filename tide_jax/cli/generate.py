"""The command ``tide-jax generate``, which continues prompts."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from tide_jax.checks import unicode_text
from tide_jax.cli.command_line import cache_programs, model_command, note, parse_seed, print_piece, show
from tide_jax.cli.devices import SilentStreamer, add_options, first_process, open_mesh
from tide_jax.cli.text_stream import TextStream
from tide_jax.errors import TideError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from tide_jax import TIDE, DriftMonitor


_EXIT_OPTIONS = ("exit_threshold", "threshold_tilt", "min_layers", "kv_strategy")
"""Options that are fields of `tide_jax.ExitConfig`."""


def add_command(subparsers: Any) -> None:
    """Registers `generate`."""
    parser = model_command(
        subparsers,
        "generate",
        "continue prompts, with exits where routers are given",
        '  tide-jax generate smollm2 --prompt "What is a volcano?"\n'
        '  tide-jax generate smollm2 --prompt "What is a volcano?" --routers routers.safetensors --exit-threshold 0.9\n'
        '  tide-jax generate smollm2 --prompt "What is a volcano?" --routers routers.safetensors --audit 1\n'
        '  tide-jax generate smollm2 --prompt "Repeat after me: ..." --mode lossless\n'
        '  tide-jax generate smollm2 --raw --prompt "The capital of France is" --temperature 0.7 --seed 1 --json\n',
        _run,
        modules=("tide_jax.engine",),
    )
    parser.add_argument("--prompt", required=True, action="append", help="text to continue; repeat it for a batch")
    parser.add_argument("--raw", action="store_true", help="use the prompts unchanged, without the chat template")
    parser.add_argument(
        "--chat-template", metavar="NAME", help="name of the chat template, if there are several (default)"
    )
    parser.add_argument("--routers", help="router file from 'tide-jax calibrate'; without one every layer runs")
    parser.add_argument("--checkpoint-interval", type=int, help="fail unless the router file has this interval")
    parser.add_argument(
        "--exit-threshold",
        type=float,
        help="a token exits if its score exceeds this (the router file's threshold, else 0.85)",
    )
    parser.add_argument(
        "--threshold-tilt",
        type=float,
        help="0 to 1: how much higher the threshold is at deep exit points than at shallow ones (the router file's, "
        "else 0)",
    )
    parser.add_argument(
        "--min-layers", type=int, help="layers that every token runs at least (the router file's, else 8)"
    )
    parser.add_argument(
        "--kv-strategy",
        choices=["propagate", "recompute"],
        help="fill the cache of skipped layers from exit states, or run these layers later (the router file's, else "
        "propagate)",
    )
    parser.add_argument(
        "--mode",
        choices=["exit", "lossless", "full"],
        help="exit (default with routers): tokens may exit early; full: every token runs every layer; lossless: the "
        "full model's tokens, from drafts that it verifies where that is faster",
    )
    parser.add_argument(
        "--draft",
        choices=["int8", "text"],
        help="who drafts with --mode lossless: the model's weights rounded to 8 bits, which takes one more byte a "
        "weight, and the text; or the text alone (int8 where it pays: on a CPU with the extra 'cpu', for float32 "
        "weights beyond 64 MiB; else text)",
    )
    parser.add_argument(
        "--audit",
        type=float,
        dest="rate",
        metavar="RATE",
        help="run this share of the answers again at full depth and report how often exits agree",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="most new tokens (128)")
    parser.add_argument(
        "--do-sample",
        action="store_true",
        default=None,
        help="sample tokens; without it decoding is greedy, whatever the model's files say",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="sampling temperature (the model's, else 1); above 0 turns sampling on, 0 is greedy",
    )
    parser.add_argument(
        "--top-k", type=int, help="sample from the K most likely tokens; 0 is all (the model's, else 0)"
    )
    parser.add_argument(
        "--top-p", type=float, help="sample from the most likely tokens of total probability P (the model's, else 1)"
    )
    parser.add_argument(
        "--min-p",
        type=float,
        help="sample from tokens at least P times as likely as the likeliest (the model's, else 0)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        help="penalty on tokens that occurred before; 1 is none (the model's, else 1)",
    )
    parser.add_argument("--seed", type=parse_seed, default=0, help="seed of sampling and of --audit (0)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default float32 on a CPU")
    parser.add_argument(
        "--weights", choices=["float", "int8"], help="int8 rounds the matrices to 8-bit integers; default: as MODEL is"
    )
    parser.add_argument("--no-stream", action="store_true", help="print the text when it is complete")
    add_options(parser)


def _run(args: argparse.Namespace) -> int:
    import jax

    import tide_jax
    from tide_jax.tokenizer.chat import prompt_ids

    # Check everything that can fail early before the model is loaded.
    monitor, mesh = _check_options(args), open_mesh(args)
    if args.as_program:
        cache_programs()
    tokenizer = tide_jax.load_tokenizer(args.source)
    prompts = prompt_ids(tokenizer, args.prompt, chat_template=args.chat_template, raw=args.raw)
    model = tide_jax.load(args.source, args.dtype, weights=args.weights, mesh=mesh)
    engine, promise = _make_engine(args, model, mesh, is_audited=monitor is not None)
    names = (
        "max_new_tokens",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "mode",
        "draft",
    )
    options: dict[str, Any] = {name: getattr(args, name) for name in names}
    options |= {"key": jax.random.key(args.seed), "monitor": monitor}
    streaming = len(prompts) == 1 and not args.json and not args.no_stream
    if streaming:
        options["streamer"] = TextStream(tokenizer, print_piece) if first_process() else SilentStreamer()
    out = engine.generate(prompts, **options)
    if not first_process():
        return 0
    if streaming:
        print_piece("\n")
    texts = [tokenizer.decode(t[:n], skip_special_tokens=True) for t, n in zip(out.tokens, out.lengths, strict=True)]
    rows = [
        {"prompt": prompt, "text": text, "tokens": t[:n].tolist(), "exit_layers": e[:n].tolist()}
        for prompt, text, t, e, n in zip(args.prompt, texts, out.tokens, out.exit_layers, out.lengths, strict=True)
    ]
    exits = None if promise is None else engine.config.to_dict()
    if args.json or not streaming:
        show(args, {"outputs": rows, "stats": out.stats.to_dict(), "exit_config": exits}, "\n\n".join(texts))
    if not args.json:
        note("\n".join(["", out.stats.summary()] + ([] if promise is None else [promise])))
    return 0


def _check_options(args: argparse.Namespace) -> DriftMonitor | None:
    """Checks the options before the model is loaded; returns the drift monitor for `--audit`."""
    import tide_jax

    if not all(args.prompt):
        name = "the prompt" if len(args.prompt) == 1 else f"prompt {args.prompt.index('') + 1}"
        raise TideError(f"{name} is empty; pass some text")
    if args.raw and args.chat_template is not None:
        raise TideError("--raw uses no chat template; leave --chat-template out")
    for number, prompt in enumerate(args.prompt, 1):
        unicode_text("--prompt" if len(args.prompt) == 1 else f"--prompt {number}", prompt)
    if args.mode == "exit" and args.routers is None:
        raise TideError("--mode exit needs --routers; pass a file from 'tide-jax calibrate'")
    if args.draft is not None and args.mode != "lossless":
        raise TideError("--draft says who drafts; it needs --mode lossless")
    if args.rate is not None and (args.routers is None or args.mode in ("lossless", "full")):
        raise TideError("--audit compares exits with the full model; it needs --routers, and --mode exit")
    given = {name: getattr(args, name) for name in _EXIT_OPTIONS if getattr(args, name) is not None}
    tide_jax.ExitConfig(**given)
    if args.routers is None and args.checkpoint_interval is not None:
        raise TideError("--checkpoint-interval checks a router file; it needs --routers")
    if args.routers is None and given:
        raise TideError(f"--{next(iter(given)).replace('_', '-')} says how tokens exit; it needs --routers")
    return None if args.rate is None else tide_jax.DriftMonitor(args.rate, seed=args.seed)


def _make_engine(
    args: argparse.Namespace, model: Any, mesh: Mesh | None, *, is_audited: bool
) -> tuple[TIDE, str | None]:
    """The engine, and its promise as text; None if no token can exit."""
    import tide_jax
    from tide_jax.risk.promise import exit_settings

    if args.routers is None:
        return tide_jax.TIDE(model, mesh=mesh), None
    routers = tide_jax.Routers.load(args.routers, model=model, checkpoint_interval=args.checkpoint_interval)
    config, promise = exit_settings(model, routers, **{name: getattr(args, name) for name in _EXIT_OPTIONS})
    if is_audited and config.guarantee is not None and config.guarantee.loss != "disagreement":
        config = dataclasses.replace(config, guarantee=None)  # a monitor only watches disagreement
    return tide_jax.TIDE(model, routers, config, mesh=mesh), promise if args.mode in (None, "exit") else None

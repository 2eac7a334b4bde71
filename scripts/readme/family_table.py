"""Measures parity with transformers for every causal language model type in transformers.

  python -m scripts.readme.family_table

Each model type is a tiny random checkpoint, with another one for each of its variants in
`convert.parity.tiny_variants`. Each is converted from disk and compared on all paths of `convert.parity.measure`.
Measurements run in separate processes, so that a crash costs only one model type. The results are
scripts/results/families.json, from which `scripts/readme/tables.py` writes docs/families.md. The exit code is 1 if a
model type converts but is not equal.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import importlib.metadata
import json
import multiprocessing
import multiprocessing.connection
import os
import queue
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "results" / "families.json"
_TIMEOUT = 600.0  # seconds for one model type and its variants
_VERSIONED = ("transformers", "torch", "jax", "flax", "numpy")


def measure(model_type: str) -> dict[str, Any]:
    """Returns the results of one model type: status, largest difference, architecture features, and each case."""
    from convert.families import REFUSED
    from convert.parity.tiny import text_type
    from convert.parity.tiny_variants import REFUSED_VARIANTS, VARIANTS

    reason = REFUSED.get(model_type) or REFUSED.get(text_type(model_type))
    if reason is not None:
        return {"status": "refused" if _is_decoder(model_type) else "not a decoder", "reason": reason}
    every = VARIANTS | REFUSED_VARIANTS
    variants = {name: fields for name, (kind, fields) in every.items() if kind == model_type}
    cases = {name: _case(model_type, fields) for name, fields in ({model_type: {}} | variants).items()}
    features = [found for case in cases.values() if (found := case.pop("features", None)) is not None]
    statuses = {case["status"] for case in cases.values()}
    status = "failed" if "failed" in statuses else "in part" if len(statuses) > 1 else statuses.pop()
    if status == "refused" and not _is_decoder(model_type):
        status = "not a decoder"
    entry: dict[str, Any] = {"status": status}
    if differences := [case["relative"] for case in cases.values() if "relative" in case]:
        entry |= {"relative": max(differences), "features": features[0]}
    if reasons := dict.fromkeys(case["reason"] for case in cases.values() if "reason" in case):
        entry["reason"] = "; ".join(reasons)
    return entry | {"cases": cases}


def _case(model_type: str, fields: dict[str, Any]) -> dict[str, Any]:
    """One checkpoint: "parity", "failed" (converted, but not equal) or "refused", with a reason for the latter two."""
    from convert.conversion import open_config
    from convert.parity.measure import measure_parity
    from convert.parity.tiny import save_tiny
    from tide_jax.errors import TideError

    with tempfile.TemporaryDirectory() as directory:
        save_tiny(model_type, Path(directory), **fields)
        try:
            features = _features(open_config(directory))
            report = measure_parity(directory)
        except TideError as error:
            return {"status": "refused", "reason": _without(str(error), directory)}
    case = {"relative": report.relative, "logit_range": report.logit_range, "features": features}
    return case | (
        {"status": "failed", "reason": "; ".join(report.problems)} if report.problems else {"status": "parity"}
    )


def _without(message: str, directory: str) -> str:
    """An error message without the name of the temporary directory."""
    return message.replace(f"{directory}: ", "").replace(directory, "the checkpoint")


def _features(config: Any) -> list[str]:
    """Names of an architecture's non-default fields of `DecoderConfig`."""
    from tide_jax.model.architecture import AttentionType

    sizes = {"model_type", "norm_eps", "eos_token_ids", "pad_token_id", "learned_positions", "position_offset"}
    sizes |= {"generation", "recurrent_types"}  # not part of the architecture, and below
    found = [
        _feature(field.name, getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in sizes
        and field.default is not dataclasses.MISSING
        and getattr(config, field.name) != field.default
    ]
    found += sorted({kind.kind.replace("_", " ") for kind in config.recurrent_types})
    kinds = config.attention_types
    names = [f.name for f in dataclasses.fields(AttentionType) if f.default is not dataclasses.MISSING]
    found += [name for name in names if name != "rope" and any(getattr(k, name) for k in kinds)]
    ropes = [kind.rope for kind in kinds if kind.rope is not None]
    found += sorted({f"rope: {rope.kind}" for rope in ropes if rope.kind != "default"})
    found += ["interleaved rope"] * any(getattr(rope, "interleaved", False) for rope in ropes)
    found += ["partial rope"] * any(rope.rotary_dim < config.head_dim for rope in ropes if config.head_dim)
    return found


def _feature(name: str, value: Any) -> str:
    if value is True or dataclasses.is_dataclass(value) or isinstance(value, float):
        return name
    return f"no {name}" if value is False else f"{name}: {value}"


def _is_decoder(model_type: str) -> bool:
    """Whether a model type is a decoder by default, rather than an encoder or a pair that can be used as one."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    default = {field.name: field.default for field in dataclasses.fields(kind)}
    return not default.get("is_encoder_decoder") and default.get("is_decoder") is not False


def _serve(connection: multiprocessing.connection.Connection) -> None:
    """Runs in a worker process: measures the model types it receives until the other end closes."""
    import warnings

    import torch
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    while True:
        try:
            model_type = connection.recv()
        except EOFError:
            return
        try:
            connection.send(measure(model_type))
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            connection.send({"status": "failed", "reason": reason[:300]})


def _work(tasks: queue.SimpleQueue[str], results: dict[str, Any], done: Any) -> None:
    """Feeds a worker process until no task is left, and replaces it if it dies."""
    context = multiprocessing.get_context("spawn")
    process, here = None, None
    while not tasks.empty():
        try:
            model_type = tasks.get_nowait()
        except queue.Empty:
            break
        if process is None or here is None:
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
        try:
            here.send(model_type)
            results[model_type] = here.recv() if here.poll(_TIMEOUT) else None
        except (EOFError, OSError):
            results[model_type] = None
        if results[model_type] is None:
            process.kill()
            process.join()
            how = "crashed" if process.exitcode != -9 else f"took more than {_TIMEOUT:.0f} s"
            results[model_type] = {"status": "failed", "reason": f"the measuring process {how}"}
            process = None
        done(model_type)
    if here is not None:
        here.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types to measure, with commas; the others keep their results")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    from tqdm import tqdm
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = args.only.split(",") if args.only else list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if unknown := set(names) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        parser.error(f"no causal language model type: {', '.join(sorted(unknown))}")
    results = json.loads(args.out.read_text())["types"] if args.only and args.out.exists() else {}
    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        tasks.put(name)
    with tqdm(total=len(names), unit="type") as bar, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:

        def done(model_type: str) -> None:
            bar.set_postfix_str(f"{model_type}: {results[model_type]['status']}")
            bar.update()

        for future in [pool.submit(_work, tasks, results, done) for _ in range(args.jobs)]:
            future.result()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    versions = {package: importlib.metadata.version(package) for package in _VERSIONED}
    report = {"versions": versions, "types": dict(sorted(results.items()))}
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return _summarise({name: results[name] for name in names})


def _summarise(results: dict[str, Any]) -> int:
    """Prints counts and failures; returns the exit code."""
    for name, entry in results.items():
        if entry["status"] == "failed":
            print(f"{name}: {entry['reason']}", file=sys.stderr)
    counts = collections.Counter(entry["status"] for entry in results.values())
    print(", ".join(f"{count} {status}" for status, count in counts.most_common()))
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())

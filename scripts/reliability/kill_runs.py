"""Kills runs that write (SIGKILL, at random times) and checks what they leave: the complete old files or the new ones.

    python -m scripts.reliability.kill_runs --out scripts/results/kills.json

The runs are conversions with --overwrite, routers saved over others, and `calibrate --work-dir`, which is killed
repeatedly until it may finish. Conversions and saves run in forks of one process that has imported everything, so that
kills hit the work and not the start.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from scripts.reporting import machine, reason, save

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
_LATE = 1.2  # some kills come after the end
_TEXTS = 24


class Kill(NamedTuple):
    """One kill.

    Attributes:
      what: the run.
      seconds: time of the kill.
      left: "old" or "new", or a description of the problem.
    """

    what: str
    seconds: float
    left: str


class Forks:
    """A process that forks a child for each job; the child is killed after some time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scripts.reliability.kill_runs", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, seconds: float | None, *job: str) -> float:
        """Runs a job and kills it after `seconds`, unless that is None; returns how long it ran."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\t".join([str(seconds), *job]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().split()
        if not answer or (seconds is None and answer[0] != "0"):
            raise SystemExit(f"{' '.join(job)} failed without being killed: {answer}")
        return float(answer[1])

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve() -> None:
    """Main loop of `Forks`' process: a job is "convert SOURCE DESTINATION" or "save PICKLE DESTINATION"."""
    import transformers  # noqa: F401  # pyright: ignore[reportUnusedImport]

    from convert import convert

    warm = False
    for line in sys.stdin:
        seconds, *job = line.rstrip("\n").split("\t")
        if job[0] == "convert" and not warm:
            with tempfile.TemporaryDirectory() as folder:
                convert(job[1], Path(folder) / "out")  # imports modules that every later child then has
            warm = True
        start = time.perf_counter()
        if (child := os.fork()) == 0:
            code = 1
            try:
                _work(*job)
                code = 0
            finally:
                os._exit(code)
        if seconds != "None":
            time.sleep(float(seconds))
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, time.perf_counter() - start, flush=True)


def _work(kind: str, source: str, destination: str) -> None:
    if kind == "convert":
        from convert import convert

        convert(source, destination, overwrite=True)
    else:
        pickle.loads(Path(source).read_bytes()).save(destination)


def kill_often(
    what: str, run: Callable[[float | None, str], float], look: Callable[[], str], count: int, rng: random.Random
) -> list[Kill]:
    """Repeatedly kills a run that replaces "old" by "new", or the reverse.

    Args:
      run: writes "old" or "new", for at most so many seconds; returns how many it took.
      look: returns "old", "new", or a description of the problem.
    """
    from tqdm import tqdm

    usual = max(run(None, "old"), run(None, "new"))
    run(None, "old")
    kills, held = list[Kill](), "old"
    for _ in tqdm(range(count), desc=what, disable=None):
        seconds = rng.uniform(0, _LATE * usual)
        run(seconds, "new" if held == "old" else "old")
        left = look()
        kills.append(Kill(what, round(seconds, 4), left))
        if left not in ("old", "new"):
            run(None, "old")
            left = "old"
        held = left
    return kills


def conversions(folder: Path, count: int, rng: random.Random) -> list[Kill]:
    """Kills `convert --overwrite` over a model of another width, so that a mixture of both would be invalid."""
    import tiny_llama

    import tide_jax

    folder.mkdir()
    widths = {"old": 12, "new": 24}
    for name, width in widths.items():
        settings = tiny_llama.CONFIG | {"hidden_size": width, "vocab_size": 4000}
        tiny_llama.save(folder / name, tiny_llama.random_tensors(settings), **settings)
    forks, destination = Forks(), folder / "converted"

    def look() -> str:
        try:
            width = tide_jax.load(destination, "float32").config.hidden_size
        except Exception as error:
            return reason(error)
        return {width: name for name, width in widths.items()}[width]

    def run(seconds: float | None, name: str) -> float:
        return forks.run(seconds, "convert", str(folder / name), str(destination))

    try:
        return kill_often("convert --overwrite", run, look, count, rng)
    finally:
        forks.close()


def router_files(folder: Path, count: int, rng: random.Random) -> list[Kill]:
    """Kills `Routers.save` over other routers, with heads and translators."""
    import jax
    import numpy as np

    import tide_jax
    from tide_jax.exits.router import RouterMetadata, model_identity
    from tide_jax.testing import random_routers, tiny_config, tiny_decoder

    folder.mkdir()
    model, made = tiny_decoder(tiny_config(num_layers=6)), {}
    values = model_identity(model) | {"config": {"checkpoint_interval": 2}}
    for seed, name in enumerate(("old", "new")):
        routers = random_routers(model.config, affine=True, translator_rank=8, seed=seed)
        routers = dataclasses.replace(routers, metadata=RouterMetadata.from_dict(values))
        made[name] = np.asarray(routers.routers[0].down)
        (folder / name).write_bytes(pickle.dumps(jax.tree.map(np.asarray, routers)))
    forks, destination = Forks(), folder / "routers.safetensors"

    def look() -> str:
        try:
            found = np.asarray(tide_jax.Routers.load(destination, model=model).routers[0].down)
        except Exception as error:
            return reason(error)
        return next((name for name, down in made.items() if np.array_equal(down, found)), "other routers")

    def run(seconds: float | None, name: str) -> float:
        return forks.run(seconds, "save", str(folder / name), str(destination))

    try:
        return kill_often("Routers.save", run, look, count, rng)
    finally:
        forks.close()


def calibrations(folder: Path, count: int, rng: random.Random) -> list[Kill]:
    """Kills `calibrate --work-dir`, which runs again after each kill on the remains; every third run may finish."""
    from tqdm import tqdm

    import tide_jax
    from scripts.reliability.fuzz_corpus import bpe

    model, work, output = folder / "model", folder / "work", folder / "routers.safetensors"
    folder.mkdir()
    _chat_model(folder, bpe())
    text = folder / "texts.txt"
    words = ("the", "tide", "comes", "in", "and", "goes", "out", "again", "at", "noon")
    lines = (" ".join(rng.choices(words, k=40)) for _ in range(_TEXTS))
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "tide_jax.cli", "calibrate", str(model), "--text", str(text)]
    command += ["--output", str(output), "--work-dir", str(work), "--checkpoint-interval", "1", "--min-layers", "1"]

    def run(seconds: float | None) -> tuple[int, float, str]:
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            try:
                words = process.communicate(timeout=seconds)[1]
            except subprocess.TimeoutExpired:
                process.kill()
                words = process.communicate()[1]
        return process.returncode, time.perf_counter() - start, words

    def look(before: bytes) -> str:
        try:
            tide_jax.Routers.load(output, model=tide_jax.load(model, "float32"))
        except Exception as error:
            return reason(error)
        return "old" if output.read_bytes() == before else "new"

    code, usual, told = run(None)
    if code:
        raise SystemExit(f"calibrate failed without being killed: {told}")
    kills = list[Kill]()
    for number in tqdm(range(count), desc="calibrate --work-dir", disable=None):
        if number % 3 == 0:
            for path in sorted(work.iterdir()):
                path.unlink()
        before, seconds = output.read_bytes(), rng.uniform(0, _LATE * usual)
        run(seconds)
        kills.append(Kill("calibrate --work-dir", round(seconds, 2), look(before)))
        if number % 3 == 2 and (finished := run(None))[0]:
            told = " ".join(finished[2].split())[-200:]
            kills.append(Kill("calibrate --work-dir, run again", 0.0, f"exit code {finished[0]}: {told}"))
    return kills


def _chat_model(folder: Path, tokenizer: Any) -> None:
    """Makes a converted model of three layers with a tokenizer."""
    import tiny_llama

    from convert import convert

    settings = tiny_llama.CONFIG | {"vocab_size": 320, "max_position_embeddings": 256, "num_hidden_layers": 3}
    tiny_llama.save(folder / "source", tiny_llama.random_tensors(settings), **settings)
    tokenizer.save_pretrained(folder / "source")
    convert(folder / "source", folder / "model")


def main() -> int:
    """Kills runs; exit code 1 if one left anything but the old files or the new ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--convert", type=int, default=200, help="conversions to kill")
    parser.add_argument("--save", type=int, default=200, help="saves of routers to kill")
    parser.add_argument("--calibrate", type=int, default=15, help="calibrations to kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON report")
    args = parser.parse_args()
    if args.serve:
        serve()
        return 0
    kills = list[Kill]()
    with tempfile.TemporaryDirectory(prefix="tide-kills-") as scratch:
        for name, kill, count in (
            ("convert", conversions, args.convert),
            ("save", router_files, args.save),
            ("calibrate", calibrations, args.calibrate),
        ):
            kills += kill(Path(scratch) / name, count, random.Random(f"{args.seed} {name}")) if count else []
    report = summarise(kills)
    save(args.out, {"seed": args.seed, "machine": machine(), **report})
    for name, counts in report["left"].items():
        print(name, counts)
    return 1 if report["failures"] else 0


def summarise(kills: list[Kill]) -> dict[str, Any]:
    """Counts of what was left, by run, and every failure."""
    whats = dict.fromkeys(kill.what for kill in kills)
    wrong = [kill for kill in kills if kill.left not in ("old", "new")]

    def counted(what: str) -> dict[str, int]:
        found = Counter(k.left if k.left in ("old", "new") else "neither" for k in kills if k.what == what)
        return dict(sorted(found.items()))

    return {
        "kills": sum(kill.left in ("old", "new") or "run again" not in kill.what for kill in kills),
        "left": {what: counted(what) for what in whats},
        "failures": [kill._asdict() for kill in wrong],
    }


if __name__ == "__main__":
    sys.exit(main())

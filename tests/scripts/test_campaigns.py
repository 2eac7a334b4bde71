"""The scripts that break files and kill runs: the same seed breaks the same, and what comes of it is told apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny_llama

from scripts.reliability import fuzz_files, fuzz_mutations, fuzz_worker, kill_runs
from tide_jax.errors import TideError


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two checkpoints of one kind."""
    for name in ("one", "two"):
        folder = tiny_llama.save_sharded(tmp_path / "corpus" / "hf" / name)
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
        (folder / "model.gguf").write_bytes(b"GGUF\3\0\0\0" + b"llama.block_count" + bytes(200))
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path / "corpus"


def test_a_seed_is_a_case(corpus: Path, tmp_path: Path) -> None:
    found = {}
    for seed in range(150):
        first = fuzz_worker.make_case(seed, corpus, tmp_path / "first")
        second = fuzz_worker.make_case(seed, corpus, tmp_path / "second")
        assert (first.damage, first.converts) == (second.damage, second.converts)
        assert files(first.folder) == files(second.folder)
        found[seed] = files(first.folder) != files(corpus / first.kind / first.name)
    assert sum(found.values()) > 130, "most damage is some"


@pytest.mark.parametrize("kind", ["BYTES", "JSON", "SAFETENSORS", "GGUF"])
@pytest.mark.parametrize("data", [b"", b"{", b"{}", b"[1]", b'{"a": {"b": [1, "x"]}}', bytes(9), b"\xff" * 40])
def test_changes_take_any_bytes(kind: str, data: bytes) -> None:
    for change in getattr(fuzz_mutations, kind).values():
        for seed in range(20):
            assert isinstance(change(Random(seed), data), bytes)


def test_headers_stay_readable_where_they_are_what_changes(tmp_path: Path) -> None:
    data = (tiny_llama.save(tmp_path / "source") / "model.safetensors").read_bytes()
    for seed in range(20):
        changed = fuzz_mutations.SAFETENSORS["tensor"](Random(seed), data)
        length = int.from_bytes(changed[:8], "little")
        assert isinstance(json.loads(changed[8 : 8 + length]), dict)


def fails(error: BaseException) -> Callable[[], bool]:
    def run() -> bool:
        raise error

    return run


class AtLength(TideError):
    """An error that does not shorten its words, as `TideError` does."""

    def __str__(self) -> str:
        return "x" * 301


@pytest.mark.parametrize(
    ("opens", "outcome"),
    [
        (lambda: True, "accepted"),
        (lambda: False, "nan"),
        (fails(TideError("x is damaged: get it again")), "refused"),
        (fails(AtLength()), "refused at length"),
        (fails(TideError("x" * 301)), "refused"),
        (fails(TideError("two\nlines")), "refused at length"),
        (fails(MemoryError()), "memory"),
        (fails(RuntimeError("RESOURCE_EXHAUSTED: Out of memory")), "memory"),
        (fails(KeyError("a")), "raw"),
        (fails(SystemExit(3)), "raw"),
    ],
)
def test_outcomes(opens: Callable[[], bool], outcome: str) -> None:
    assert fuzz_worker.judge(opens)["outcome"] == outcome


class Fake:
    """A worker whose cases end as their number says."""

    def run(self, seed: int) -> dict[str, Any]:
        outcome = fuzz_files.OUTCOMES[seed % len(fuzz_files.OUTCOMES)]
        return {"seed": seed, "kind": "hf", "outcome": outcome, "message": "m" * seed}

    def stop(self) -> None: ...


def test_a_campaign_is_counted() -> None:
    workers: list[Any] = [Fake(), Fake()]
    results = fuzz_files.run_all(range(17), workers)
    assert [result["seed"] for result in results] == list(range(17))
    summary = fuzz_files.summarise(results)
    assert summary["cases"] == sum(summary["outcomes"].values()) == 17
    assert summary["outcomes"]["refused"] == 3
    assert summary["longest_message"] == 16
    assert {failure["outcome"] for failure in summary["failures"]} == set(fuzz_files.FAILURES)


def test_a_worker_that_dies_is_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a program that answers once, then ends, and then never answers."""
    program = tmp_path / "worker.py"
    program.write_text(
        "import os, sys, time\n"
        "out = int(sys.argv[-1])\n"
        "os.write(out, b'{\"ready\": 1}\\n')\n"
        "for line in sys.stdin:\n"
        '    if line == \'0\\n\': os.write(out, b\'{"seed": 0, "outcome": "refused"}\\n\')\n'
        "    elif line == '1\\n': os.kill(os.getpid(), 9)\n"
        "    else: time.sleep(60)\n"
    )
    monkeypatch.setattr(fuzz_files, "WORKER", (str(program),))
    worker = fuzz_files.Worker(tmp_path, tmp_path, 10, 0.5)
    found = [worker.run(seed)["outcome"] for seed in (0, 1, 0, 2, 0)]
    worker.stop()
    assert found == ["refused", "crash", "refused", "time-out", "refused"]


def test_kills_are_counted() -> None:
    left = {"value": "nothing"}

    def run(seconds: float | None, name: str) -> float:
        done = seconds is None or seconds > 0.5
        left["value"] = name if done else left["value"]
        return 1.0

    kills = kill_runs.kill_often("save", run, lambda: left["value"], 30, Random(0))
    summary = kill_runs.summarise([*kills, kill_runs.Kill("save", 0.1, "OSError: neither")])
    assert summary["left"]["save"]["neither"] == 1
    assert summary["left"]["save"]["old"] + summary["left"]["save"]["new"] == 30
    assert summary["kills"] == 31
    assert [failure["left"] for failure in summary["failures"]] == ["OSError: neither"]

"""What the GPU table, the targets and the list of proven kernels make of a report of scripts/verify_gpu.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pallas_kernels import exit_step as package
from pallas_kernels import selection
from pallas_kernels.exit_step import exit_step, reference
from scripts import verify_gpu
from scripts.gpu import op_table as gpu_op_table
from scripts.gpu import report as gpu_report
from scripts.gpu import targets as gpu_targets
from scripts.gpu.kernel_hash import kernel_hash
from scripts.gpu.table import gpu_table

ROOT = Path(__file__).resolve().parents[2]
Report = dict[str, Any]


def on_gpu(**changes: Any) -> Report:
    """A report as a GPU might make it."""

    def op(**fields: Any) -> Report:
        given = {"op": "exit_step", "implementation": "pallas_triton", "dtype": "bfloat16", "D": 4096, "N": 1}
        measured = {"us": 3.0, "floor_us": 1.0, "within_target": True, "speedup": 2.0}
        return given | measured | {"max_error": 1e-7, "flips": 0, "right": True} | fields

    def step(batch: int, variant: str, ms: float, **fields: Any) -> Report:
        return {"batch": batch, "variant": variant, "ms_per_step": ms, "tokens_per_second": 1e3 / ms} | fields

    def mix(batch: int, gain: float) -> Report:
        return step(batch, "mean 0.930: 7 of 50 steps exit after 16", 5.0, gain=gain, mean_depth=0.93)

    full = {"gain": 0.0, "floor_ms": 4.5, "share_of_floor": 0.9}
    rows = [
        step(1, "full depth", 5.0, **full),
        step(1, "routers on, no exits", 5.03, gain=-0.006, overhead=0.006),
        step(1, "forced 16", 2.7, gain=0.85, skip_efficiency=0.96, mean_depth=0.5),
        mix(1, 0.067),
        mix(8, 0.05),
    ]
    machine = {"device": "NVIDIA H100 80GB HBM3", "date": "2026-01-01", "python": "3.12", "versions": {"jax": "0.11.2"}}
    return {
        "platform": "gpu",
        "tiny": False,
        "kernels_sha256": "0123456789abcdef",
        "machine": machine,
        "roof": {"gb_s": 3000.0, "data_sheet_gb_s": 3352, "launch_us": 2.0},
        "ops": [op(), op(N=16, speedup=0.9), op(implementation="reference", speedup=None)],
        "decode": {"rows": rows},
        "prefill": [{"batch": 1, "tokens": 512, "ms": 20.0, "tokens_per_second": 25600.0}],
        "smollm2": {"rows": []},
    } | changes


def cells(table: str) -> dict[str, list[str]]:
    """What, and the columns behind it."""
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {line[0].removeprefix("| "): [line[2], line[3].removesuffix(" |").strip()] for line in lines[1:]}


def write(path: Path, report: Report) -> Path:
    path.write_text(json.dumps(report))
    return path


def test_without_a_gpus_results_every_row_is_not_yet_run(tmp_path: Path) -> None:
    missing = gpu_table(tmp_path / "none.json")
    assert {tuple(row) for row in cells(missing).values()} == {("not yet run on a GPU", "")}
    assert gpu_table(write(tmp_path / "cpu.json", on_gpu(platform="cpu"))) == missing, (
        "a processor's results are no GPU's"
    )
    assert gpu_table(write(tmp_path / "tiny.json", on_gpu(tiny=True))) == missing
    assert gpu_table(write(tmp_path / "other.json", on_gpu(platform="tpu"))) == missing


def test_the_table_says_what_was_measured_and_whether_it_suffices(tmp_path: Path) -> None:
    table = gpu_table(write(tmp_path / "gpu.json", on_gpu()), current="0123456789abcdef")
    found = cells(table)
    assert "stale" not in table
    assert "NVIDIA H100 80GB HBM3, 2026-01-01" in table
    assert found["exit step, N = 1, D = 4096"][1] == "yes"
    assert found["exit step, N = 16, D = 4096"][1] == "no", "slower than jitted JAX"
    assert found["exit step, N = 256, D = 4096"] == ["not yet run on a GPU", ""]
    assert found["decode, full depth, batch 1"] == ["90%: 200.0 tokens/s, 5.00 ms (floor 4.50)", "yes"]
    assert found["routers on, no exits, batch 1"] == ["+0.6%", "yes"]
    assert found["routers on, no exits, batch 8"] == ["not yet run on a GPU", ""]
    assert found["skip efficiency, batch 1"] == ["0.96 (16 layers)", "yes"]
    assert found["throughput, batch 1, mean depth 0.93"][1] == "yes"
    assert found["throughput, batch 8, mean depth 0.93"][1] == "no"
    assert "66% of what is possible" in found["throughput, batch 8, mean depth 0.93"][0]
    assert found["throughput, batch 8, mean depth 0.93"][0].endswith("the paper's 8.1%: not reached")


def test_a_model_that_could_not_be_made_leaves_its_rows_open() -> None:
    failed = {"error": "RESOURCE_EXHAUSTED: out of memory"}
    found = {t["what"]: t["found"] for t in gpu_targets.evaluate(on_gpu(decode=failed, prefill=[failed]))}
    assert found["throughput, batch 1, mean depth 0.93"] is None
    assert found["decode, full depth, batch 1"] is None


def test_rows_that_did_not_go_as_deep_as_they_should_count_for_nothing() -> None:
    report = on_gpu()
    for row in report["decode"]["rows"]:
        row["as_forced"] = row["variant"] != "forced 16"
    found = {t["what"]: t["found"] for t in gpu_targets.evaluate(report)}
    assert found["skip efficiency, batch 1"] is None
    assert found["routers on, no exits, batch 1"] == "+0.6%"


def test_results_of_other_kernels_are_stale(tmp_path: Path) -> None:
    table = gpu_table(write(tmp_path / "gpu.json", on_gpu()), current="ffff")
    assert "**stale**" in table
    assert cells(table)["routers on, no exits, batch 1"][0] == "+0.6% (stale)"
    assert cells(table)["routers on, no exits, batch 8"][0] == "not yet run on a GPU"


@pytest.mark.parametrize("changes", [{"share_of_floor": 0.79}, {"overhead": 0.021}, {"skip_efficiency": 0.86}])
def test_targets_are_missed_by_a_little(changes: Report, tmp_path: Path) -> None:
    report = on_gpu()
    for row in report["decode"]["rows"]:
        row |= {key: value for key, value in changes.items() if key in row}
    met = [target["met"] for target in gpu_targets.evaluate(report)]
    assert met.count(False) == [t["met"] for t in gpu_targets.evaluate(on_gpu())].count(False) + 1


def proving(**changes: Any) -> Report:
    """A report in which the first kernel of each operation was right everywhere, with `changes` in one row."""
    rows = []
    for op in gpu_op_table.OPS:
        rows.append({"op": op.name, "implementation": "reference", "right": True})
        rows += [{"op": op.name, "implementation": "pallas_triton", "right": True, "speedup": 1.5}] * 2
        rows.append({"op": op.name, "implementation": "triton", "refused": "not here"})
    rows[1] = rows[1] | changes
    return {"ops": rows}


def test_kernels_are_proven_where_all_of_their_rows_are_right() -> None:
    every = {op.choices.operation: ["pallas_triton"] for op in gpu_op_table.OPS}
    others = {name: kernels for name, kernels in every.items() if name != "exit_step"}
    assert gpu_report.proven(proving()) == every
    assert gpu_report.proven(proving(right=False)) == others
    slow = proving()
    slow["ops"][1:3] = [row | {"speedup": 0.9} for row in slow["ops"][1:3]]
    assert gpu_report.proven(slow) == others
    fitting = proving()
    fitting["ops"].append({"op": "exit_step", "implementation": "pallas_triton", "D": 8, "refused": "too narrow"})
    assert gpu_report.proven(fitting) == every, "what a kernel does not take is not held against it"

    partly = proving()
    del partly["ops"][2]["right"]
    assert gpu_report.proven(partly) == others, "a row that was not run"
    partly["ops"] = [row for row in proving()["ops"] if row["op"] != "exit_project, affine head"]
    del every["exit_project"]
    assert gpu_report.proven(partly) == every


def test_what_is_proven_is_written_for_these_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At home, from the report of a machine that is gone."""
    monkeypatch.setattr(gpu_report, "PROVEN", tmp_path / "proven.json")
    made, found = on_gpu(**proving(), kernels_sha256=kernel_hash()), tmp_path / "gpu.json"
    found.write_text(json.dumps(made))
    assert verify_gpu.main(["--prove", str(found)]) == 0
    written = json.loads((tmp_path / "proven.json").read_text())
    assert written["kernels_sha256"] == kernel_hash()
    assert written["operations"] == gpu_report.proven(proving())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"platform": "cpu"}, "made on a GPU, not on a cpu"),
        ({"kernels_sha256": "0123456789abcdef"}, "made with other kernels"),
        (None, "is no report of verify_gpu.py"),
    ],
)
def test_what_proves_nothing_is_refused(
    changes: dict[str, Any] | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_report, "PROVEN", tmp_path / "proven.json")
    if changes is not None:
        made = on_gpu(**proving()) | {"kernels_sha256": kernel_hash()} | changes
        (tmp_path / "gpu.json").write_text(json.dumps(made))
    assert verify_gpu.main(["--prove", str(tmp_path / "gpu.json")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "proven.json").exists()


def test_none_takes_what_is_noted_as_proven(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def chosen() -> str:
        exit_step(*given, eps=1e-5)
        return names[-1]

    names = list[str]()
    given = gpu_op_table.OPS[0].make(gpu_op_table.Shape(2, 8, "float32"), np.random.default_rng(0))
    monkeypatch.setattr(selection.Choices, "function", lambda _, name: names.append(name) or reference.exit_step)
    monkeypatch.setattr(selection, "_import_error", lambda module: None)
    monkeypatch.setattr(selection, "_proven_kernels", lambda: {"exit_step": ["mosaic_gpu", "triton"]})
    assert chosen() == "reference", "on a processor"
    assert not caplog.records, "and that is nothing to warn of"
    monkeypatch.setattr(selection, "platform", lambda: "gpu")
    monkeypatch.setattr(package, "_refusal", lambda problem, name: None)
    assert chosen() == "mosaic_gpu"
    monkeypatch.setattr(selection, "_proven_kernels", lambda: {"exit_project": ["mosaic_gpu"]})
    assert chosen() == "reference"


def test_proven_kernels_are_these_very_ones() -> None:
    proven = json.loads((ROOT / "pallas_kernels" / "proven.json").read_text())
    assert not proven["operations"] or proven["kernels_sha256"] == kernel_hash(), "run verify_gpu.py --prove again"
    assert selection._proven_kernels() == proven["operations"]

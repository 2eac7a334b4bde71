"""scripts/verify_gpu.py on a processor: what its report holds."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.exit_step import IMPLEMENTATIONS, ExitStep
from scripts import verify_gpu
from scripts.gpu import decode as gpu_decode
from scripts.gpu import isolated as gpu_isolated
from scripts.gpu import model as gpu_model
from scripts.gpu import op_table as gpu_op_table
from scripts.gpu import ops as gpu_ops
from scripts.gpu import report as gpu_report
from scripts.gpu import smollm2 as gpu_smollm2
from scripts.gpu import targets as gpu_targets
from scripts.gpu import timing as gpu_timing
from scripts.gpu.kernel_hash import kernel_hash
from tide_jax.exits.depth import run_depth
from tide_jax.functional import decode_step
from tide_jax.testing import random_routers, tiny_config, tiny_decoder

ROOT = Path(__file__).resolve().parents[2]
Report = dict[str, Any]
steered = functools.cache(gpu_report._steered)


def broken(implementation: str, *arguments: Any) -> Any:
    if implementation == "pallas_interpret":
        raise ValueError("does not lower\nand more")
    return gpu_op_table._step(implementation, *arguments)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a whole tiny run, in which an operation fails before others."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    fails = gpu_op_table.OPS[0]._replace(name="broken", call=broken, only=lambda shape: shape.rows == 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_report, "OPS", (fails, *gpu_op_table.OPS))
        patch.setattr(gpu_report, "_steered", steered)
        assert verify_gpu.main(["--tiny", "--together", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def report(out: Path) -> Report:
    return json.loads(out.read_text())


@pytest.mark.slow
def test_report_says_what_it_was_made_with(report: Report) -> None:
    assert report["complete"]
    assert report["platform"] == "cpu"
    assert report["tiny"]
    assert report["kernels_sha256"] == kernel_hash()
    assert report["machine"]["versions"]["jax"] == jax.__version__
    assert report["machine"]["date"]
    assert report["roof"]["gb_s"] > 0
    assert "launch_us" in report["roof"]


@pytest.mark.slow
def test_every_case_has_a_row_that_is_measured_and_right(report: Report) -> None:
    for op, shapes in (("exit_step", 4), ("exit_project", 4), ("exit_project, affine head", 4)):
        for name in ("reference", "pallas_interpret"):
            rows = [r for r in report["ops"] if (r["op"], r["implementation"]) == (op, name) and "compiled" in r]
            assert len({(r["dtype"], r["D"], r["N"]) for r in rows}) == shapes
            assert all(r["compiled"] and r["floor_us"] > 0 for r in rows)
            timed = [r for r in rows if "not_timed" not in r]  # other work may hide what takes microseconds
            assert all(0 < r["us_least"] <= r["us"] <= r["us_most"] for r in timed)
            compared = [r for r in rows if "right" in r]
            assert len(compared) == (shapes if name == "pallas_interpret" else 2), "plain JAX: with itself elsewhere"
            assert all(r["right"] and r["max_error"] <= r["tolerance"] and r["flips"] == 0 for r in compared)


@pytest.mark.slow
def test_what_fails_is_a_row_with_its_reason_and_the_rest_goes_on(report: Report) -> None:
    rows = [r for r in report["ops"] if r["op"] == "broken" and r["implementation"] == "pallas_interpret"]
    assert [(r["compiled"], r["error"]) for r in rows] == [(False, "ValueError: does not lower")] * 2
    assert sum(r.get("compiled", False) for r in report["ops"] if r["op"] == "broken") == 2
    refused = [r for r in report["ops"] if r["implementation"] == "triton"]
    assert all("runs on a GPU, this process computes on a cpu" in r["refused"] for r in refused)
    found = {t["what"]: t for t in report["targets"]}
    assert "can't run: exit_step: 'triton' runs on a GPU" in found["exit_step in triton, all shapes"]["found"]
    assert found["exit_step in triton, all shapes"]["met"] is None


@pytest.mark.slow
def test_decoding_goes_as_deep_as_it_is_told_and_the_chain_draws_the_same_tokens(report: Report) -> None:
    rows = report["decode"]["rows"]
    assert {row["batch"] for row in rows} == {1, 2}
    assert not [row for row in rows if "error" in row or "not_run" in row]
    assert all(row["as_forced"] for row in rows if row["variant"] != "head only")
    assert [row["mean_depth"] for row in rows if row["variant"] == "forced 2"] == pytest.approx([2 / 3] * 2)
    drawn = {(row["batch"], row["variant"]): row["drawn"] for row in rows}
    for batch in (1, 2):
        chains = [name for b, name in drawn if b == batch and name.startswith("cond chain, ")]
        assert len(chains) == 3
        for name in chains:
            own = name.removeprefix("cond chain, ")
            assert drawn[batch, name] == drawn[batch, "routers on, no exits" if own == "no exits" else own]
        assert drawn[batch, "full depth"] == drawn[batch, "routers on, no exits"]
    assert all("share_of_floor" in row for row in rows if row["variant"] == "full depth")
    assert all("skip_efficiency" in row for row in rows if row["variant"].startswith("forced"))
    assert all("overhead" in row for row in rows if row["variant"] == "routers on, no exits")


@pytest.mark.slow
def test_prompts_are_timed(report: Report) -> None:
    (row,) = report["prefill"]
    assert (row["batch"], row["tokens"]) == (1, 16)
    assert 0 < row["ms_least"] <= row["ms"] <= row["ms_most"]
    assert {g["measure"] for g in report["gains"]} == {"throughput, batch 1", "throughput, batch 2"}


@pytest.mark.slow
def test_without_a_model_random_weights_show_whether_tokens_are_the_same(report: Report) -> None:
    assert report["smollm2"]["model"] == "random weights of the shape of a tiny model"
    rows = [row for row in report["smollm2"]["rows"] if "error" not in row]
    assert {row["implementation"] for row in rows} == {"reference", "pallas_interpret"}
    assert all(row["same_tokens"] and row["same_exits"] for row in rows)
    assert any(row["tokens_that_exit"] > 0 for row in rows)


def test_a_model_that_is_not_there_is_a_line(tmp_path: Path) -> None:
    budget = gpu_timing.Budget(5.0, ["smollm2"])
    found = gpu_smollm2.run_model(tmp_path / "nothing", None, 8, budget, lambda text: None)
    assert found == {"skipped": f"{tmp_path / 'nothing'} is no converted model, as tide-jax convert writes it"}


@pytest.mark.slow
def test_parts_can_be_run_again_and_what_time_does_not_suffice_for_is_noted(out: Path, report: Report) -> None:
    again = ["--tiny", "--out", str(out), "--only", "ops", "--ops", "exit_project", "--minutes", "1e-9"]
    assert verify_gpu.main(again) == 0
    found = json.loads(out.read_text())
    assert found["decode"] == report["decode"]
    rows = {
        op: [r for r in found["ops"] if r["op"] == op and "refused" not in r] for op in ("exit_step", "exit_project")
    }
    assert rows["exit_step"] == [r for r in report["ops"] if r["op"] == "exit_step" and "refused" not in r]
    assert {r["not_run"] for r in rows["exit_project"]} == {"not run: no time was left"}
    found["kernels_sha256"] = "of other sources"
    out.write_text(json.dumps(found))
    assert verify_gpu.main(again) == 0
    assert json.loads(out.read_text())["decode"] is None, "other kernels' results are not kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no GPU here; --tiny runs tiny shapes"),
        (["--tiny", "--ops", "magic"], "no operation magic; there are exit_step"),
    ],
)
def test_what_cannot_run_is_refused_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify_gpu.main([*arguments, "--out", str(tmp_path / "gpu.json")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Measuring.


def test_chains_run_as_often_as_they_say_and_leave_their_arguments_alone() -> None:
    x, y = jnp.arange(6, dtype=jnp.float32).reshape(2, 3), jnp.ones((2, 3))
    counted = jax.jit(gpu_timing.chained(lambda x, count: count + x, 5, in_place=1))
    found, _ = counted([(x, y), (2 * x, y)])
    np.testing.assert_array_equal(found, y + 7 * x, err_msg="the sets in turn: x, 2x, x, 2x, x")
    np.testing.assert_array_equal(jax.jit(gpu_timing.chained(lambda x: 2 * x, 4))([(x,), (y,)])[0], 2 * y)


@pytest.mark.parametrize("in_place", [None, 1])
def test_every_call_of_a_chain_stays_in_the_program(in_place: int | None) -> None:
    """Equal calls whose results nobody reads are what compilers remove. Processors' compilers ignore the barrier."""
    given = [(jnp.ones((2, 3)), jnp.ones((2, 3)))]
    for call, expected in ((lambda x, out: jnp.sin(x), 6), (None, 0)):
        text = jax.jit(gpu_timing.chained(call, 6, in_place)).lower(given).as_text()
        assert text.count("stablehlo.sine") == expected
        assert text.count("optimization_barrier") == 6


def test_times_within_the_noise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not made larger than nothing, as if they had been measured."""
    times = {"run": iter([5.0, 6.0, 7.0]), "empty": iter([4.0, 4.0, 4.0]), "noisy": iter([5.0, 4.5, 7.0])}
    monkeypatch.setattr(gpu_timing, "seconds", lambda run: next(times[run()]))
    monkeypatch.setattr(gpu_timing.jax, "block_until_ready", lambda value: value)
    found = gpu_timing.per_call(lambda: "run", lambda: "empty", 2, 3)
    assert found == (1.0, 0.5, 1.5)
    times["empty"] = iter([4.6, 4.6, 4.6])
    with pytest.raises(gpu_timing.Noise, match="within the noise, -"):
        gpu_timing.per_call(lambda: "noisy", lambda: "empty", 1, 3)


def test_the_last_part_that_runs_may_use_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(gpu_timing.time, "monotonic", lambda: now[0])
    both, one = gpu_timing.Budget(1, ["decode", "ops"]), gpu_timing.Budget(1, ["decode"])
    now[0] = 50.0
    assert both.over("decode")
    assert not both.over("ops")
    assert not one.over("decode")
    now[0] = 61.0
    assert both.over("ops")


def decided(scores: list[float], exits: list[bool]) -> ExitStep:
    left = jnp.asarray(exits)
    layers = jnp.full((len(exits),), 11, jnp.int32)
    return ExitStep(jnp.asarray(scores, jnp.float32), left, ~left, layers, jnp.any(left), jnp.any(~left))


def test_flips_count_away_from_the_threshold_only() -> None:
    wanted = decided([0.2, 0.5, 0.9], [False, False, True])
    compare = gpu_op_table._step_difference
    near = compare(decided([0.2, 0.500001, 0.9], [False, True, True]), wanted, ())
    assert near.flips == 0
    assert 0 < near.error < 1e-5
    assert compare(decided([0.2, 0.5, 0.9], [True, False, True]), wanted, ()).flips == 2, "exits and active"
    assert compare(wanted._replace(any_exits=jnp.asarray(False)), wanted, ()).flips == 1
    assert compare(decided([float("nan"), 0.5, 0.9], [False, False, True]), wanted, ()).error == float("inf")


def test_rows_that_stay_have_to_stay() -> None:
    shape = gpu_op_table.Shape(4, 8, "float32")
    op = next(op for op in gpu_op_table.OPS if op.name == "exit_project")
    given = op.make(shape, np.random.default_rng(0))
    wanted = op.call("reference", *given)
    assert op.compare(wanted, wanted, given) == (0.0, 0)
    assert op.compare(wanted.at[1, 2].add(0.001), wanted, given).flips == 1
    assert op.compare(wanted.at[0, 2].add(0.1), wanted, given).error > op.tolerance("float32")


def test_every_operation_has_its_row() -> None:
    assert {op.choices.operation: op.choices.on_gpu for op in gpu_op_table.OPS} == gpu_targets.KERNELS
    folders = {path.parent.name for path in (ROOT / "pallas_kernels").glob("*/reference.py")}
    on_gpu = {name for name in folders if importlib.import_module(f"pallas_kernels.{name}").IMPLEMENTATIONS.on_gpu}
    assert on_gpu == set(gpu_targets.KERNELS)


def test_an_implementation_that_does_not_compile_at_all_is_one_line() -> None:
    """As with a release of jax_triton that does not fit the installed Triton."""

    def call(implementation: str, *arguments: Any) -> Any:
        if implementation == "odd":
            raise TypeError("object.__new__() takes one argument\nand more")
        return gpu_op_table._step("reference", *arguments)

    choices = SimpleNamespace(
        operation="exit_step", names=("reference", "odd", "even"), on_gpu=("odd", "even"), refusal=lambda name: None
    )
    op = gpu_op_table.OPS[0]._replace(choices=choices, call=call)
    roof = gpu_ops.Roof(1e9, None)
    rows = gpu_ops.run_ops([op], gpu_ops.Matrix.tiny(), roof, gpu_timing.Budget(5.0, ["ops"]), lambda text: None)
    (odd,) = [row for row in rows if row["implementation"] == "odd"]
    assert odd["refused"] == "exit_step: 'odd' does not compile: TypeError: object.__new__() takes one argument"
    assert all(row["right"] for row in rows if row["implementation"] == "even")


def arguments(out: Path, *given: str) -> Any:
    return verify_gpu.parse(["--tiny", "--out", str(out), *given])


@pytest.mark.slow
def test_kernels_run_in_processes_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert verify_gpu.main(["--tiny", "--only", "ops", "--ops", "exit_project", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["ops"]
    assert {(row["op"], row["implementation"]) for row in rows if row.get("right")} == {
        ("exit_project", "reference"),
        ("exit_project", "pallas_interpret"),
    }


def test_a_kernel_that_never_ends_or_dies_costs_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first hangs after a batch that it wrote, the second is killed, the third is right."""
    right = {"op": "kv_fill", "implementation": "pallas_interpret", "right": True, "max_error": 0.0}
    row = {"op": "exit_step", "implementation": "pallas_interpret", "D": 8, "right": True}
    programs = {
        "exit_step": f"open(out, 'w').write({json.dumps(json.dumps({'ops': [row]}))}); import time; time.sleep(60)",
        "exit_project": "import os; os.kill(os.getpid(), 9)",
        "kv_fill": f"open(out, 'w').write({json.dumps(json.dumps({'ops': [right]}))})",
    }

    def command(args: Any, entries: list[str], kernel: str, part: Path) -> list[str]:
        return [sys.executable, "-c", f"out = {str(part)!r}; {programs[entries[0]]}"]

    monkeypatch.setattr(gpu_isolated, "command", command)
    args, budget = arguments(tmp_path / "gpu.json", "--limit", "2"), gpu_timing.Budget(5.0, ["ops"])
    kept = list[int]()
    rows = gpu_isolated.run_isolated(list(gpu_op_table.OPS), args, budget, print, lambda rows: kept.append(len(rows)))
    own = {name: [row for row in rows if row["op"] == name] for name in programs}
    assert own["exit_step"][0] == row, "what was measured before stays"
    assert [r["error"] for r in own["exit_step"][1:]] == ["no end after 2 s: stopped"]
    assert own["exit_project"][0]["error"].startswith("ended with status -9")
    assert own["kv_fill"] == [right]
    assert len(kept) == 3


def test_kernels_that_are_synchronised_by_hand_come_last() -> None:
    order = list(gpu_isolated.kernels(list(gpu_op_table.OPS), tiny=False))
    assert sorted(order) == sorted((name, kernel) for name, own in gpu_targets.KERNELS.items() for kernel in own)
    assert order[-1] == ("exit_step", "mosaic_gpu")


def test_results_of_another_gpu_are_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    before = {"platform": "cpu", "tiny": True, "kernels_sha256": kernel_hash(), "machine": {"device": "H200"}}
    out.write_text(json.dumps(before))
    assert verify_gpu.main(["--tiny", "--out", str(out), "--only", "decode"]) == 2
    assert "has results of a H200, and this is a cpu: name another file with --out" in capsys.readouterr().err
    assert json.loads(out.read_text()) == before


def test_kernels_have_targets_of_their_own() -> None:
    """One that can't be compiled, or is wrong, takes nothing from the others."""
    right = {"op": "kv_fill", "implementation": "pallas_triton", "D": 8, "right": True, "max_error": 0.0, "flips": 0}
    wrong = right | {"implementation": "triton", "right": False, "max_error": 2.0}
    refused = {"op": "exit_project", "implementation": "triton", "refused": "does not compile"}
    found = {t["what"]: (t["met"], t["found"]) for t in gpu_targets.evaluate({"ops": [right, wrong, refused]})}
    assert found["kv_fill in pallas_triton, all shapes"][0] is True
    assert found["kv_fill in triton, all shapes"] == (False, "0 of 1 right, largest error 2.0e+00, 0 flips")
    assert found["exit_project in triton, all shapes"] == (None, "can't run: does not compile")
    assert found["exit_project in pallas_triton, all shapes"] == (None, None)


# The model whose tokens say how deep they go.


def test_tokens_leave_where_their_ids_say() -> None:
    made = steered(True)
    wanted = np.random.default_rng(0).choice(made.depths, (3, 40))
    wanted[:, 0] = made.layers  # position 0 never leaves
    ids = jnp.asarray(made.ids(wanted))
    positions = jnp.broadcast_to(jnp.arange(40, dtype=jnp.int32), ids.shape)
    out = run_depth(made.model, ids, positions, None, made.exits)
    np.testing.assert_array_equal(np.asarray(out.exit_layers) + 1, wanted)


def test_the_chain_of_conditionals_is_the_step_when_rows_part() -> None:
    made = steered(True)
    cache = gpu_decode.filled_cache(made, 3, 5, 2)
    ids, positions = jnp.asarray(made.ids([1, 2, 3])), jnp.full((3,), 5, jnp.int32)
    running = jnp.asarray([True, True, False])
    for active in (jnp.ones((3,), bool), running):
        given = made.model, cache, ids, positions, active, made.exits
        wanted, found = jax.jit(decode_step)(*given), jax.jit(gpu_decode.cond_chain_step)(*given)
        np.testing.assert_array_equal(found.exit_layers, wanted.exit_layers)
        assert found.layers_executed == wanted.layers_executed == (3 if active.all() else 2)
        np.testing.assert_allclose(found.logits[active], wanted.logits[active], atol=1e-4)
        if active.all():  # what is written for rows that do not run is never read
            jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), found.cache, wanted.cache)


def test_mixes_come_to_the_depth_that_is_asked_for() -> None:
    model = SimpleNamespace(config=SimpleNamespace(num_layers=32))
    exits = SimpleNamespace(routers=SimpleNamespace(exit_points=range(3, 31, 4)))
    made = gpu_model.Steered(model, exits)
    for wanted, chosen in zip((0.93, 0.93, 0.93, 0.92, 0.9), gpu_decode.mixes(made, 50).values(), strict=True):
        assert chosen.mean() / 32 == pytest.approx(wanted)


def test_implementations_are_compared_token_by_token() -> None:
    model = tiny_decoder(tiny_config(num_layers=2))
    routers, budget = random_routers(model.config, interval=1), gpu_timing.Budget(5, ["smollm2"])
    rows = gpu_smollm2.compare(model, routers, [[3, 4, 5], [6, 7]], 0.5, 6, budget, ["propagate"])
    assert [row["implementation"] for row in rows] == list(IMPLEMENTATIONS.names)
    for row in rows:
        if row["implementation"] in ("reference", "pallas_interpret"):
            assert row["same_tokens"]
            assert row["same_exits"]
            assert 0 < row["tokens_that_exit"] < 1
        else:
            assert "runs on a GPU" in row["error"]


# Hashes, the README, and what counts as proven.


def test_the_hash_is_of_names_and_bytes_of_sources(tmp_path: Path) -> None:
    folder = tmp_path / "pallas_kernels" / "op"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("one")
    first = kernel_hash(tmp_path)
    (folder / "proven.json").write_text("{}")
    assert kernel_hash(tmp_path) == first
    (folder / "a.py").write_text("two")
    second = kernel_hash(tmp_path)
    (folder / "a.py").rename(folder / "b.py")
    assert len({first, second, kernel_hash(tmp_path)}) == 3

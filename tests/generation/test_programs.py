"""Compiled programs: few are kept, each belongs to its function, and what has no memory or is damaged is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tide_jax import TIDE, TideError
from tide_jax.cli.command_line import Parser, execute
from tide_jax.generation import cuda_graphs
from tide_jax.generation.batch import eos_table, row_bucket
from tide_jax.generation.programs import Fixed, Programs, give_back_memory
from tide_jax.testing import tiny_config, tiny_decoder

ROOT = Path(__file__).resolve().parents[2]


def double(x: Any) -> Any:
    return 2 * x


def run(programs: Programs, size: int, function: Any = double) -> float:
    """Seconds of compiling."""
    result, _, compiled = programs.run(function, (), (jnp.ones(size),))
    assert result.shape == (size,)
    return compiled


def test_the_program_not_used_for_the_longest_time_is_dropped() -> None:
    programs = Programs(most=2)
    assert run(programs, 1) > 0
    assert run(programs, 2) > 0
    assert run(programs, 1) == 0
    assert run(programs, 3) > 0  # 2 goes
    assert len(programs) == 2
    assert run(programs, 1) == 0
    assert run(programs, 2) > 0


@pytest.mark.parametrize(
    ("platform", "wanted", "graphs"),
    [("gpu", True, True), ("gpu", None, True), ("gpu", False, False), ("cpu", True, False), ("tpu", None, False)],
)
def test_loops_run_as_graphs_on_a_gpu_unless_told_otherwise(
    platform: str, wanted: bool | None, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other compilers take the options and make nothing of them."""
    programs, seen = Programs(cuda_graphs=wanted), []
    compile_program = jax.stages.Lowered.compile
    monkeypatch.setattr(programs, "_platform", lambda: platform)
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda self, options=None: seen.append(options) or compile_program(self, options)
    )
    cuda_graphs.loops_run_as_graphs.cache_clear()
    assert run(programs, 3) > 0
    assert (seen[-1] == cuda_graphs.OPTIONS) == graphs
    assert len(seen) == (2 if wanted is None and platform == "gpu" else 1), "the self-check compiles a loop"


def test_loops_that_go_wrong_as_graphs_are_launched_from_the_host(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_graphs, "OPTIONS", {"xla_no_such_option": 1})
    cuda_graphs.loops_run_as_graphs.cache_clear()
    assert cuda_graphs.compiler_options("gpu", None) is None
    assert "loops don't run as CUDA graphs here" in caplog.text
    cuda_graphs.loops_run_as_graphs.cache_clear()


@pytest.mark.parametrize("mode", ["full", "lossless"])
def test_a_stream_goes_through_the_model_once(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every step, which takes longer than a step of a small model; weights that change later are seen."""
    taken = []
    flatten = Fixed.__init__
    monkeypatch.setattr(Fixed, "__init__", lambda self, *objects: taken.append(1) or flatten(self, *objects))
    engine = TIDE(tiny_decoder(tiny_config(num_layers=1)))
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": 9, "eos_token_id": []}
    before = [step.tokens.tolist() for step in engine.stream([[1, 2, 3]], **options)]
    assert (len(before), len(taken)) == (9, 1)
    embed = engine.model.embed.kernel
    embed[...] = embed[...][::-1]
    after = engine.generate([[1, 2, 3]], **options).tokens[0].tolist()
    fresh = TIDE(engine.model).generate([[1, 2, 3]], **options).tokens[0].tolist()
    assert after == fresh != [token for (token,) in before]


@pytest.mark.skipif(sys.platform != "linux", reason="counts the mappings that Linux tells of")
def test_a_dropped_program_gives_its_memory_mappings_back() -> None:
    def kernels(x: Any) -> Any:
        for _ in range(20):
            x = jnp.sin(x) @ jnp.ones((x.shape[0], x.shape[0]))
        return x

    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    programs, counts = Programs(most=1), []
    for size in range(2, 14):
        run(programs, size, kernels)
        counts.append(mappings())
    assert counts[-1] - counts[1] < counts[1] - counts[0] + 60, counts


def test_few_programs_are_kept_where_memory_mappings_run_short(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs()
    run(programs, 1)
    run(programs, 2)
    monkeypatch.setattr("tide_jax.generation.programs.short_of_mappings", lambda: True)
    assert run(programs, 1) == 0  # nothing is compiled, so nothing goes
    run(programs, 3)
    assert len(programs) == 1


def test_functions_of_one_name_have_programs_of_their_own() -> None:
    def named(change: int) -> Any:
        def function(x: Any) -> Any:
            return x + change

        return function

    programs, x = Programs(), jnp.zeros(1)
    assert [int(programs.run(named(n), (), (x,))[0][0]) for n in (1, 2)] == [1, 2]


def test_batches_and_stop_ids_come_in_few_sizes() -> None:
    sizes = [row_bucket(n) for n in range(1, 2000)]
    assert sizes[:16] == list(range(1, 17))
    assert sizes == sorted(sizes)
    assert all(0 <= size - n < size / 9 for n, size in enumerate(sizes, 1))
    assert all(row_bucket(size) == size for size in sizes)
    assert len(set(sizes)) < 16 + 8 * 7 + 1
    assert [row_bucket(n, 3) for n in (3, 51, 52)] == [3, 54, 52]  # three devices go on sharing what they can
    assert [eos_table(list(range(n)), 1).shape[1] for n in (1, 2, 3, 4, 5, 9)] == [1, 2, 4, 4, 8, 16]


def test_the_number_of_programs_is_checked() -> None:
    for wrong in (0, -1, None, "many", 1.5):
        with pytest.raises(TideError, match="max_programs="):
            TIDE(tiny_decoder(tiny_config(num_layers=1)), max_programs=wrong)


def test_memory_is_given_back_where_the_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    give_back_memory()
    for error in (OSError, AttributeError, TypeError):

        def absent(_: Any, error: type[Exception] = error) -> Any:
            raise error

        monkeypatch.setattr("ctypes.CDLL", absent)
        give_back_memory()


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes\nmore")]
)
def test_out_of_memory_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(x: Any) -> Any:
        raise error

    with pytest.raises(TideError, match=r"^out of memory \(.*\): use fewer or shorter rows") as caught:
        run(Programs(), 1, fail)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)

    def parser() -> Parser:
        made = Parser()
        made.set_defaults(run=fail)
        return made

    assert execute(parser, []) == 2
    assert capsys.readouterr().err.startswith("error: out of memory (")


def test_a_damaged_program_on_disk_is_replaced(tmp_path: Path) -> None:
    script = (
        "import jax, jax.numpy as jnp, json, warnings\n"
        "warnings.simplefilter('error')\n"
        "from tide_jax.cli.command_line import cache_programs\n"
        "cache_programs()\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)\n"
        "def double_it(x): return jnp.sin(x) * 2\n"
        "jax.jit(double_it)(jnp.ones(3)).block_until_ready()\n"
    )

    def run_it() -> dict[str, bytes]:
        places = {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")} | places
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        files = (tmp_path / "tide_jax").glob("jit_double_it-*-cache")
        return {file.name: file.read_bytes() for file in files}

    first = run_it()
    assert len(first) == 1
    ((name, whole),) = first.items()
    (tmp_path / "tide_jax" / name).write_bytes(whole[: len(whole) // 2])
    again = run_it()
    assert again.keys() == first.keys()
    assert len(again[name]) > len(whole) // 2

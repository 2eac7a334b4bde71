"""The reading pass: what it keeps, going on after an interruption, several devices."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_prompts, tiny_model, with_parameters

from tide_jax import CalibrationConfig, TideError, calibrate
from tide_jax.calibration import work_folder
from tide_jax.calibration.collect import ReadingResult, Sample, collect_states, tokenise
from tide_jax.calibration.reading_plan import ReadingPlan
from tide_jax.calibration.reservoir import Reservoir
from tide_jax.cli.progress import progress_bars
from tide_jax.functional import Decoder
from tide_jax.testing import tiny_config

LENGTHS = tuple(np.random.default_rng(1).choice([6, 8, 15, 16, 30, 31, 32], 60))  # three widths of batches
TEXTS = random_prompts(LENGTHS, seed=2)
EXIT_POINTS = (0, 1)
PER_TOKEN = Reservoir.bytes_per_token(len(EXIT_POINTS), 48)
CONFIG = CalibrationConfig(checkpoint_interval=1, max_length=32, batch_size=4, reservoir_bytes=500 * PER_TOKEN)

ROOT = Path(__file__).resolve().parents[2]


def config(**changes: Any) -> CalibrationConfig:
    return CalibrationConfig(**(vars(CONFIG) | changes))


@functools.cache
def model() -> Decoder:
    return tiny_model(tiny_config(num_layers=3))


def gather(texts: Any = TEXTS, calibration: CalibrationConfig = CONFIG, **options: Any) -> ReadingResult:
    subject = options.pop("model", None) or model()
    samples = tokenise(None, texts, calibration, subject.config.vocab_size)
    return collect_states(subject, samples, options.pop("exit_points", EXIT_POINTS), calibration, **options)


@functools.cache
def uninterrupted() -> ReadingResult:
    return gather()


def assert_equal(found: ReadingResult, expected: ReadingResult) -> None:
    assert found.counts == expected.counts
    for a, b in zip(found.splits, expected.splits, strict=True):
        for name in ("states", "last", "targets"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for a, b in zip(jax.tree.leaves(found.held_out_batches), jax.tree.leaves(expected.held_out_batches), strict=True):
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------------------------------- what is kept


@functools.cache
def all_tokens() -> tuple[np.ndarray, np.ndarray]:
    """Normed states [3, N, 48] and argmax [N] of every token but the first of each text, all texts in one batch."""
    tokens = jnp.asarray([text + [0] * (32 - len(text)) for text in TEXTS], jnp.int32)
    positions = jnp.where(jnp.arange(32)[None] < jnp.asarray(LENGTHS)[:, None], jnp.arange(32)[None], -1)

    @jax.jit
    def run(model: Decoder) -> tuple[jax.Array, jax.Array]:
        outputs = [x for x, _ in model.layer_outputs(tokens, positions, None)]
        return jnp.stack(outputs), jnp.argmax(model(tokens, positions), axis=-1)

    states, targets = map(np.asarray, run(model()))
    learned = np.asarray(positions) >= 1
    normed = states / np.sqrt(np.mean(np.square(states), axis=-1, keepdims=True) + 1e-6)
    return normed[:, learned], targets[learned]


@pytest.mark.matrix
@pytest.mark.parametrize("kept", [100_000, 500, 3])
def test_kept_states_are_those_of_the_plain_model(kept: int) -> None:
    """Every row of a reservoir is one token of some text, with all its states; no token is there twice."""
    found = gather(calibration=config(reservoir_bytes=kept * PER_TOKEN))
    states, targets = all_tokens()
    taken = list[int]()
    for split in found.splits:
        for n in range(len(split)):
            token = int(np.argmin(np.abs(states[2] - split.last[n][None]).max(axis=1)))
            np.testing.assert_allclose(split.last[n], states[2, token], atol=4e-3)
            np.testing.assert_allclose(split.states[:, n], states[:2, token], atol=4e-3)
            assert split.targets[n] == targets[token]
            taken.append(token)
    assert len(taken) == len(set(taken))
    if kept == 100_000:
        assert len(taken) == len(targets) == sum(LENGTHS) - len(LENGTHS) == found.counts["tokens"]
    else:
        assert [len(split) for split in found.splits] == [max(64, int(kept * s)) for s in (0.425, 0.425, 0.15)]


def test_the_seed_decides_which_tokens_are_kept() -> None:
    assert_equal(gather(iter(TEXTS)), uninterrupted())
    other = gather(calibration=config(seed=1)).splits.heads
    assert not np.array_equal(np.sort(other.targets), np.sort(uninterrupted().splits.heads.targets))


def test_only_what_is_kept_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and rows that leave the device: as many as kept tokens, but for filling up batches of one width."""
    picked, texts = list[int](), list[int]()
    inputs = ReadingPlan.inputs

    def counted(plan: ReadingPlan, number: int, chunk: int) -> Any:
        found = inputs(plan, number, chunk)
        picked.append(found[2].size)
        texts.append(int((found[1] == 0).sum()))
        return found

    monkeypatch.setattr(ReadingPlan, "inputs", counted)
    some = gather(calibration=config(reservoir_bytes=500 * PER_TOKEN))
    assert sum(map(len, some.splits)) <= sum(picked) < 0.8 * some.counts["tokens"]
    assert sum(texts) <= len(TEXTS)
    texts.clear()
    few = gather([text[:2] for text in TEXTS] * 20, config(reservoir_bytes=1, batch_size=1))
    assert few.counts["texts"] == 20 * len(TEXTS)
    assert sum(texts) == sum(map(len, few.splits)) == 3 * 64, "texts of which nothing is kept are not run"


# ------------------------------------------------------------------------------------------------------- interruptions


class Killed(Exception):
    pass


def dying(report_number: int) -> Callable[[str, int, int], None]:
    """A progress callback that raises when it is called for the n-th time."""
    left = iter(range(report_number))

    def progress(stage: str, done: int, total: int) -> None:
        if next(left, None) is None:
            raise Killed

    return progress


def reports(**options: Any) -> tuple[ReadingResult, list[tuple[int, int]]]:
    """A reading pass and its progress."""
    seen = list[tuple[int, int]]()
    return gather(progress=lambda _, done, total: seen.append((done, total)), **options), seen


@pytest.fixture
def every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal is written after every batch."""
    monkeypatch.setattr(work_folder, "_JOURNAL_SECONDS", 0.0)


@pytest.mark.usefixtures("every_batch")
@pytest.mark.parametrize("after", [0, 1, 2, 7, 14])
def test_an_interrupted_pass_goes_on_where_it_was(after: int, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with pytest.raises(Killed):
        gather(progress=dying(after), work_dir=work)
    found, seen = reports(work_dir=work)
    assert_equal(found, uninterrupted())
    assert seen[0] == (4 * after, len(TEXTS)), "nothing but the batch that was under way is done again"
    assert seen[-1] == (len(TEXTS), len(TEXTS))
    assert len(seen) == 1 + len(TEXTS) // 4 - after


@pytest.mark.usefixtures("every_batch")
def test_interrupted_again_and_again(tmp_path: Path) -> None:
    def texts(last: int) -> Iterator[list[int]]:
        yield from TEXTS[:last]
        raise Killed

    for given, last in ((texts(30), 9), (TEXTS, 3), (texts(59), 9), (TEXTS, 1), (TEXTS, 2)):
        with pytest.raises(Killed):
            gather(given, work_dir=tmp_path / "work", progress=dying(last))
    found, seen = reports(work_dir=tmp_path / "work")
    assert_equal(found, uninterrupted())
    assert seen[0][0] > 8


@pytest.mark.usefixtures("every_batch")
def test_batches_stored_but_not_noted_are_stored_again(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        gather(progress=dying(5), work_dir=tmp_path)
    older = (tmp_path / "journal.json").read_text()
    with pytest.raises(Killed):
        gather(progress=dying(4), work_dir=tmp_path)
    (tmp_path / "journal.json").write_text(older)
    (tmp_path / "journal.json.new").write_text(older[:20])
    found, seen = reports(work_dir=tmp_path)
    assert_equal(found, uninterrupted())
    assert seen[0][0] == 20


def test_a_journal_that_is_seldom_written_costs_only_time(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        gather(progress=dying(6), work_dir=tmp_path)
    for file in tmp_path.glob("*.npy"):
        file.write_bytes(b"cut off")
    found, seen = reports(work_dir=tmp_path)
    assert_equal(found, uninterrupted())
    assert seen[0][0] == 0


def test_a_finished_pass_is_not_repeated(tmp_path: Path) -> None:
    gather(work_dir=tmp_path)
    found, seen = reports(work_dir=tmp_path, calibration=config(learning_rate=0.5, max_epochs=1))
    assert_equal(found, uninterrupted())
    assert seen == [(len(TEXTS), len(TEXTS))]


@pytest.mark.usefixtures("every_batch")
def test_calibration_resumed_is_calibration(tmp_path: Path) -> None:
    settings = config(max_epochs=1, min_layers=0, router_bottleneck_dim=8)
    with pytest.raises(Killed):
        calibrate(model(), None, TEXTS, settings, progress=dying(4), work_dir=tmp_path)
    resumed = calibrate(model(), None, iter(TEXTS), settings, work_dir=str(tmp_path))
    whole = calibrate(model(), None, TEXTS, settings)
    assert resumed.metadata == whole.metadata
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------------------------------------ refusals


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"texts": TEXTS[:-1]}, "started with another text"),
        ({"texts": [*TEXTS[1:], TEXTS[0]]}, "started with another text"),
        ({"texts": [Sample(text, 2) for text in TEXTS]}, "started with another text"),
        ({"calibration": config(seed=3)}, "started with another configuration"),
        ({"calibration": config(exit_strategy="identity")}, "started with another configuration"),
        ({"exit_points": (1,)}, "started with another exit_points"),
        ({"model": "other"}, "started with another model"),
    ],
)
def test_a_folder_of_another_pass_is_refused(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    if "model" in changes:
        changes = {"model": with_parameters(model(), {"layers.2.mlp.down.kernel": 0.0})}
    gather(work_dir=tmp_path)
    before = contents(tmp_path)
    with pytest.raises(TideError, match=expected) as caught:
        gather(work_dir=tmp_path, **changes)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "file, damage",
    [
        ("journal.json", lambda data: b""),
        ("journal.json", lambda data: data[:-30]),
        ("journal.json", lambda data: b"[1, 2]"),
        ("journal.json", lambda data: data.replace(b'"done"', b'"gone"')),
        ("journal.json", lambda data: data.replace(b'"done": 15', b'"done": -1')),
        ("journal.json", lambda data: data.replace(b'"done": 15', b'"done": 16')),
        ("journal.json", lambda data: data.replace(b'"format": 2', b'"format": 99')),
        ("journal.json", lambda data: b"\xff" + data),
        ("heads.states.npy", lambda data: b""),
        ("routers.last.npy", lambda data: data[:-100]),
        ("validation.targets.npy", None),
    ],
)
def test_a_damaged_folder_is_refused(file: str, damage: Callable[[bytes], bytes] | None, tmp_path: Path) -> None:
    gather(work_dir=tmp_path)
    path = tmp_path / file
    data = path.read_bytes()
    path.unlink()
    if damage is not None:
        assert damage(data) != data
        path.write_bytes(damage(data))
    with pytest.raises(TideError, match=f"{file} is missing or damaged; delete the folder") as caught:
        gather(work_dir=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("array", ["states", "last", "targets"])
def test_a_value_that_is_not_what_was_stored_is_noticed(array: str, tmp_path: Path) -> None:
    """One bit of any array of a row that counts as done."""
    gather(work_dir=tmp_path)
    for split in ("heads", "routers", "validation"):
        path = tmp_path / f"{split}.{array}.npy"
        before = path.read_bytes()
        for at in np.linspace(200, len(before) - 1, 7).astype(int):
            path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
            with pytest.raises(TideError, match=r"batch \d+ differs from what was stored"):
                gather(work_dir=tmp_path)
        path.write_bytes(before)
    assert_equal(gather(work_dir=tmp_path), uninterrupted())


def test_room_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file would end the process when the disk is full."""
    with pytest.raises(Killed):
        gather(progress=dying(0), work_dir=tmp_path)
    for file in tmp_path.glob("*.npy"):
        assert file.stat().st_blocks * 512 >= file.stat().st_size
    shutil.rmtree(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TideError, match=r"can't write work_dir .*No space left on device.*lower reservoir_bytes"):
        gather(work_dir=tmp_path)
    assert not list(tmp_path.glob("*.npy"))


def test_a_disk_that_fails_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(np.memmap, "flush", broken)
    with pytest.raises(TideError, match=r"can't write work_dir .*Input/output error"):
        gather(work_dir=tmp_path)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder, expected in (
        (tmp_path, "holds other files"),
        (tmp_path / "notes.txt", "can't write work_dir"),
        (tmp_path / "missing" / "work", "can't write work_dir"),
    ):
        with pytest.raises(TideError, match=expected):
            gather(work_dir=folder)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_too_little_text_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(TideError, match="the calibration text is too short"):
        gather(TEXTS[:3], work_dir=tmp_path / "work")
    assert contents(tmp_path) == {}


def test_a_full_disk_is_noticed_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        TideError, match="needs 0 MB more, but only 0 MB are free; free some space or lower reservoir_bytes"
    ):
        gather(work_dir=tmp_path)


# ------------------------------------------------------------------------------------------------------------- devices

_ON_FOUR_DEVICES = """
import sys
import tempfile
from pathlib import Path
import jax
import numpy as np
sys.path[:0] = ["tests/calibration", "tests/support"]
from test_collect import CONFIG, Killed, config, dying, gather, work_folder

work_folder._JOURNAL_SECONDS = 0.0
work = Path(sys.argv[1])
assert len(jax.devices()) == 4
square = np.asarray(jax.devices()).reshape(2, 2)
meshes = {4: jax.make_mesh((4,), ("data",)), 2: jax.sharding.Mesh(square, ("data", "model"))}
for batch_size, count in ((4, 4), (5, 2)):
    settings = config(batch_size=batch_size)
    one, several = gather(calibration=settings), gather(calibration=settings, mesh=meshes[count])
    for a, b in zip(one.splits, several.splits, strict=True):
        np.testing.assert_array_equal(a.targets, b.targets)
        np.testing.assert_allclose(a.states, b.states, atol=4e-3)
        np.testing.assert_allclose(a.last, b.last, atol=4e-3)
    assert one.counts == several.counts
try:
    gather(work_dir=work, progress=dying(5))
except Killed:
    moved = gather(work_dir=work, mesh=meshes[4])
for a, b in zip(moved.splits, gather().splits, strict=True):
    np.testing.assert_array_equal(a.targets, b.targets)
    np.testing.assert_allclose(a.states, b.states, atol=4e-3)

from tide_jax.calibration.data_parallel import Placement
from tide_jax.calibration.collect import _compiled_states
from test_collect import model
import jax.numpy as jnp
placement = Placement.for_mesh(meshes[4])
arrays = [placement.split_rows(np.zeros(shape, np.int32)) for shape in ((8, 16), (8, 16), (4, 1, 8))]
assert [s.data.shape for s in arrays[0].addressable_shards] == [(2, 16)] * 4
text = _compiled_states.lower(placement.replicate(model()), *arrays, exit_points=(0, 1)).compile().as_text()
assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute")), "rows stay apart"
print("equal")
"""


@pytest.mark.slow
def test_several_devices_keep_the_same() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [sys.executable, "-c", _ON_FOUR_DEVICES, folder],
            capture_output=True,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
            cwd=ROOT,
            timeout=300,
            check=False,
        )
    assert run.stdout == "equal\n", run.stderr[-3000:]


def test_a_mesh_needs_an_axis_for_data() -> None:
    for mesh in (jax.make_mesh((1,), ("rows",)), jax.devices()):
        with pytest.raises(TideError, match='expected a jax\\.sharding\\.Mesh with an axis "data"') as caught:
            gather(mesh=mesh)
        assert "\n" not in str(caught.value)
    assert_equal(gather(mesh=jax.make_mesh((1,), ("data",))), uninterrupted())


# ------------------------------------------------------------------------------------------------------------ progress


def test_the_time_left_counts_from_the_first_report(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = list[Any]()

    class Bar:
        def __init__(self, *, total: int | None, initial: int, **options: Any) -> None:
            self.total, self.n, self.initial, self.closed = total, initial, initial, False
            bars.append(self)

        def update(self, count: int) -> None:
            self.n += count

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr("tqdm.tqdm", Bar)
    with progress_bars() as progress:
        for done in (40, 44, 60):
            progress("reading text", done, 60)
        progress("training routers", 1, 0)
        assert [bar.closed for bar in bars] == [True, False]
    assert [(bar.total, bar.initial, bar.n, bar.closed) for bar in bars] == [(60, 40, 60, True), (None, 1, 1, True)]

"""The command line's promise: a threshold certified on texts set aside, stored with the routers, used and described."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_cli import ROOT, WORDS, Capture, model, printed, refusal  # noqa: F401  model is a fixture

import tide_jax
import tide_jax.cli.main
import tide_jax.risk.promise
from tide_jax import Routers, TideError
from tide_jax.calibration.collect import Sample
from tide_jax.errors import GuaranteeError
from tide_jax.risk.promise import Promise, split_test_texts

QUICK = ("--checkpoint-interval", "1", "--bottleneck", "4", "--min-layers", "1", "--max-length", "16")
QUICK += ("--exit-head-steps", "2", "--confidence-candidates", "0", "--translator-rank", "2")
PROMISE = ("--risk", "0.3", "--delta", "0.1")
NEEDED = 7  # texts with no loss at all for that promise: 0.7 ** 7 < 0.1


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 different lines, two of them twice."""
    random = np.random.default_rng(0)
    lines = [" ".join(random.choice(WORDS[1:], size)) for size in random.integers(8, 17, 200)]
    assert len(set(lines)) == 200
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join([*lines, *lines[:2]]) + "\n")
    return path


@pytest.fixture(scope="module")
def promised(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Routers with a promise, made by the command line."""
    output = tmp_path_factory.mktemp("promised") / "routers.safetensors"
    assert run("calibrate", model, "--text", text, "--output", output, *QUICK, *PROMISE) == 0
    return output


def run(*arguments: Any) -> int:
    return tide_jax.cli.main.main([str(argument) for argument in arguments])


def metadata(path: Path, folder: Path) -> dict[str, Any]:
    return Routers.load(path, model=tide_jax.load(folder)).metadata.to_dict()


# ---- the promise ----


def test_the_promise_is_stored_and_nothing_it_rests_on_was_learned_from(
    model: Path,  # noqa: F811
    text: Path,
    promised: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    seen = list[list[Sample]]()
    calibrate, certify = tide_jax.calibrate, tide_jax.risk.promise.guarantee
    monkeypatch.setattr(tide_jax, "calibrate", lambda m, t, texts, *a, **k: calibrate(m, t, note(texts), *a, **k))
    monkeypatch.setattr("tide_jax.risk.promise.guarantee", lambda e, texts, *a, **k: certify(e, note(texts), *a, **k))

    def note(texts: Any) -> list[Sample]:
        seen.append(list(texts))
        return seen[-1]

    command = ("calibrate", model, "--text", text, "--output", tmp_path / "again.safetensors", *QUICK, *PROMISE)
    out = printed(capsys, *command)
    learned, tested = ({tuple(np.asarray(sample.ids)) for sample in texts} for texts in seen)
    assert not learned & tested
    assert len(learned) + len(tested) == 200  # no text twice
    found = metadata(promised, model)["exit_config"]
    assert found["guarantee"]["sequences"] == len(tested) == 40  # a fifth
    assert found["guarantee"]["p_value"] <= 0.1
    assert (found["min_layers"], found["guarantee"]["risk"]) == (1, 0.3)
    assert found["exit_threshold"] == found["guarantee"]["exit_threshold"]
    assert metadata(tmp_path / "again.safetensors", model)["exit_config"] == found
    for part in ("promised with 0.9 confidence", f"threshold {found['exit_threshold']:.4g}", "40 texts", "p-value"):
        assert part in out


@pytest.mark.slow
def test_the_stored_promise_is_used_and_dropped_with_other_settings(
    model: Path,  # noqa: F811
    promised: Path,
    capsys: Capture,
) -> None:
    stored = metadata(promised, model)["exit_config"]
    generate = ("generate", model, "--prompt", "the cat", "--max-new-tokens", "4", "--no-stream", "--routers", promised)

    def config(*options: Any) -> tuple[float, int, bool]:
        found = json.loads(printed(capsys, *generate, *options, "--json"))["exit_config"]
        return found["exit_threshold"], found["min_layers"], found["guarantee"] is not None

    assert config() == (stored["exit_threshold"], 1, True)
    assert config("--exit-threshold", stored["exit_threshold"]) == (stored["exit_threshold"], 1, True)
    assert config("--exit-threshold", 0.25) == (0.25, 1, False)
    assert config("--min-layers", 2) == (stored["exit_threshold"], 2, False)
    assert config("--dtype", "bfloat16") == (stored["exit_threshold"], 1, False)
    assert json.loads(printed(capsys, *generate, "--mode", "full", "--json"))["exit_config"] is None
    for options, said in (
        ((), "at most 30.00% of a text's tokens differ"),
        (("--exit-threshold", 0.25), "nothing promised: the router file's promise is for other settings"),
        (("--dtype", "bfloat16"), "nothing promised: the promise holds for float32, this model runs in bfloat16"),
    ):
        assert run(*generate, *options) == 0
        assert said in capsys.readouterr().err


def test_an_audit_watches_the_promise(model: Path, promised: Path, capsys: Capture) -> None:  # noqa: F811
    generate = ("generate", model, "--prompt", "the cat", "--prompt", "a dog", "--max-new-tokens", "5")
    command = (*generate, "--routers", promised, "--audit", "1")
    drift = json.loads(printed(capsys, *command, "--json"))["stats"]["drift"]
    assert (drift["audited"], drift["risk"]) == (2, 0.3)
    assert run(*command) == 0
    assert "2 of 2 sequences audited; promised 70.00%" in capsys.readouterr().err


def test_inspect_shows_promise_and_translators(model: Path, promised: Path, capsys: Capture) -> None:  # noqa: F811
    out = printed(capsys, "inspect", model, "--routers", promised)
    assert "promised with 0.9 confidence" in out
    assert "with translators for skipped layers" in out
    facts = json.loads(printed(capsys, "inspect", model, "--routers", promised, "--json"))["routers"]
    assert facts["exit_config"] == metadata(promised, model)["exit_config"]
    assert (facts["translators"], facts["second_look"]) == (True, False)
    assert facts["files"] == {str(promised): promised.stat().st_size}


def test_thresholds_for_each_exit_point_and_likelihood(
    model: Path,  # noqa: F811
    text: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    output = tmp_path / "routers.safetensors"
    options = ("--loss", "nll", "--per-exit-point", "--guarantee-texts", "40")
    printed(capsys, "calibrate", model, "--text", text, "--output", output, *QUICK, *PROMISE, *options)
    found = metadata(output, model)["exit_config"]
    assert len(found["exit_threshold"]) == 3
    assert (found["guarantee"]["loss"], found["guarantee"]["sequences"]) == ("nll", 30)  # a quarter chose thresholds
    generate = ("generate", model, "--prompt", "the cat", "--max-new-tokens", "4", "--routers", output)
    drift = json.loads(printed(capsys, *generate, "--audit", "1", "--json"))["stats"]["drift"]
    assert drift["risk"] is None  # what is watched is another loss


def test_the_models_own_text_is_set_aside_too(
    model: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    def write(_: Any, __: Any, count: int, *, seed: int, **___: Any) -> list[Sample]:
        """A model of random weights writes the same again and again; this one does not."""
        return [Sample(ids, start=3) for ids in np.random.default_rng(seed).integers(1, 16, (count, 12)).tolist()]

    monkeypatch.setattr("tide_jax.texts.model_texts", write)
    output = tmp_path / "routers.safetensors"
    command = ("calibrate", model, "--text", "self", "--samples", "80", "--output", output, *QUICK, *PROMISE, "--json")
    found = json.loads(printed(capsys, *command))
    tested = found["exit_config"]["guarantee"]
    assert (found["report"]["counts"]["texts"], tested["sequences"], tested["tokens"]) == (64, 16, 16 * 9)


def test_no_threshold_qualifies(
    model: Path,  # noqa: F811
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    calibrate = tide_jax.calibrate

    def too_sure(*arguments: Any, **options: Any) -> Routers:
        """Every token leaves at the first exit point."""
        routers = calibrate(*arguments, **options)
        sure = tuple(r._replace(up=np.zeros_like(r.up), up_bias=np.float32(50)) for r in routers.routers)
        return dataclasses.replace(routers, routers=sure)

    monkeypatch.setattr(tide_jax, "calibrate", too_sure)
    output = tmp_path / "routers.safetensors"
    options = ("--text", text, "--output", output, *QUICK, "--risk", "0.1", "--delta", "0.1")
    assert run("calibrate", model, *options) == 1
    out, err = capsys.readouterr()
    assert "promised" not in out
    assert err.startswith("nothing promised: no threshold qualifies")
    assert err.count("\n") == 1
    found = metadata(output, model)
    assert found["exit_config"] is None
    assert found["no_guarantee"].startswith("no threshold qualifies")
    generate = ("generate", model, "--prompt", "the cat", "--max-new-tokens", "4", "--routers", output, "--json")
    exits = json.loads(printed(capsys, *generate))["exit_config"]
    assert (exits["exit_threshold"], exits["guarantee"]) == (0.85, None)
    assert "none: no threshold qualifies" in printed(capsys, "inspect", model, "--routers", output)


# ---- the reading pass ----


def test_a_work_folder_is_gone_on_in(
    model: Path,  # noqa: F811
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    output, work = tmp_path / "routers.safetensors", tmp_path / "work"
    command = ("calibrate", model, "--text", text, "--output", output, *QUICK, "--work-dir", work)
    assert f"{work} keeps the reading pass" in printed(capsys, *command)
    first = load_file(output)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the model read the text again")

    monkeypatch.setattr("tide_jax.calibration.collect._compiled_states", never)
    printed(capsys, *command)
    again = load_file(output)
    assert all(np.array_equal(again[name], tensor) for name, tensor in first.items())
    assert "was started with another configuration" in refusal(capsys, *command, "--seed", "1")


@pytest.mark.slow
def test_devices_share_the_reading_pass(model: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    output = tmp_path / "routers.safetensors"
    command = ("calibrate", model, "--text", text, "--output", output, *QUICK, "--devices", "2", "--json")
    flags = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, "-m", "tide_jax.cli", *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=flags,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(output)


# ---- what is wrong ----

CALIBRATE = ("calibrate", "MODEL", "--text", "TEXT", "--output", "OUT")
GENERATE = ("generate", "MODEL", "--prompt", "the cat")
WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "a risk above 1": ((*CALIBRATE, "--risk", "1.5"), "--risk 1.5 must lie between 0 and 1"),
    "a risk of 0": ((*CALIBRATE, "--risk", "0"), "--risk 0.0 must lie between 0 and 1"),
    "a delta of 0": ((*CALIBRATE, "--risk", "0.1", "--delta", "0"), "--delta 0.0 must lie between 0 and 1"),
    "a delta alone": ((*CALIBRATE, "--delta", "0.1"), "--delta needs --risk"),
    "thresholds by exit point alone": ((*CALIBRATE, "--per-exit-point"), "--per-exit-point needs --risk"),
    "an unknown loss": ((*CALIBRATE, "--risk", "0.1", "--loss", "cosine"), "--loss"),
    "too few texts": ((*CALIBRATE, "--risk", "0.01"), "200 different texts are too few: --risk 0.01 with --delta 0.05"),
    "too few set aside": (
        (*CALIBRATE, *PROMISE, "--guarantee-texts", "6"),
        "--guarantee-texts 6 is too few: --risk 0.3 with --delta 0.1 needs at least 7",
    ),
    "all set aside": ((*CALIBRATE, *PROMISE, "--guarantee-texts", "200"), "sets 200 aside"),
    "too little text of its own": (
        ("calibrate", "MODEL", "--text", "self", "--output", "OUT", "--samples", "5", *PROMISE),
        "5 different texts are too few",
    ),
    "more devices than there are": ((*CALIBRATE, "--devices", "99"), "--devices 99: JAX has 1 devices"),
    "no device": ((*CALIBRATE, "--devices", "0"), "--devices 0"),
    "another folder to work in": (
        (*CALIBRATE, *QUICK, "--work-dir", "FOLDER"),
        "holds other files and no journal.json",
    ),
    "an audit of everything and more": (
        (*GENERATE, "--routers", "ROUTERS", "--audit", "1.5"),
        "--audit 1.5 is outside [0, 1]",
    ),
    "an audit of a full run": ((*GENERATE, "--routers", "ROUTERS", "--audit", "1", "--mode", "full"), "--audit"),
    "an audit without routers": ((*GENERATE, "--audit", "1"), "it needs --routers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line(
    case: str,
    model: Path,  # noqa: F811
    text: Path,
    promised: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    arguments, expected = WRONG[case]
    (tmp_path / "other.txt").touch()
    if case != "another folder to work in":  # found before there is a model

        def never(*_: Any, **__: Any) -> None:
            raise AssertionError("a model was loaded")

        monkeypatch.setattr(tide_jax, "load", never)
    places = {"MODEL": model, "TEXT": text, "ROUTERS": promised, "OUT": tmp_path / "out.safetensors"}
    places |= {"FOLDER": tmp_path}
    assert expected in refusal(capsys, *(places.get(argument, argument) for argument in arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["other.txt"]


# ---- how many ----


def samples(*lengths: int) -> list[Sample]:
    return [Sample([i, *range(1, length)], 1) for i, length in enumerate(lengths)]


@pytest.mark.parametrize(
    ("promise", "total", "count"),
    [
        (Promise(), 2000, 400),  # a fifth
        (Promise(), 1000, 298),  # twice as many as it takes
        (Promise(), 400, 200),  # half
        (Promise(), 200, 149),  # as many as it takes
        (Promise(guarantee_texts=150), 2000, 150),
        (Promise(per_exit_point=True), 250, 198),  # 49 of them choose, 149 test
    ],
)
def test_how_many_are_set_aside(promise: Promise, total: int, count: int) -> None:
    assert promise.text_count(total) == count


def test_texts_with_nothing_to_test_are_left_to_the_routers() -> None:
    texts = samples(*[2, 9] * 20)
    kept, aside = split_test_texts(texts, Promise(0.3, 0.1, guarantee_texts=15))
    assert len(aside) == 15
    assert {len(s.ids) for s in aside} == {9}
    assert sorted(kept + aside) == sorted(texts)
    assert split_test_texts(texts, Promise(0.3, 0.1, guarantee_texts=15), seed=1)[1] != aside
    with pytest.raises(GuaranteeError, match="20 different texts"):
        split_test_texts(texts, Promise(0.3, 0.1, guarantee_texts=20))
    with pytest.raises(TideError, match="guarantee_texts=True"):
        Promise(guarantee_texts=True)


# ---- the cache's strategy and the tilt ----


def test_a_promise_for_recomputed_caches_is_what_generate_runs(
    model: Path,  # noqa: F811
    text: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    output = tmp_path / "routers.safetensors"
    dials = ("--kv-strategy", "recompute", "--threshold-tilt", "0.5")
    assert run("calibrate", model, "--text", text, "--output", output, *QUICK, *PROMISE, *dials) == 0
    stored = metadata(output, model)["exit_config"]
    assert (stored["kv_strategy"], stored["threshold_tilt"]) == ("recompute", 0.5)
    capsys.readouterr()
    prompt = ("--prompt", WORDS[1], "--max-new-tokens", "4", "--json")
    assert run("generate", model, "--routers", output, *prompt) == 0
    used = json.loads(capsys.readouterr().out)["exit_config"]
    assert (used["kv_strategy"], used["threshold_tilt"]) == ("recompute", 0.5)
    assert used["guarantee"] is not None
    assert run("generate", model, "--routers", output, *prompt, "--kv-strategy", "propagate") == 0
    other = json.loads(capsys.readouterr().out)["exit_config"]
    assert (other["kv_strategy"], other["guarantee"]) == ("propagate", None)

"""verify_gpu.py --smoke: one line says whether decoding is right and how fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts import verify_gpu
from scripts.gpu import report as gpu_report
from scripts.gpu import smoke

LINE = ["--tiny", "--smoke"]


@pytest.mark.slow
def test_a_minute_answers_both_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert verify_gpu.main([*LINE, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("decoding is right")
    assert "full depth:" in said
    assert "routers on, no exits:" in said
    report = json.loads(out.read_text())
    assert {row["batch"] for row in report["smoke"]["rows"]} == {1}
    assert {row["variant"] for row in report["smoke"]["rows"]} == set(smoke.NAMES)
    # A whole report keeps its rows.
    out.write_text(json.dumps(report | {"decode": {"rows": [{"batch": 32}]}}))
    assert verify_gpu.main([*LINE, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["decode"] == {"rows": [{"batch": 32}]}


def test_wrong_decoding_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [{"batch": 1, "variant": "full depth", "ms_per_step": 5.0}]
    monkeypatch.setattr(gpu_report, "_steered", lambda tiny: None)
    monkeypatch.setattr(gpu_report, "run_decode", lambda *args: rows)
    monkeypatch.setattr(gpu_report, "_roof", lambda *args: None)
    assert verify_gpu.main(LINE) == 0
    assert "full depth: 5.00 ms a token" in capsys.readouterr().out
    for wrong in ({"error": "XLA failed"}, {"as_forced": False}):
        rows[0] = {"batch": 1, "variant": "full depth", "ms_per_step": 5.0} | wrong
        assert verify_gpu.main(LINE) == 1
    rows[0] = {"batch": 1, "variant": "full depth", "ms_per_step": 5.0}
    capsys.readouterr()
    decoded, calls = smoke._decoded, iter(range(4))

    def deviates(device: Any, exits: bool) -> tuple[np.ndarray, np.ndarray]:
        logits, layers = decoded(device, exits)
        return logits + (0.1 if next(calls) == 2 else 0.0), layers

    monkeypatch.setattr(smoke, "_decoded", deviates)
    assert verify_gpu.main(LINE) == 1
    assert "decoding is WRONG (logits differ by up to 1.0e-01" in capsys.readouterr().out


def test_exits_leave_early_in_the_comparison() -> None:
    import jax

    _, full = smoke._decoded(jax.devices()[0], exits=False)
    _, early = smoke._decoded(jax.devices()[0], exits=True)
    assert full.min() == full.max()
    assert early.min() < full.min()

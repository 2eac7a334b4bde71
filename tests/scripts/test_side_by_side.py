"""The end of the demo recommends a mode that keeps every token, in words that run."""

from __future__ import annotations

import pytest

from scripts.side_by_side import advice, recommend

SAME = {"full": True, "lossless": True, "int8": False}


def say(speedups: dict[str, float], identical: dict[str, bool]) -> str:
    return advice({"recommended": recommend(speedups, identical), "speedups": speedups})


def test_the_fastest_mode_that_keeps_every_token_is_recommended() -> None:
    said = say({"full": 1.0, "lossless": 1.8, "int8": 3.0}, SAME)
    assert "generate(ids, mode='lossless', draft='int8'), 1.80 x full depth with every token the same" in said
    assert "8-bit weights are 3.00 x" in said


@pytest.mark.parametrize("identical", [SAME, SAME | {"int8": True}])
def test_other_weights_are_no_mode(identical: dict[str, bool]) -> None:
    """Even where the texts of the demo happen to be the same."""
    assert recommend({"full": 1.0, "lossless": 1.8, "int8": 3.0}, identical)["mode"] == "lossless"


@pytest.mark.parametrize(("speedup", "same"), [(0.9, True), (1.01, True), (1.8, False)])
def test_full_depth_is_recommended_where_nothing_beats_it(speedup: float, same: bool) -> None:
    said = say({"full": 1.0, "lossless": speedup, "int8": 0.8}, SAME | {"lossless": same})
    assert said == "Recommended here: full depth; nothing that keeps every token was faster."

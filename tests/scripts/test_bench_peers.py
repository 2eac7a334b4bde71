"""The pure parts of scripts/bench/peers.py: prompts, turns, and medians of made-up runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.bench import peer_divergence, peer_prompts
from scripts.bench import peer_measures as measures
from scripts.bench import peers as bench_peers
from tide_jax.testing import ByteTokenizer


def sample(prompt: int, seconds: float, tokens: list[int], number: int = 0, **drafts: int) -> measures.Sample:
    return measures.Sample(prompt, number, measures.Run(tokens, seconds, 3.0, drafts or None), first=0.5)


def test_prompt_sets_are_different_prompts_of_the_lengths_meant() -> None:
    assert len(peer_prompts.OPEN) == len(peer_prompts.COPY) == 8
    assert len({*peer_prompts.OPEN, *peer_prompts.COPY}) == 16
    assert all(len(text.split()) <= 15 for text in peer_prompts.OPEN)
    assert all(200 <= len(text) <= 600 for text in peer_prompts.COPY)


def test_prompts_of_a_file_replace_both_sets(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("one\ntwo\nthree\n")
    found = peer_prompts.prompt_sets(ByteTokenizer(), [tmp_path / "mine.txt"], 2)
    assert found == [("mine", [ByteTokenizer().encode("one"), ByteTokenizer().encode("two")])]
    assert [len(s.prompts) for s in peer_prompts.prompt_sets(ByteTokenizer(), [], 3)] == [3, 3]


def test_every_variant_takes_every_place_and_slow_ones_few_turns() -> None:
    names = ["full", "eager", "assistant_early_exit"]
    plan = list(measures.turns(names, prompts=4, rounds=3, slow_prompts=2))
    assert [(number, prompt) for number, prompt, _ in plan] == [(n, p) for n in range(3) for p in range(4)]
    assert [len(order) for _, _, order in plan] == [3, 3] + [2] * 10
    assert {order[0] for _, _, order in plan[2:]} == {"full", "eager"}
    assert {measures.order("abc", turn).index("a") for turn in range(6)} == {0, 1, 2}


def test_medians_of_made_up_runs() -> None:
    rows = measures.summarise(
        {
            "full": [sample(0, 1.5, [1, 2, 3]), sample(1, 2.5, [4, 5, 6])],  # 2 and 1 tokens/s after the first
            "lossless": [
                sample(0, 1.0, [1, 2, 3], passes=2, accepted=1),  # 4 tokens/s
                sample(1, 1.0, [4, 5, 7], passes=2, accepted=2),
            ],
            "eager": [],
        }
    )
    full, lossless = rows
    assert [row["name"] for row in rows] == ["full", "lossless"]
    assert full["tokens_per_second"] == pytest.approx(1.5)
    assert full["tokens_per_second_quartiles"] == pytest.approx([1.25, 1.75])
    assert full["tokens_per_second_extremes"] == pytest.approx([1.0, 2.0])
    assert full["ratio_to_full"] == full["same_tokens_as_full"] == 1.0
    assert full["ratio_to_eager"] is None
    assert "accepted_per_pass" not in full
    assert lossless["ratio_to_full"] == pytest.approx(3.0), "2 on one prompt, 4 on the other"
    assert lossless["whole_ratio_to_full"] == pytest.approx(2.0)
    assert lossless["same_tokens_as_full"] == 0.5
    assert lossless["accepted_per_pass"] == pytest.approx(0.75)
    assert lossless["first_token_seconds"] == 0.5


def test_a_ratio_needs_both_runs_of_a_round() -> None:
    samples = {"full": [sample(0, 1.5, [1, 2, 3])], "eager": [sample(0, 2.5, [1, 2, 3], number=1)]}
    assert [row["ratio_to_full"] for row in measures.summarise(samples)] == [1.0, None]


def test_tokens_past_the_end() -> None:
    full = [sample(0, 1.0, [1, 9, 3, 4]), sample(1, 1.0, [1, 2, 3, 4])]
    assert measures.past_end(full, [9]) == pytest.approx(2 / 8)
    assert measures.past_end(full, []) == 0.0
    assert measures.past_end([], [9]) is None


def test_a_generation_of_another_length_is_no_sample() -> None:
    with pytest.raises(RuntimeError, match="2 new tokens instead of 3"):
        measures.take(lambda ids, count: measures.Run([1, 2][:count], 1.0, 3.0), [5], 3, 0, 0)


def test_a_variant_that_fails_is_left_out_with_its_reason() -> None:
    variants, failed = {"eager": None, "full": None}, dict[str, str]()

    def action(variant: None) -> None:
        raise ValueError("no\ncompiler")

    assert bench_peers.attempt(action, "eager", variants, failed) is None
    assert failed == {"eager": "ValueError: no"}
    assert list(variants) == ["full"]


def test_first_difference() -> None:
    assert peer_divergence.first_difference([1, 2, 3], [1, 5, 6]) == 1
    assert peer_divergence.first_difference([1, 2], [1, 2]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--routers", "missing.safetensors"], "no router file at missing.safetensors"),
        (["--prompts", "missing.txt"], "no prompt file at missing.txt"),
        (["--threshold", "0.8"], "they need --routers"),
        (["--new-tokens", "1"], "--new-tokens must be at least 2"),
        (["--out", "nowhere/peers.json"], "no folder nowhere"),
    ],
)
def test_bad_arguments_in_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_peers.main(["model", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]

"""Messages: one line, whatever they have to tell."""

from __future__ import annotations

from tide_jax.errors import join_problems, shorten


def test_a_few_problems_are_all_listed() -> None:
    assert join_problems(["a is 1", "b is 2"]) == "a is 1; b is 2"


def test_of_many_problems_the_first_are_listed_and_the_rest_counted() -> None:
    problems = [f"field {i} is wrong" for i in range(5000)]
    assert join_problems(problems) == "field 0 is wrong; field 1 is wrong; field 2 is wrong; and 4997 more"
    assert join_problems(problems, count=1) == "field 0 is wrong; and 4999 more"


def test_long_problems_are_cut() -> None:
    assert len(join_problems(["x" * 10**6] * 10**4)) < 300
    assert join_problems(["a\nb\t c"]) == "a b c"


def test_text_is_cut_to_one_line() -> None:
    assert shorten("one\ntwo") == "one two"
    assert shorten("x" * 100, 10) == "xxxxxxx..."
    assert shorten(ValueError("word " * 10**6), 20) == "word word word wo..."

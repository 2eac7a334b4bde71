"""Messages: one line, whatever they have to tell."""

from __future__ import annotations

from tide_jax.errors import listed, shortened


def test_a_few_problems_are_all_listed() -> None:
    assert listed(["a is 1", "b is 2"]) == "a is 1; b is 2"


def test_of_many_problems_the_first_are_listed_and_the_rest_counted() -> None:
    problems = [f"field {i} is wrong" for i in range(5000)]
    assert listed(problems) == "field 0 is wrong; field 1 is wrong; field 2 is wrong; and 4997 more"
    assert listed(problems, most=1) == "field 0 is wrong; and 4999 more"


def test_long_problems_are_cut() -> None:
    assert len(listed(["x" * 10**6] * 10**4)) < 300
    assert listed(["a\nb\t c"]) == "a b c"


def test_text_is_cut_to_one_line() -> None:
    assert shortened("one\ntwo") == "one two"
    assert shortened("x" * 100, 10) == "xxxxxxx..."
    assert shortened(ValueError("word " * 10**6), 20) == "word word word wo..."

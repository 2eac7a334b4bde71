"""From a user's rows to padded arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tide_jax import TideError
from tide_jax.generation.batch import bucket, eos_table, pad_left, positions_of, prompt_column, to_rows
from tide_jax.testing import tiny_config


def test_buckets_hold_their_lengths_and_waste_less_than_half() -> None:
    sizes = [bucket(n) for n in range(1, 5000)]
    assert sizes == sorted(sizes)
    assert all(n <= size < 1.5 * n + 16 for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 20
    assert all(bucket(size) == size for size in sizes)


def test_rows_keep_their_place_in_the_array() -> None:
    ids = np.arange(12).reshape(2, 6)
    mask = np.asarray([[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1]])
    rows = to_rows(ids, mask, tiny_config())
    assert [row.tolist() for row in rows.rows] == [[1, 2, 4], [6, 7, 8, 9, 10, 11]]
    assert rows.lengths.tolist() == [3, 6]
    assert positions_of(rows.mask, 8).tolist() == [[-1, 0, 1, -1, 2, -1, -1, -1], [0, 1, 2, 3, 4, 5, -1, -1]]


def test_rows_of_a_list_are_aligned_left() -> None:
    rows = to_rows([[5, 6], [7, 8, 9]], None, tiny_config())
    assert rows.mask.tolist() == [[True, True, False], [True, True, True]]
    assert pad_left(rows.rows, 4, pad=1).tolist() == [[1, 1, 5, 6], [1, 7, 8, 9]]


@pytest.mark.parametrize(
    "eos, expected",
    [
        (None, [[-1], [-1]]),
        ([], [[-1], [-1]]),
        (7, [[7], [7]]),
        (np.int64(7), [[7], [7]]),
        (np.asarray(7), [[7], [7]]),
        (jnp.asarray(7), [[7], [7]]),
        ([7, 8], [[7, 8], [7, 8]]),
        ((7, 8), [[7, 8], [7, 8]]),
        (np.asarray([7, 8]), [[7, 8], [7, 8]]),
        ([[7], [8, 9]], [[7, -1], [8, 9]]),
        ([[], [8]], [[-1], [8]]),
    ],
)
def test_ends_of_rows(eos: object, expected: list[list[int]]) -> None:
    assert eos_table(eos, 2).tolist() == expected


@pytest.mark.parametrize(
    "eos, expected",
    [
        ([[1], [2], [3]], "3 rows, expected 2"),
        ("</s>", "eos_token_id='</s>' must be a whole number"),
        (["</s>"], "eos_token_id='</s>' must be a whole number"),
        ([1, [2]], "mixes ids and lists of ids"),
        (2**31, "eos_token_id=2147483648 must be a whole number from 0"),
        (-1, "eos_token_id=-1 must be"),
        (1.5, "eos_token_id=1.5 must be"),
        (True, "eos_token_id=True must be"),
        (np.asarray([1.5]), "eos_token_id=1.5 must be"),
    ],
)
def test_ends_that_are_none(eos: object, expected: str) -> None:
    with pytest.raises(TideError, match=expected):
        eos_table(eos, 2)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, tuple, list])
def test_a_list_of_unequal_rows_of_any_kind(kind: Callable[..., Any]) -> None:
    rows = to_rows([kind([5, 6]), kind([7, 8, 9])], None, tiny_config())
    assert [row.tolist() for row in rows.rows] == [[5, 6], [7, 8, 9]]
    assert to_rows([jnp.asarray(5), jnp.asarray(6)], None, tiny_config()).rows[0].tolist() == [5, 6]


@pytest.mark.parametrize("lengths, expected", [(3, [3, 3]), (np.int64(3), [3, 3]), ([1, 2], [1, 2]), ((0, 5), [0, 5])])
def test_prompt_lengths(lengths: object, expected: list[int]) -> None:
    assert prompt_column(lengths, 2)[:, 0].tolist() == expected


@pytest.mark.parametrize(
    "lengths, expected",
    [([1, 2, 3], "3 values, expected one, or one for each of the 2 rows"), ([1], "1 values"), ("two", "must be"),
     ([-1, 2], "prompt_lengths=-1 must be"), ([1.5, 2], "prompt_lengths=1.5 must be")],
)  # fmt: skip
def test_prompt_lengths_that_are_none(lengths: object, expected: str) -> None:
    with pytest.raises(TideError, match=expected):
        prompt_column(lengths, 2)

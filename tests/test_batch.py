"""From a user's rows to padded arrays."""

from __future__ import annotations

import numpy as np
import pytest

from tide_jax import TideError
from tide_jax.batch import bucket, eos_table, pad_left, positions_of, to_rows
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
        ([7, 8], [[7, 8], [7, 8]]),
        ((7, 8), [[7, 8], [7, 8]]),
        (np.asarray([7, 8]), [[7, 8], [7, 8]]),
        ([[7], [8, 9]], [[7, -1], [8, 9]]),
        ([[], [8]], [[-1], [8]]),
    ],
)
def test_ends_of_rows(eos: object, expected: list[list[int]]) -> None:
    assert eos_table(eos, 2).tolist() == expected


def test_ends_for_another_number_of_rows() -> None:
    with pytest.raises(TideError, match="3 rows, expected 2"):
        eos_table([[1], [2], [3]], 2)

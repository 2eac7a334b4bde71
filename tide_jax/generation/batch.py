"""Checks user input and turns it into the padded, bucketed arrays that compiled programs take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from tide_jax.checks import whole_number
from tide_jax.errors import TideError, shorten
from tide_jax.model.architecture import DecoderConfig


def bucket(length: int, smallest: int = 16) -> int:
    """Smallest of 16, 24, 32, 48, 64, 96, 128... that holds `length`: few compiled shapes, less than half padding.

    >>> [bucket(n) for n in (1, 17, 25, 33, 100)]
    [16, 24, 32, 48, 128]
    """
    size = smallest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def row_bucket(rows: int, groups: int = 1) -> int:
    """Batch size of the compiled program that runs `rows` rows.

    Up to 16 rows it is `rows`; above, the next of eight steps in each power of two, so that at most one ninth of the
    batch is empty.

    Args:
      rows: rows of the request.
      groups: device groups that share the rows; the result divides by it if `rows` does.

    >>> [row_bucket(n) for n in (1, 7, 16, 17, 33, 100, 1000)]
    [1, 7, 16, 18, 36, 104, 1024]
    """
    if rows % groups:
        groups = 1
    step = 1 << max(0, (rows // groups - 1).bit_length() - 4)
    return -(-(rows // groups) // step) * step * groups


class PromptRows(NamedTuple):
    """Prompts as a list of token id arrays, with their places in the user's array.

    Attributes:
      rows: the real tokens of each row.
      mask: bool [B, T], True where the user's array holds a real token.
    """

    rows: list[np.ndarray]
    mask: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Number of real tokens in each row, int32 [B]."""
        return np.asarray([len(row) for row in self.rows], np.int32)


def to_rows(input_ids: Any, attention_mask: Any, config: DecoderConfig) -> PromptRows:
    """Checks prompts: an int array [T] or [B, T], or a list of lists of any lengths, with an optional mask.

    Raises:
      TideError: no rows, an empty row, a token id outside the vocabulary, a row longer than the context, a mask of
        the wrong shape, or values that are not integers.
    """
    rows, mask = _from_array(input_ids, attention_mask)
    if not rows:
        raise TideError("input_ids holds no rows; pass at least one prompt of at least one token")
    for b, row in enumerate(rows):
        if len(row) == 0:
            raise TideError(f"prompt {b} is empty; pass at least one token (for example the beginning-of-text token)")
        low, high = int(row.min()), int(row.max())
        last = config.vocab_size + config.extra_tokens - 1
        if low < 0 or high > last:
            raise TideError(
                f"prompt {b} holds token id {low if low < 0 else high}, outside the vocabulary of "
                f"0..{last}; was it tokenised for another model?"
            )
        if len(row) > config.context_length:
            raise TideError(
                f"prompt {b} has {len(row)} tokens, the model's context holds {config.context_length}; shorten it"
            )
    return PromptRows([row.astype(np.int32) for row in rows], mask)


def _from_array(input_ids: Any, attention_mask: Any) -> tuple[list[np.ndarray], np.ndarray]:
    # A list of rows may have rows of different lengths, so ids and mask are read row by row.
    if isinstance(input_ids, (list, tuple)) and any(map(_is_row, input_ids)):
        ids = [_integers(row, 1) for row in input_ids]
        mask = [np.ones(len(row), bool) for row in ids] if attention_mask is None else _mask_rows(attention_mask)
        if (found := list(map(len, mask))) != (expected := list(map(len, ids))):
            raise TideError(
                f"attention_mask has rows of {shorten(found)} values, expected those of input_ids: {shorten(expected)}"
            )
        places = np.zeros((len(ids), max(expected)), bool)
        for row, of_row in zip(places, mask, strict=True):
            row[: len(of_row)] = of_row
    else:
        ids = _integers(input_ids, 2)
        places = np.ones(ids.shape, bool) if attention_mask is None else _zeros_and_ones(attention_mask)
        places = places[None] if places.ndim == 1 else places
        if places.shape != ids.shape:
            raise TideError(f"attention_mask has shape {places.shape}, expected that of input_ids, {ids.shape}")
    return [row[m[: len(row)]] for row, m in zip(ids, places, strict=True)], places


def _mask_rows(mask: Any) -> list[np.ndarray]:
    """Attention mask as a list of rows, which may have different lengths like a list of prompts."""
    nested = isinstance(mask, (list, tuple)) and any(map(_is_row, mask))
    rows = [_zeros_and_ones(row) for row in mask] if nested else list(np.atleast_2d(_zeros_and_ones(mask)))
    if any(row.ndim != 1 for row in rows):
        raise TideError("attention_mask has more dimensions than [B, T]; pass one value for each token")
    return rows


def _zeros_and_ones(values: Any) -> np.ndarray:
    """Attention mask as booleans. Raises TideError if it holds values other than 0 and 1."""
    mask = _array("attention_mask", values)
    if mask.dtype == bool:
        return mask
    if not np.issubdtype(mask.dtype, np.number) or not ((mask == 0) | (mask == 1)).all():
        other = f", {mask[(mask != 0) & (mask != 1)][0]} among them" if np.issubdtype(mask.dtype, np.number) else ""
        raise TideError(
            f"attention_mask holds {mask.dtype} values{other}; expected 1 for a token and 0 for padding: a mask that "
            "is added to attention scores means the reverse"
        )
    return mask.astype(bool)


def _is_row(values: Any) -> bool:
    """Whether a list entry is a row (a list, or an array of any library) and not a token id."""
    return isinstance(values, (list, tuple)) or getattr(values, "ndim", 0) > 0


def _array(name: str, values: Any) -> np.ndarray:
    if np.ma.is_masked(values):
        raise TideError(f"{name} is a masked array; pass its data, and what is masked as attention_mask")
    try:
        return np.asarray(values)
    except Exception as error:  # arrays of other libraries may raise anything: on a device, with a gradient
        raise TideError(f"{name} holds rows of unequal length or no numbers; pass an int array [B, T]") from error


def _integers(values: Any, ndim: int) -> np.ndarray:
    array = _array("input_ids", values)
    if array.size == 0:
        array = array.astype(np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise TideError(
            f"input_ids holds {array.dtype} values, expected token ids (whole numbers); tokenise text first"
        )
    if ndim == 2 and array.ndim == 1:
        array = array[None]
    if array.ndim != ndim:
        raise TideError(f"input_ids has {array.ndim} dimensions, expected an array [B, T] or a list of lists")
    return array


def pad_left(rows: Sequence[np.ndarray], width: int, pad: int = 0, *, batch: int = 0) -> Int[np.ndarray, "B P"]:
    """Left-padded rows, int32 [B, width]; empty rows at the end fill up to `batch` rows."""
    out = np.full((max(len(rows), batch), width), pad, np.int32)
    for b, row in enumerate(rows):
        out[b, width - len(row) :] = row
    return out


def positions_of(mask: np.ndarray, width: int) -> Int[np.ndarray, "B W"]:
    """Position of each real token in its row, -1 for padding; padded on the right to `width` columns."""
    mask = np.pad(mask, ((0, 0), (0, width - mask.shape[1])))
    return np.where(mask, np.cumsum(mask, axis=1) - 1, -1).astype(np.int32)


def prompt_column(lengths: Any, batch: int) -> Int[np.ndarray, "B 1"]:
    """Prompt lengths as int32 [B, 1], from one length for all rows or one for each row."""
    listed = _as_list(lengths)
    each = listed if isinstance(listed, list) else [listed] * batch
    if len(each) != batch:
        raise TideError(f"prompt_lengths has {len(each)} values, expected one, or one for each of the {batch} rows")
    return np.asarray([[whole_number("prompt_lengths", n)] for n in each], np.int32)


def pad_rows(array: np.ndarray, batch: int, fill: int) -> np.ndarray:
    """The array with rows of `fill` appended, up to `batch` rows."""
    return np.pad(array, ((0, batch - len(array)),) + ((0, 0),) * (array.ndim - 1), constant_values=fill)


def eos_table(eos: Any, batch: int) -> Int[np.ndarray, "B E"]:
    """End-of-sequence ids as int32 [B, E], padded with -1 to a power of two.

    Args:
      eos: None, an id, a list of ids for all rows, or a list of ids for each row.
      batch: number of rows.
    """
    eos = [] if eos is None else _as_list(eos)
    rows = [_as_list(ids) for ids in eos] if isinstance(eos, list) else [eos]
    nested = {isinstance(row, list) for row in rows}
    if len(nested) > 1:
        raise TideError("eos_token_id mixes ids and lists of ids; pass an id, a list of ids, or a list for each row")
    if nested != {True}:
        rows = [rows] * batch
    if len(rows) != batch:
        raise TideError(f"eos_token_id lists ids for {len(rows)} rows, expected {batch}")
    lists = [[whole_number("eos_token_id", i) for i in ids] for ids in rows]
    width = 1 << (max(1, *(len(ids) for ids in lists)) - 1).bit_length()  # few compiled shapes
    return np.asarray([ids + [-1] * (width - len(ids)) for ids in lists], np.int32)


def _as_list(values: Any) -> Any:
    """Arrays and collections as a list; other values unchanged."""
    if hasattr(values, "tolist"):
        return values.tolist()
    return list(values) if isinstance(values, (tuple, set, frozenset, range)) else values

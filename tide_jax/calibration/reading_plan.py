"""Plan of a reading pass, made before it starts; it depends only on the texts, the configuration and the seed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from tide_jax.calibration.reservoir import Reservoir
from tide_jax.config import CalibrationConfig


class Sample(NamedTuple):
    """A text as token ids; tokens before `start` are context only (such as a prompt the model did not write)."""

    ids: Sequence[int] | Int[np.ndarray, " T"]
    start: int = 0


def assign_splits(
    texts: Sequence[Sample], shares: Sequence[float]
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " splits"]]:
    """Assigns each text to a split; returns the split of each text and the tokens of each split.

    In order of length, each text goes to the split that is furthest behind its share of the tokens. So the shares are
    met even with few texts, and every split gets texts of all lengths.
    """
    token_counts, text_splits = np.zeros(len(shares), np.int64), np.zeros(len(texts), np.int8)
    target_shares = np.asarray(shares)
    for i in sorted(range(len(texts)), key=lambda i: len(texts[i].ids)):
        text_splits[i] = np.argmax(target_shares * (token_counts.sum() + 1) - token_counts)
        token_counts[text_splits[i]] += len(texts[i].ids) - texts[i].start
    return text_splits, token_counts


def texts_digest(texts: Sequence[Sample]) -> str:
    """Digest of a list of texts, 16 hexadecimal digits."""
    hasher = hashlib.sha256()
    for ids, start in texts:
        hasher.update(np.asarray([len(ids), start], np.int32).tobytes() + np.asarray(ids, np.int32).tobytes())
    return hasher.hexdigest()[:16]


def pad_texts(
    texts: Sequence[Sample], rows: int, max_length: int, *, widths: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Pads texts to a batch in one of at most `widths` widths.

    Returns:
      Tokens, positions (-1 for padding), and a mask of the tokens from `start` on.
    """
    width = _padded_width(max(len(text.ids) for text in texts), max_length, widths)
    tokens = np.zeros((rows, width), np.int32)
    positions = np.full((rows, width), -1, np.int32)
    counted = np.zeros((rows, width), bool)
    for row, (ids, start) in enumerate(texts):
        tokens[row, : len(ids)] = ids
        positions[row, : len(ids)] = np.arange(len(ids))
        counted[row, start : len(ids)] = True
    return tokens, positions, counted


def _padded_width(length: int, max_length: int, widths: int) -> int:
    """Smallest width that holds `length`: `max_length` in at most `widths` equal steps, each a multiple of 8."""
    step = _round_up_to_8(-(-max_length // widths))
    return min(-(-length // step) * step, max_length)


def _round_up_to_8(count: int) -> int:
    return -(-count // 8) * 8


@dataclasses.dataclass(frozen=True)
class ReadingPlan:
    """Batches of texts, and the reservoir slots of their tokens.

    Attributes:
      texts: all texts.
      text_splits: the split of each text.
      slots: for each text, the slot in its split's reservoir of each token from `start` on; -1 for tokens not kept.
      batches: indices of the texts that run together; texts without kept tokens are in no batch.
      part_capacity: for each width, the most kept tokens in a part of a batch.
      rows: rows of a batch, a multiple of `shards`.
      max_length: most tokens of a text.
      widths: most widths of a batch.
      shards: equal parts that a batch is split into.
    """

    texts: Sequence[Sample]
    text_splits: Int[np.ndarray, " N"]
    slots: Sequence[Int[np.ndarray, " T"]]
    batches: Sequence[Int[np.ndarray, " B"]]
    part_capacity: dict[int, int]
    rows: int
    max_length: int
    widths: int
    shards: int

    @classmethod
    def make(
        cls,
        texts: Sequence[Sample],
        text_splits: Int[np.ndarray, " N"],
        splits: Sequence[Reservoir],
        config: CalibrationConfig,
        *,
        widths: int,
        shards: int,
    ) -> ReadingPlan:
        """Draws the tokens to keep from each split, and groups their texts into batches of similar length.

        Args:
          texts: all texts.
          text_splits: the split of each text.
          splits: the reservoir of each split.
          config: calibration settings.
          widths: most widths of a batch.
          shards: equal parts that a batch is split into; its rows are padded to a multiple.
        """
        # Offer the tokens of each split to its reservoir.
        learnable = np.asarray([len(ids) - start for ids, start in texts])
        slots: list[np.ndarray] = [np.zeros(0)] * len(texts)
        for split, reservoir in enumerate(splits):
            own_texts = np.flatnonzero(text_splits == split)
            offered = reservoir.offer(int(learnable[own_texts].sum())).astype(np.int32)
            for text, end in zip(own_texts, np.cumsum(learnable[own_texts]), strict=True):
                slots[text] = offered[end - learnable[text] : end]
        # Sort the texts that have kept tokens by length, and cut them into batches.
        lengths = np.asarray([len(text.ids) for text in texts])
        kept_counts = np.asarray([(part >= 0).sum() for part in slots])
        order = np.flatnonzero(kept_counts)
        order = order[np.argsort(lengths[order], kind="stable")]
        batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
        # Shuffle the batches, so that the time of the first ones predicts the time of the rest.
        batches = [batches[i] for i in np.random.default_rng(config.seed).permutation(len(batches))]
        # Parts are padded to the most kept tokens of any part of their width: one compilation for each width.
        rows, part_capacity = -(-config.batch_size // shards), dict[int, int]()
        for batch in batches:
            width = _padded_width(lengths[batch].max(), config.max_length, widths)
            part_tokens = max(kept_counts[batch[i : i + rows]].sum() for i in range(0, len(batch), rows))
            part_capacity[width] = max(part_capacity.get(width, 0), int(part_tokens))
        return cls(texts, text_splits, slots, batches, part_capacity, rows * shards, config.max_length, widths, shards)

    def inputs(
        self, number: int, chunk: int
    ) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"], Int[np.ndarray, "S K N"]]:
        """Input arrays of a batch.

        Returns:
          Tokens, positions, and the places of kept tokens within each part of the batch, in chunks of at most `chunk`.
          Parts with fewer kept tokens are padded with place 0.
        """
        texts = [self.texts[i] for i in self.batches[number]]
        tokens, positions, _ = pad_texts(texts, self.rows, self.max_length, widths=self.widths)
        chunks, size = self._chunk_shape(tokens.shape[1], chunk)
        part, place = self._places(number, tokens.shape[1])
        kept_places = np.zeros((self.shards, chunks * size), np.int32)
        for shard in range(self.shards):
            own_places = place[part == shard]
            kept_places[shard, : len(own_places)] = own_places
        return tokens, positions, kept_places.reshape(self.shards, chunks, size)

    def kept_tokens(
        self, number: int, chunk: int
    ) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """For each kept token of a batch: its index among the tokens that `inputs` picks, its split, and its slot."""
        batch = self.batches[number]
        width = _padded_width(max(len(self.texts[i].ids) for i in batch), self.max_length, self.widths)
        chunks, size = self._chunk_shape(width, chunk)
        part, _ = self._places(number, width)
        within = np.concatenate([np.arange((part == shard).sum()) for shard in range(self.shards)])
        slots = [self.slots[i][self.slots[i] >= 0] for i in batch]
        token_splits = np.repeat(self.text_splits[batch], [len(s) for s in slots])
        return part * (chunks * size) + within, token_splits, np.concatenate(slots)

    def _places(self, number: int, width: int) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """For each kept token, row by row: its part of the batch and its place within the part."""
        rows = self.rows // self.shards
        parts = []
        for row, i in enumerate(self.batches[number]):
            columns = self.texts[i].start + np.flatnonzero(self.slots[i] >= 0)
            parts.append(np.stack([np.full(len(columns), row // rows), row % rows * width + columns]))
        part, place = np.concatenate(parts, axis=1)
        return part, place

    def _chunk_shape(self, width: int, chunk: int) -> tuple[int, int]:
        """Number and size of the chunks for the kept tokens of a part: as few as possible, of equal size."""
        chunks = -(-self.part_capacity[width] // chunk)
        return chunks, min(_round_up_to_8(-(-self.part_capacity[width] // chunks)), chunk)

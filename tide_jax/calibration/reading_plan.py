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


def assign(
    texts: Sequence[Sample], shares: Sequence[float]
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " splits"]]:
    """Assigns each text to a split; returns the split of each text and the tokens of each split.

    In order of length, each text goes to the split that is furthest behind its share of the tokens. So the shares are
    met even with few texts, and every split gets texts of all lengths.
    """
    seen, wanted, owners = np.zeros(len(shares), np.int64), np.asarray(shares), np.zeros(len(texts), np.int8)
    for i in sorted(range(len(texts)), key=lambda i: len(texts[i].ids)):
        owners[i] = np.argmax(wanted * (seen.sum() + 1) - seen)
        seen[owners[i]] += len(texts[i].ids) - texts[i].start
    return owners, seen


def digest(texts: Sequence[Sample]) -> str:
    """Digest of a list of texts, 16 hexadecimal digits."""
    found = hashlib.sha256()
    for ids, start in texts:
        found.update(np.asarray([len(ids), start], np.int32).tobytes() + np.asarray(ids, np.int32).tobytes())
    return found.hexdigest()[:16]


def padded(
    texts: Sequence[Sample], rows: int, max_length: int, *, widths: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Pads texts to a batch in one of at most `widths` widths.

    Returns:
      Tokens, positions (-1 for padding), and a mask of the tokens from `start` on.
    """
    width = _width(max(len(text.ids) for text in texts), max_length, widths)
    tokens = np.zeros((rows, width), np.int32)
    positions = np.full((rows, width), -1, np.int32)
    counted = np.zeros((rows, width), bool)
    for row, (ids, start) in enumerate(texts):
        tokens[row, : len(ids)] = ids
        positions[row, : len(ids)] = np.arange(len(ids))
        counted[row, start : len(ids)] = True
    return tokens, positions, counted


def _width(length: int, max_length: int, widths: int) -> int:
    """Smallest width that holds `length`: `max_length` in at most `widths` equal steps, each a multiple of 8."""
    step = _aligned(-(-max_length // widths))
    return min(-(-length // step) * step, max_length)


def _aligned(count: int) -> int:
    return -(-count // 8) * 8


@dataclasses.dataclass(frozen=True)
class ReadingPlan:
    """Batches of texts, and the reservoir slots of their tokens.

    Attributes:
      texts: all texts.
      owners: the split of each text.
      slots: for each text, the slot in its split's reservoir of each token from `start` on; -1 for tokens not kept.
      batches: indices of the texts that run together; texts without kept tokens are in no batch.
      room: for each width, the most kept tokens in a part of a batch.
      rows: rows of a batch, a multiple of `shards`.
      max_length: most tokens of a text.
      widths: most widths of a batch.
      shards: equal parts that a batch is split into.
    """

    texts: Sequence[Sample]
    owners: Int[np.ndarray, " N"]
    slots: Sequence[Int[np.ndarray, " T"]]
    batches: Sequence[Int[np.ndarray, " B"]]
    room: dict[int, int]
    rows: int
    max_length: int
    widths: int
    shards: int

    @classmethod
    def of(
        cls,
        texts: Sequence[Sample],
        owners: Int[np.ndarray, " N"],
        splits: Sequence[Reservoir],
        config: CalibrationConfig,
        *,
        widths: int,
        shards: int,
    ) -> ReadingPlan:
        """Draws the tokens to keep from each split, and groups their texts into batches of similar length.

        Args:
          texts: all texts.
          owners: the split of each text.
          splits: the reservoir of each split.
          config: calibration settings.
          widths: most widths of a batch.
          shards: equal parts that a batch is split into; its rows are padded to a multiple.
        """
        # Offer the tokens of each split to its reservoir.
        learned = np.asarray([len(ids) - start for ids, start in texts])
        slots: list[np.ndarray] = [np.zeros(0)] * len(texts)
        for split, reservoir in enumerate(splits):
            mine = np.flatnonzero(owners == split)
            offered = reservoir.offer(int(learned[mine].sum())).astype(np.int32)
            for text, end in zip(mine, np.cumsum(learned[mine]), strict=True):
                slots[text] = offered[end - learned[text] : end]
        # Sort the texts that have kept tokens by length, and cut them into batches.
        lengths = np.asarray([len(text.ids) for text in texts])
        kept = np.asarray([(part >= 0).sum() for part in slots])
        order = np.flatnonzero(kept)
        order = order[np.argsort(lengths[order], kind="stable")]
        batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
        # Shuffle the batches, so that the time of the first ones predicts the time of the rest.
        batches = [batches[i] for i in np.random.default_rng(config.seed).permutation(len(batches))]
        # Parts are padded to the most kept tokens of any part of their width: one compilation for each width.
        rows, room = -(-config.batch_size // shards), dict[int, int]()
        for batch in batches:
            width = _width(lengths[batch].max(), config.max_length, widths)
            most = max(kept[batch[i : i + rows]].sum() for i in range(0, len(batch), rows))
            room[width] = max(room.get(width, 0), int(most))
        return cls(texts, owners, slots, batches, room, rows * shards, config.max_length, widths, shards)

    def inputs(
        self, number: int, chunk: int
    ) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"], Int[np.ndarray, "S K N"]]:
        """Input arrays of a batch.

        Returns:
          Tokens, positions, and the places of kept tokens within each part of the batch, in chunks of at most `chunk`.
          Parts with fewer kept tokens are padded with place 0.
        """
        texts = [self.texts[i] for i in self.batches[number]]
        tokens, positions, _ = padded(texts, self.rows, self.max_length, widths=self.widths)
        chunks, size = self._chunks(tokens.shape[1], chunk)
        part, place = self._places(number, tokens.shape[1])
        picked = np.zeros((self.shards, chunks * size), np.int32)
        for shard in range(self.shards):
            mine = place[part == shard]
            picked[shard, : len(mine)] = mine
        return tokens, positions, picked.reshape(self.shards, chunks, size)

    def kept(
        self, number: int, chunk: int
    ) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """For each kept token of a batch: its index among the tokens that `inputs` picks, its split, and its slot."""
        batch = self.batches[number]
        width = _width(max(len(self.texts[i].ids) for i in batch), self.max_length, self.widths)
        chunks, size = self._chunks(width, chunk)
        part, _ = self._places(number, width)
        within = np.concatenate([np.arange((part == shard).sum()) for shard in range(self.shards)])
        slots = [self.slots[i][self.slots[i] >= 0] for i in batch]
        owners = np.repeat(self.owners[batch], [len(s) for s in slots])
        return part * (chunks * size) + within, owners, np.concatenate(slots)

    def _places(self, number: int, width: int) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
        """For each kept token, row by row: its part of the batch and its place within the part."""
        rows = self.rows // self.shards
        found = []
        for row, i in enumerate(self.batches[number]):
            columns = self.texts[i].start + np.flatnonzero(self.slots[i] >= 0)
            found.append(np.stack([np.full(len(columns), row // rows), row % rows * width + columns]))
        part, place = np.concatenate(found, axis=1)
        return part, place

    def _chunks(self, width: int, chunk: int) -> tuple[int, int]:
        """Number and size of the chunks for the kept tokens of a part: as few as possible, of equal size."""
        chunks = -(-self.room[width] // chunk)
        return chunks, min(_aligned(-(-self.room[width] // chunks)), chunk)

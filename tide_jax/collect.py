"""One pass of a frozen model over text: hidden states at the checkpoints, into bounded reservoirs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.exit_step.reference import rms_normalise
from tide_jax.config import CalibrationConfig
from tide_jax.decoder import Decoder
from tide_jax.errors import TideError
from tide_jax.evaluation import Batch
from tide_jax.reservoir import Reservoir

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how much is done and how much there is (0 when unknown)."""

MIN_TOKENS = 64
"""Fewer usable tokens than this in any split is no sample to train on."""

HELD_OUT_TEXTS = (16, 48)
"""Validation texts kept whole: at least and at most; between, one for every twelve texts read. Each is run once for
every threshold of the report, which would otherwise take longer than everything else."""

_WINDOW = 16  # batches sorted by length together, so that little of a batch is padding


class Sample(NamedTuple):
    """A text as token ids; tokens before `start` are read but not learned from (a prompt the model did not write)."""

    ids: Sequence[int]
    start: int = 0


class Splits(NamedTuple):
    """Disjoint samples, split by text. Heads and routers learn from different texts: a head agrees too often on the
    text it was fitted to, and a router trained there would trust it too much."""

    heads: Reservoir
    routers: Reservoir
    validation: Reservoir


class Collected(NamedTuple):
    """What one pass over the text leaves.

    Attributes:
      splits: sampled hidden states.
      held_out: batches of validation texts, for measuring with the engine; bounded in number.
      counts: texts and tokens read.
    """

    splits: Splits
    held_out: list[Batch]
    counts: dict[str, int]


def tokenise(tokenizer: Any, texts: Iterable[Any], config: CalibrationConfig, vocab_size: int) -> Iterator[Sample]:
    """Up to `calibration_samples` texts as token ids, cut at `max_length`; those under two tokens are passed over.

    A text is a string, a `Sample`, or a sequence of token ids (the last two need no tokenizer).

    Raises:
      TideError: a text is none of these, or holds a token id outside the vocabulary.
    """
    if isinstance(texts, str):
        raise TideError("texts is a single string; pass an iterable of texts, for example a list")
    for number, text in enumerate(itertools.islice(texts, config.calibration_samples)):
        ids, start = _sample(tokenizer, text, number)
        ids, first = ids[: config.max_length], max(1, start)
        if len(ids) and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise TideError(
                f"text {number} holds token id {min(ids) if min(ids) < 0 else max(ids)}, outside the vocabulary of "
                f"0..{vocab_size - 1}; was it tokenised for another model?"
            )
        if len(ids) > first:
            yield Sample(ids, first)


def _sample(tokenizer: Any, text: Any, number: int) -> Sample:
    if isinstance(text, Sample):
        return text
    ids = tokenizer(text)["input_ids"] if isinstance(text, str) else text
    if isinstance(ids, np.ndarray):
        ids = ids.tolist()
    if not isinstance(ids, (list, tuple)) or not all(isinstance(i, (int, np.integer)) for i in ids):
        raise TideError(f"text {number} is {type(text).__name__}, expected a string or a sequence of token ids")
    return Sample(ids)


def collect(
    model: Decoder,
    samples: Iterator[Sample],
    checkpoints: tuple[int, ...],
    config: CalibrationConfig,
    progress: Progress | None = None,
) -> Collected:
    """Reads tokenised texts once.

    Raises:
      TideError: no text, or too little of it.
    """
    splits = _reservoirs(model, len(checkpoints), config)
    run = jax.jit(_states, static_argnames="checkpoints")
    counts, held_out = {"texts": 0, "tokens": 0}, list[Sample]()
    for batch in _batches(samples, config):
        arrays = _arrays(batch, config)
        out = jax.device_get(run(model, arrays.tokens, arrays.positions, checkpoints=checkpoints))
        for row, (ids, start) in enumerate(batch):
            split, learned = _neediest(splits, config), slice(start, len(ids))
            splits[split].add(out[0][:, row, learned], out[1][row, learned], out[2][row, learned])
            if split == _VALIDATION and len(held_out) < np.clip(counts["texts"] // 12, *HELD_OUT_TEXTS):
                held_out.append(batch[row])
            counts["texts"] += 1
            counts["tokens"] += len(ids) - start
        if progress is not None:
            progress("reading text", counts["texts"], config.calibration_samples)
    _check_enough(splits, counts, config)
    whole = [held_out[i : i + config.batch_size] for i in range(0, len(held_out), config.batch_size)]
    return Collected(splits, [_arrays(batch, config) for batch in whole], counts)


_VALIDATION = Splits._fields.index("validation")


def _arrays(batch: Sequence[Sample], config: CalibrationConfig) -> Batch:
    """A full batch of one of few widths, each a compilation: a quarter, half or all of `max_length`."""
    longest = max(len(sample.ids) for sample in batch)
    width = next(w for w in (-(-config.max_length // part) for part in (4, 2, 1)) if w >= longest)
    tokens = np.zeros((config.batch_size, width), np.int32)
    positions = np.full((config.batch_size, width), -1, np.int32)
    counted = np.zeros((config.batch_size, width), bool)
    for row, (ids, start) in enumerate(batch):
        tokens[row, : len(ids)] = ids
        positions[row, : len(ids)] = np.arange(len(ids))
        counted[row, start : len(ids)] = True
    return Batch(jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(counted))


def _states(
    model: Decoder, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], *, checkpoints: tuple[int, ...]
) -> tuple[Array, Array, Array]:
    """Normed states at the checkpoints [C, B, T, D] and after the last layer [B, T, D], float16, and argmax [B, T]."""
    contexts = model.contexts(positions, None)
    x, states = model.embed_tokens(tokens, positions), []
    for i, layer in enumerate(model.layers):
        x, _ = layer(x, contexts, None)
        if i in checkpoints:
            states.append(_normed(model, x))
    # One row at a time: logits of a whole batch would dwarf everything else in memory.
    targets = lax.map(lambda row: jnp.argmax(model.logits(row[None])[0], axis=-1), model.final_norm(x))
    return jnp.stack(states), _normed(model, x), targets.astype(jnp.int32)


def _normed(model: Decoder, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    rows = rms_normalise(x.reshape(-1, x.shape[-1]), model.config.norm_eps)
    return rows.reshape(x.shape).astype(jnp.float16)


def _reservoirs(model: Decoder, count: int, config: CalibrationConfig) -> Splits:
    size = model.config.hidden_size
    tokens = config.reservoir_bytes // Reservoir.bytes_per_token(count, size)
    needed = config.calibration_samples * (config.max_length - 1)
    capacities = [max(MIN_TOKENS, int(min(tokens, needed) * share)) for share in _shares(config)]
    return Splits(*(Reservoir(n, count, size, seed=config.seed + 1 + i) for i, n in enumerate(capacities)))


def _shares(config: CalibrationConfig) -> tuple[float, float, float]:
    rest = 1.0 - config.validation_fraction
    heads = 0.5 * rest if config.exit_strategy == "affine" else 0.0
    return heads, rest - heads, config.validation_fraction


def _neediest(splits: Splits, config: CalibrationConfig) -> int:
    """The split furthest behind its share of the tokens: shares hold for few texts as for many."""
    total = sum(split.seen for split in splits) + 1
    return int(np.argmax([share * total - split.seen for share, split in zip(_shares(config), splits, strict=True)]))


def _batches(samples: Iterator[Sample], config: CalibrationConfig) -> Iterator[Sequence[Sample]]:
    while window := list(itertools.islice(samples, config.batch_size * _WINDOW)):
        window.sort(key=lambda sample: len(sample.ids))
        for start in range(0, len(window), config.batch_size):
            yield window[start : start + config.batch_size]


def _check_enough(splits: Splits, counts: dict[str, int], config: CalibrationConfig) -> None:
    if counts["texts"] == 0:
        raise TideError("no calibration text: every text was empty or a single token; pass longer texts")
    for name, share, split in zip(Splits._fields, _shares(config), splits, strict=True):
        if share and len(split) < MIN_TOKENS:
            raise TideError(
                f"calibration text too short: {counts['texts']} texts gave {len(split)} tokens to the {name} split, "
                f"at least {MIN_TOKENS} are needed; pass more or longer texts"
            )

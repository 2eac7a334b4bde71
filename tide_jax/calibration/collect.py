"""The reading pass: runs a frozen model over text and samples hidden states at the exit points into reservoirs.

A plan decides before the pass which texts run together, and which tokens are kept and where
(`tide_jax.calibration.reading_plan`). So logits are computed and states copied from the device only for kept tokens,
the next batch runs while the last one is stored, and an interrupted pass can resume at any batch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float16, Int

from pallas_kernels.common import rms_normalise
from tide_jax.calibration.data_parallel import Placement
from tide_jax.calibration.reading_plan import ReadingPlan, Sample, assign_splits, pad_texts, texts_digest
from tide_jax.calibration.reservoir import Allocate, Reservoir
from tide_jax.calibration.work_folder import WorkFolder
from tide_jax.checks import unicode_text, whole_number
from tide_jax.config import CalibrationConfig
from tide_jax.errors import TideError
from tide_jax.exits.evaluation import Batch
from tide_jax.generation.finite import check_finite
from tide_jax.model.decoder import Decoder
from tide_jax.model.files.checkpoint import fingerprint
from tide_jax.model.sharding import mesh_context

__all__ = ["Progress", "ReadingResult", "Sample", "Splits", "collect_states", "tokenise"]

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the amount done, and the total amount (0 if unknown)."""

MIN_TOKENS = 64
"""Fewest usable tokens of each split."""

HELD_OUT_TEXTS = (16, 24)
"""Least and most validation texts kept whole; in between, one for every twelve texts read.

Each runs once for every threshold of the report. Without a limit that would take longer than all other stages."""

_LOGIT_TOKENS = 256  # tokens whose logits are in memory at once


class Splits(NamedTuple):
    """Disjoint samples of hidden states, split by text.

    Heads and routers learn from different texts: a head agrees too often with the full model on the text it was fitted
    to, so a router trained there would exit too often.
    """

    heads: Reservoir
    routers: Reservoir
    validation: Reservoir


class ReadingResult(NamedTuple):
    """Result of the reading pass.

    Attributes:
      splits: sampled hidden states.
      held_out_batches: batches of validation texts, for measuring with the engine's own pass; bounded in number.
      fit_batches: batches of the heads' texts (the routers', if no heads are fitted), for fits that read whole texts;
        bounded in number.
      counts: number of texts and tokens read.
    """

    splits: Splits
    held_out_batches: list[Batch]
    fit_batches: list[Batch]
    counts: dict[str, int]


FIT_TEXTS = 96
"""Most texts kept whole for fits that read them again."""


def tokenise(tokenizer: Any, texts: Iterable[Any], config: CalibrationConfig, vocab_size: int) -> Iterator[Sample]:
    """Tokenises up to `calibration_samples` texts, cut at `max_length`; skips texts without a token to learn from.

    A text is a string, a `Sample`, or a sequence of token ids; the last two need no tokenizer.

    Raises:
      TideError: a text is none of these, or holds a token id outside the vocabulary.
    """
    if isinstance(texts, str):
        raise TideError("texts is a single string; pass an iterable of texts, for example a list")
    if not isinstance(texts, Iterable):
        raise TideError(f"texts is {type(texts).__name__}; pass an iterable of texts, for example a list")
    for number, text in enumerate(itertools.islice(texts, config.calibration_samples)):
        ids, start = _to_sample(tokenizer, text, number)
        ids, first = ids[: config.max_length], max(1, start)
        if len(ids) and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise TideError(
                f"text {number} holds token id {min(ids) if min(ids) < 0 else max(ids)}, outside the vocabulary of "
                f"0..{vocab_size - 1}; tokenise it with this model's tokenizer"
            )
        if len(ids) > first:
            yield Sample(ids, first)


def _to_sample(tokenizer: Any, text: Any, number: int) -> Sample:
    if isinstance(text, Sample):
        whole_number(f"start of text {number}", text.start)
        return Sample(_to_sample(tokenizer, text.ids, number).ids, text.start)
    if isinstance(text, str) and tokenizer is None:
        raise TideError(f"text {number} is a string and needs a tokenizer; pass tokenizer=, or pass token ids")
    ids = tokenizer(unicode_text(f"text {number}", text))["input_ids"] if isinstance(text, str) else text
    if isinstance(ids, np.ndarray):
        ids = ids.tolist()
    if not isinstance(ids, (list, tuple)) or not all(isinstance(i, (int, np.integer)) for i in ids):
        raise TideError(f"text {number} is {type(text).__name__}, expected a string or a sequence of token ids")
    return Sample(ids)


def collect_states(
    model: Decoder,
    samples: Iterable[Sample],
    exit_points: tuple[int, ...],
    config: CalibrationConfig,
    progress: Progress | None = None,
    *,
    work_dir: str | Path | None = None,
    mesh: Mesh | None = None,
) -> ReadingResult:
    """Runs tokenised texts through the model and samples hidden states.

    All token ids are read into memory first (8 bytes a token).

    Args:
      model: the decoder.
      samples: tokenised texts.
      exit_points: layers of the exit points.
      config: calibration settings.
      progress: called with (stage, done, total).
      work_dir: see `tide_jax.calibrate`.
      mesh: see `tide_jax.calibrate`.

    Raises:
      TideError: no text, or too little; a mesh without an axis "data"; a `work_dir` with other content.
    """
    placement = Placement.for_mesh(mesh)
    texts = [Sample(np.asarray(ids, np.int32), start) for ids, start in samples]
    # A batch larger than all texts would only be padding. No text at all is an error below.
    config = dataclasses.replace(config, batch_size=min(config.batch_size, max(1, len(texts))))
    # Split the texts, and check that every split has enough tokens.
    counts = {"texts": len(texts), "tokens": sum(len(ids) - start for ids, start in texts)}
    text_splits, token_counts = assign_splits(texts, _split_shares(config))
    _check_token_counts(token_counts, counts, config)
    # Plan the pass, and run what the folder does not have yet.
    folder = None if work_dir is None else WorkFolder(work_dir, _identity(model, texts, exit_points, config))
    splits = _make_reservoirs(model, len(exit_points), token_counts, config, folder)
    plan = ReadingPlan.make(texts, text_splits, splits, config, widths=placement.widths, shards=placement.shards)
    _run_plan(placement, model, plan, splits, exit_points, folder, progress)
    # Draw the texts that are kept whole.
    rng, fit_split = np.random.default_rng(config.seed), _HEADS if token_counts[_HEADS] else _ROUTERS
    limits = (_VALIDATION, np.clip(len(texts) // 12, *HELD_OUT_TEXTS)), (fit_split, FIT_TEXTS)
    chosen_texts = (np.sort(rng.permutation(np.flatnonzero(text_splits == split))[:most]) for split, most in limits)
    held_out_batches, fit_batches = (_to_batches([texts[i] for i in chosen], config) for chosen in chosen_texts)
    return ReadingResult(splits, held_out_batches, fit_batches, counts)


_HEADS, _ROUTERS, _VALIDATION = range(len(Splits._fields))


def _to_batches(texts: list[Sample], config: CalibrationConfig) -> list[Batch]:
    texts = sorted(texts, key=lambda text: len(text.ids))
    return [_to_batch(texts[i : i + config.batch_size], config) for i in range(0, len(texts), config.batch_size)]


def _to_batch(texts: list[Sample], config: CalibrationConfig) -> Batch:
    return Batch(*map(jnp.asarray, pad_texts(texts, config.batch_size, config.max_length, widths=4)))


def _identity(
    model: Decoder, texts: list[Sample], exit_points: tuple[int, ...], config: CalibrationConfig
) -> dict[str, Any]:
    """Everything that determines the result of a reading pass; the work folder stores it."""
    names = ("max_length", "batch_size", "reservoir_bytes", "seed")
    return {
        "model": f"{fingerprint(model)} in {model.precision}",
        "exit_points": list(exit_points),
        "configuration": {name: getattr(config, name) for name in names} | {"shares": list(_split_shares(config))},
        "text": texts_digest(texts),
    }


def _make_reservoirs(
    model: Decoder,
    count: int,
    token_counts: Int[np.ndarray, " 3"],
    config: CalibrationConfig,
    folder: WorkFolder | None,
) -> Splits:
    size = model.config.hidden_size
    capacity_total = config.reservoir_bytes // Reservoir.bytes_per_token(count, size)

    def reservoir(i: int, share: float) -> Reservoir:
        capacity = min(int(token_counts[i]), max(MIN_TOKENS, int(capacity_total * share)))
        allocate = None if folder is None else _allocate_in(folder, Splits._fields[i])
        return Reservoir(capacity, count, size, seed=config.seed + 1 + i, allocate=allocate)

    return Splits(*(reservoir(i, share) for i, share in enumerate(_split_shares(config))))


def _allocate_in(folder: WorkFolder, split: str) -> Allocate:
    return lambda name, shape, dtype: folder.array(f"{split}.{name}", shape, dtype)


def _split_shares(config: CalibrationConfig) -> tuple[float, float, float]:
    rest = 1.0 - config.validation_fraction
    heads = 0.5 * rest if config.exit_strategy != "identity" else 0.0
    return heads, rest - heads, config.validation_fraction


def _check_token_counts(token_counts: Int[np.ndarray, " 3"], counts: dict[str, int], config: CalibrationConfig) -> None:
    if counts["texts"] == 0:
        raise TideError("no calibration text: every text was empty or a single token; pass longer texts")
    for name, share, tokens in zip(Splits._fields, _split_shares(config), token_counts, strict=True):
        if share and tokens < MIN_TOKENS:
            raise TideError(
                f"the calibration text is too short: {counts['texts']} texts gave {tokens} tokens to the {name} split, "
                f"which needs at least {MIN_TOKENS}; pass more or longer texts"
            )


def _run_plan(
    placement: Placement,
    model: Decoder,
    plan: ReadingPlan,
    splits: Splits,
    exit_points: tuple[int, ...],
    folder: WorkFolder | None,
    progress: Progress | None,
) -> None:
    """Runs the batches of a plan that the folder does not have yet; one batch is stored while the next runs."""
    pending = list[tuple[int, _PickedStates]]()
    checksum = functools.partial(_checksum, plan, splits)
    first = 0 if folder is None else folder.count_finished(len(plan.batches), checksum)
    total = sum(len(batch) for batch in plan.batches)
    texts = sum(len(batch) for batch in plan.batches[:first])
    if progress is not None:
        progress("reading text", texts, total)
    # Storing a batch blocks on the device, so the next batch is started before the last one is stored.
    placed_model = placement.place_model(model)

    def store(number: int, out: _PickedStates) -> None:
        nonlocal texts
        _store(plan, number, jax.device_get(out), splits, model.dtype)
        texts += len(plan.batches[number])
        if folder is not None:
            folder.record_batch(checksum(number), len(plan.batches))
        if progress is not None:
            progress("reading text", texts, total)

    for number in range(first, len(plan.batches)):
        inputs = (placement.split_rows(array) for array in plan.inputs(number, _LOGIT_TOKENS))
        with mesh_context(placement.mesh):
            out = _compiled_states(placed_model, *inputs, exit_points=exit_points)
        jax.tree.map(lambda array: array.copy_to_host_async(), out)
        pending.append((number, out))
        if len(pending) == 2:
            store(*pending.pop(0))
    for number, out in pending:
        store(number, out)


def _store(plan: ReadingPlan, number: int, out: _PickedStates, splits: Splits, dtype: Any) -> None:
    """Stores the kept tokens of a batch in their reservoirs. Raises TideError if a last state is not finite."""
    states, last, targets = map(np.asarray, out)
    indices, splits_of_tokens, slots = plan.kept_tokens(number, _LOGIT_TOKENS)
    check_finite(np.isfinite(last[indices]), dtype)
    for i, split in enumerate(splits):
        own = splits_of_tokens == i
        rows = indices[own]
        split.put(slots[own], states[:, rows], last[rows], targets[rows])


def _checksum(plan: ReadingPlan, splits: Splits, number: int) -> int:
    """CRC-32 of a batch's tokens in the reservoirs; no slot belongs to two batches."""
    _, splits_of_tokens, slots = plan.kept_tokens(number, _LOGIT_TOKENS)
    checksum = 0
    for i, split in enumerate(splits):
        checksum = split.checksum(slots[splits_of_tokens == i], checksum)
    return checksum


class _PickedStates(NamedTuple):
    """Normed states of picked tokens at the exit points and after the last layer, and the full model's argmax."""

    states: Float16[Array, "C N D"]
    last: Float16[Array, "N D"]
    targets: Int[Array, " N"]


def _compute_states(
    model: Decoder,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    places: Int[Array, "S K N"],
    *,
    exit_points: tuple[int, ...],
) -> _PickedStates:
    """States of picked tokens.

    Args:
      model: the decoder.
      tokens: token ids.
      positions: position of each token, -1 for padding.
      places: places of the picked tokens within each of S equal parts of the batch, in K chunks of N.
      exit_points: layers of the exit points.
    """
    shards, chunks, count = places.shape

    def gather(x: Float[Array, "B T D"]) -> Float[Array, "S M D"]:
        take = jax.vmap(lambda rows, part_places: jnp.take(rows, part_places, axis=0, mode="clip"))
        return take(x.reshape(shards, -1, x.shape[-1]), places.reshape(shards, -1))

    residuals = [x for x, _ in model.layer_outputs(tokens, positions, None)]
    states = [_normalise(model, gather(residuals[layer])) for layer in exit_points]
    last = gather(residuals[-1])
    rows = model.final_norm(last).reshape(shards, chunks, count, last.shape[-1]).swapaxes(0, 1)
    # One chunk's logits at a time.
    targets = lax.map(lambda chunk: jnp.argmax(model.logits(chunk), axis=-1).astype(jnp.int32), rows)
    return _PickedStates(jnp.stack(states), _normalise(model, last), targets.swapaxes(0, 1).reshape(-1))


_compiled_states = jax.jit(_compute_states, static_argnames="exit_points")


def _normalise(model: Decoder, x: Float[Array, "S M D"]) -> Float16[Array, "N D"]:
    return rms_normalise(x.reshape(-1, x.shape[-1]), model.config.norm_eps).astype(jnp.float16)

"""Log-likelihoods of continuations given their contexts, scored as decoding would produce them, with exits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tide_jax.config import Mode
from tide_jax.engine import TIDE
from tide_jax.errors import TideError
from tide_jax.exits.depth import run_depth
from tide_jax.exits.exits import Exits
from tide_jax.generation.batch import bucket, positions_of, to_rows
from tide_jax.generation.finite import check_finite
from tide_jax.model.decoder import Decoder

_LOGITS_AT_ONCE = 2**24  # 64 MiB of float32


class Continuation(NamedTuple):
    """Token ids of the context, at least one, and token ids to score."""

    context: Sequence[int]
    tokens: Sequence[int]


class Score(NamedTuple):
    """A model's score of a continuation of n tokens.

    Attributes:
      log_likelihood: natural logarithm of the probability of all its tokens.
      greedy: whether each token is the most likely one after those before it.
      exit_layers: index of the last layer that ran to predict each token, int32 [n].
    """

    log_likelihood: float
    greedy: bool
    exit_layers: Int[np.ndarray, " n"]


class _SharedRow(NamedTuple):
    """A row of a forward pass: a text without its last token. Continuations that differ only in that token share it.

    Attributes:
      tokens: the token ids.
      scored_count: number of tokens at the end whose next tokens are scored.
    """

    tokens: tuple[int, ...]
    scored_count: int

    @property
    def prompt_length(self) -> int:
        """Number of leading tokens that belong to the context."""
        return len(self.tokens) - self.scored_count + 1


class _LastToken(NamedTuple):
    """The last token of a text, and the index of its continuation."""

    continuation: int
    token: int


class _PaddedBatch(NamedTuple):
    """Rows as right-padded arrays.

    Attributes:
      scored_columns: columns whose next tokens are scored.
      targets: those next tokens. Continuations that differ only in their last token share a row, along axis K.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    may_exit: Bool[Array, "B T"]
    scored_columns: Int[Array, "B S"]
    targets: Int[Array, "B S K"]


def score_continuations(
    engine: TIDE,
    continuations: Sequence[Continuation],
    *,
    mode: Mode | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Scores continuations teacher-forced, by the same definition as `TIDE.generate`.

    The context runs at full depth unless the engine's `prefill_exits` is set. So full depth predicts a continuation's
    first token, because the context's last token predicts it. The continuation's own tokens may exit. Texts that differ
    only in their last token share one row. Logits never leave the device.

    Args:
      mode: "exit" (default if there are routers) or "full".
      batch_size: rows per forward pass.
      max_length: tokens that the model may read, by default the model's context; longer contexts lose their first
        tokens.
      progress: called with the number of rows done and of all rows.

    Raises:
      TideError: a continuation is longer than `max_length`, a context is empty, or a token id is out of range.
    """
    max_length = max_length or engine.model.config.context_length
    scores: list[Score] = [Score(0.0, True, np.zeros((0,), np.int32))] * len(continuations)
    rows = _group_by_row(continuations, max_length)
    # Longest first, so that rows of a batch have similar lengths.
    ordered = sorted(rows, key=lambda row: (-len(row.tokens), row.tokens))
    exits = engine.exits(mode)
    for start in range(0, len(ordered), batch_size):
        batch_rows = ordered[start : start + batch_size]
        for index, score in _score_batch(engine, exits, batch_rows, [rows[row] for row in batch_rows], batch_size):
            scores[index] = score
        if progress is not None:
            progress(start + len(batch_rows), len(ordered))
    return scores


def _group_by_row(continuations: Sequence[Continuation], max_length: int) -> dict[_SharedRow, list[_LastToken]]:
    """Rows to run, each with the endings that share it; continuations without tokens need no row."""
    rows: dict[_SharedRow, list[_LastToken]] = {}
    for index, (context, tokens) in enumerate(continuations):
        if len(tokens) > max_length:
            raise TideError(
                f"a continuation has {len(tokens)} tokens, but at most {max_length} can be scored; raise max_length or "
                "leave the text out"
            )
        if not context:
            raise TideError("a context is empty; start it with a token (for example the beginning-of-text token)")
        if tokens:
            text = (*context, *tokens)[-(max_length + 1) :]
            rows.setdefault(_SharedRow(text[:-1], len(tokens)), []).append(_LastToken(index, text[-1]))
    return rows


def _score_batch(
    engine: TIDE, exits: Exits | None, rows: list[_SharedRow], endings: list[list[_LastToken]], batch_size: int
) -> Iterator[tuple[int, Score]]:
    """Index and score of each ending."""
    batch = _pad_batch(engine, rows, endings, batch_size)
    (log_likelihoods, is_greedy, layers), _, _ = engine.programs.run(_score_targets, (engine.model,), (batch, exits))
    log_likelihoods, is_greedy, layers = (
        np.asarray(log_likelihoods, np.float64),
        np.asarray(is_greedy),
        np.asarray(layers),
    )
    for b, (row, row_endings) in enumerate(zip(rows, endings, strict=True)):
        for k, ending in enumerate(row_endings):
            total = float(log_likelihoods[b, : row.scored_count, k].sum())
            check_finite(np.isfinite(total), engine.model.dtype)
            yield (
                ending.continuation,
                Score(total, bool(is_greedy[b, : row.scored_count, k].all()), layers[b, : row.scored_count]),
            )


def _pad_batch(engine: TIDE, rows: list[_SharedRow], endings: list[list[_LastToken]], batch_size: int) -> _PaddedBatch:
    """Padded arrays; every dimension is rounded up to a bucket, so that few shapes are compiled."""
    valid_rows = to_rows([list(row.tokens) for row in rows], None, engine.model.config)
    to_rows([[e.token for e in row_endings] for row_endings in endings], None, engine.model.config)
    height = min(batch_size, 1 << (len(rows) - 1).bit_length())
    width = bucket(valid_rows.mask.shape[1])
    positions = np.full((height, width), -1, np.int32)
    positions[: len(rows)] = positions_of(valid_rows.mask, width)
    tokens = np.zeros((height, width), np.int32)
    tokens[positions >= 0] = np.concatenate(valid_rows.rows)
    may_exit = np.ones((height, width), bool)
    scored_columns = np.zeros((height, bucket(max(row.scored_count for row in rows), 8)), np.int32)
    targets = np.zeros((*scored_columns.shape, bucket(max(map(len, endings)), 8)), np.int32)
    for b, (row, row_endings) in enumerate(zip(rows, endings, strict=True)):
        if not engine.config.prefill_exits:
            may_exit[b, : row.prompt_length] = False
        # The context's last token and the continuation's tokens predict the scored tokens. All but the last of these
        # are the same for every ending.
        scored_columns[b, : row.scored_count] = np.arange(row.prompt_length - 1, len(row.tokens))
        targets[b, : row.scored_count - 1] = np.asarray(row.tokens[row.prompt_length :], np.int32)[:, None]
        targets[b, row.scored_count - 1, : len(row_endings)] = [e.token for e in row_endings]
    return _PaddedBatch(*map(jnp.asarray, (tokens, positions, may_exit, scored_columns, targets)))


def _score_targets(
    model: Decoder, batch: _PaddedBatch, exits: Exits | None
) -> tuple[Float[Array, "B S K"], Bool[Array, "B S K"], Int[Array, "B S"]]:
    """Log-likelihood of each target, whether it is the most likely token, and the exit layer that predicted it."""
    out = run_depth(model, batch.tokens, batch.positions, None, exits, may_exit=batch.may_exit)
    scored_states = jnp.take_along_axis(out.states, batch.scored_columns[:, :, None], axis=1)

    def score_token(arguments: tuple[Array, Array]) -> tuple[Array, Array]:
        state, targets = arguments
        logits = model.logits(state[None, None])[0, 0]
        return jax.nn.log_softmax(logits)[targets], jnp.argmax(logits).astype(jnp.int32) == targets

    flat = scored_states.reshape(-1, scored_states.shape[-1]), batch.targets.reshape(-1, batch.targets.shape[-1])
    chunk = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    log_likelihoods, is_greedy = lax.map(score_token, flat, batch_size=min(chunk, flat[0].shape[0]))
    layers = jnp.take_along_axis(out.exit_layers, batch.scored_columns, axis=1)
    return log_likelihoods.reshape(batch.targets.shape), is_greedy.reshape(batch.targets.shape), layers

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


class _Row(NamedTuple):
    """A row of a forward pass: a text without its last token; the next tokens of its last `scored` tokens count."""

    tokens: tuple[int, ...]
    scored: int

    @property
    def prompt(self) -> int:
        """Number of leading tokens that belong to the context."""
        return len(self.tokens) - self.scored + 1


class _Ending(NamedTuple):
    """The last token of a text, and the index of its continuation."""

    place: int
    token: int


class _Batch(NamedTuple):
    """Rows as right-padded arrays.

    Attributes:
      picks: columns whose next tokens are scored.
      targets: those next tokens. Continuations that differ only in their last token share a row, along axis K.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    may_exit: Bool[Array, "B T"]
    picks: Int[Array, "B S"]
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
    rows = _rows(continuations, max_length)
    # Longest first, so that rows of a batch have similar lengths.
    ordered = sorted(rows, key=lambda row: (-len(row.tokens), row.tokens))
    exits = engine.exits(mode)
    for start in range(0, len(ordered), batch_size):
        chosen = ordered[start : start + batch_size]
        for place, score in _run(engine, exits, chosen, [rows[row] for row in chosen], batch_size):
            scores[place] = score
        if progress is not None:
            progress(start + len(chosen), len(ordered))
    return scores


def _rows(continuations: Sequence[Continuation], max_length: int) -> dict[_Row, list[_Ending]]:
    """Rows to run, each with the endings that share it; continuations without tokens need no row."""
    rows: dict[_Row, list[_Ending]] = {}
    for place, (context, tokens) in enumerate(continuations):
        if len(tokens) > max_length:
            raise TideError(
                f"a continuation has {len(tokens)} tokens, at most {max_length} can be scored; raise max_length or "
                "leave the text out"
            )
        if not context:
            raise TideError("a context is empty; start it with a token (for example the beginning-of-text token)")
        if tokens:
            text = (*context, *tokens)[-(max_length + 1) :]
            rows.setdefault(_Row(text[:-1], len(tokens)), []).append(_Ending(place, text[-1]))
    return rows


def _run(
    engine: TIDE, exits: Exits | None, rows: list[_Row], endings: list[list[_Ending]], batch_size: int
) -> Iterator[tuple[int, Score]]:
    """Index and score of each ending."""
    batch = _batch(engine, rows, endings, batch_size)
    (log_likelihoods, hits, layers), _, _ = engine.programs.run(_score, (engine.model,), (batch, exits))
    log_likelihoods, hits, layers = np.asarray(log_likelihoods, np.float64), np.asarray(hits), np.asarray(layers)
    for b, (row, listed) in enumerate(zip(rows, endings, strict=True)):
        for k, ending in enumerate(listed):
            total = float(log_likelihoods[b, : row.scored, k].sum())
            check_finite(np.isfinite(total), engine.model.dtype)
            yield ending.place, Score(total, bool(hits[b, : row.scored, k].all()), layers[b, : row.scored])


def _batch(engine: TIDE, rows: list[_Row], endings: list[list[_Ending]], batch_size: int) -> _Batch:
    """Padded arrays; every dimension is rounded up to a bucket, so that few shapes are compiled."""
    checked = to_rows([list(row.tokens) for row in rows], None, engine.model.config)
    to_rows([[e.token for e in listed] for listed in endings], None, engine.model.config)
    height = min(batch_size, 1 << (len(rows) - 1).bit_length())
    width = bucket(checked.mask.shape[1])
    positions = np.full((height, width), -1, np.int32)
    positions[: len(rows)] = positions_of(checked.mask, width)
    tokens = np.zeros((height, width), np.int32)
    tokens[positions >= 0] = np.concatenate(checked.rows)
    may_exit = np.ones((height, width), bool)
    picks = np.zeros((height, bucket(max(row.scored for row in rows), 8)), np.int32)
    targets = np.zeros((*picks.shape, bucket(max(map(len, endings)), 8)), np.int32)
    for b, (row, listed) in enumerate(zip(rows, endings, strict=True)):
        if not engine.config.prefill_exits:
            may_exit[b, : row.prompt] = False
        # The context's last token and the continuation's tokens predict the scored tokens. All but the last of these
        # are the same for every ending.
        picks[b, : row.scored] = np.arange(row.prompt - 1, len(row.tokens))
        targets[b, : row.scored - 1] = np.asarray(row.tokens[row.prompt :], np.int32)[:, None]
        targets[b, row.scored - 1, : len(listed)] = [e.token for e in listed]
    return _Batch(*map(jnp.asarray, (tokens, positions, may_exit, picks, targets)))


def _score(
    model: Decoder, batch: _Batch, exits: Exits | None
) -> tuple[Float[Array, "B S K"], Bool[Array, "B S K"], Int[Array, "B S"]]:
    """Log-likelihood of each target, whether it is the most likely token, and the exit layer that predicted it."""
    out = run_depth(model, batch.tokens, batch.positions, None, exits, may_exit=batch.may_exit)
    picked = jnp.take_along_axis(out.states, batch.picks[:, :, None], axis=1)

    def one(arguments: tuple[Array, Array]) -> tuple[Array, Array]:
        state, targets = arguments
        logits = model.logits(state[None, None])[0, 0]
        return jax.nn.log_softmax(logits)[targets], jnp.argmax(logits).astype(jnp.int32) == targets

    flat = picked.reshape(-1, picked.shape[-1]), batch.targets.reshape(-1, batch.targets.shape[-1])
    at_once = max(1, _LOGITS_AT_ONCE // model.config.vocab_size)
    log_likelihoods, hits = lax.map(one, flat, batch_size=min(at_once, flat[0].shape[0]))
    layers = jnp.take_along_axis(out.exit_layers, batch.picks, axis=1)
    return log_likelihoods.reshape(batch.targets.shape), hits.reshape(batch.targets.shape), layers

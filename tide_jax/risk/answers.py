"""Predictions of a model after each token of whole texts, at full depth and with exits.

The pass is the engine's own: later tokens read the keys and values that exited tokens wrote to the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from tide_jax.calibration.collect import Sample
from tide_jax.calibration.reading_plan import pad_texts
from tide_jax.engine import TIDE
from tide_jax.exits.depth import run_depth
from tide_jax.exits.evaluation import Batch
from tide_jax.exits.exits import Exits
from tide_jax.generation.finite import check_finite
from tide_jax.model.decoder import Decoder

_PADDED_WIDTHS = 4


class TextAnswers(NamedTuple):
    """A text of T tokens with the predictions after each token.

    Attributes:
      tokens: token ids, int32.
      counted: tokens that losses cover: all but position 0 and, for a `Sample`, those before its `start`.
      full_argmax, exit_argmax: the most likely next token at full depth and with exits, int32.
      full_log_probs, exit_log_probs: log probability of the text's own next token, float32; 0 after the last token.
      exit_layers: index of the last layer each token ran, int32.
      num_layers: layers of the model.
    """

    tokens: Int[np.ndarray, " T"]
    counted: Bool[np.ndarray, " T"]
    full_argmax: Int[np.ndarray, " T"]
    exit_argmax: Int[np.ndarray, " T"]
    full_log_probs: Float[np.ndarray, " T"]
    exit_log_probs: Float[np.ndarray, " T"]
    exit_layers: Int[np.ndarray, " T"]
    num_layers: int

    @property
    def depth(self) -> float:
        """Mean share of the layers that counted tokens ran."""
        return float((self.exit_layers[self.counted] + 1).mean() / self.num_layers)


class BatchPredictions(NamedTuple):
    """Predictions after each token of a batch [B, T], as in `TextAnswers`."""

    argmax: np.ndarray
    log_probs: np.ndarray
    exit_layers: np.ndarray


class TextReader:
    """Runs the same texts once at full depth, and then with any thresholds.

    Memory: the activations of a batch, the logits of one text, and eight bytes a token for predictions at full depth.

    Args:
      engine: provides model, routers, `min_layers`, `kv_strategy` and `prefill_exits`.
      samples: texts of at most `max_length` tokens.
      max_length: most tokens of a text.
      batch_size: texts in a forward pass.
      progress: called with the number of texts read at full depth, and the number of all texts.
    """

    def __init__(
        self,
        engine: TIDE,
        samples: Sequence[Sample],
        *,
        max_length: int,
        batch_size: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._engine, self._samples = engine, samples
        batch_size = min(batch_size, max(1, len(samples)))
        # Batches of similar length need little padding.
        order = sorted(range(len(samples)), key=lambda i: len(samples[i].ids))
        self._groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        self._shape = batch_size, max_length
        self._full_depth = [(r.argmax, r.log_probs) for r in self._predict_batches(None, progress)]

    def answers(
        self, threshold: float | tuple[float, ...], progress: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[int, TextAnswers]]:
        """Yields the index and the predictions of each sample, shorter ones first.

        Args:
          threshold: as in `ExitConfig.exit_threshold`.
          progress: called with the number of texts read, and the number of all texts.
        """
        exits = self._engine.with_config(exit_threshold=threshold).exits("exit")
        for group, full, read in zip(
            self._groups, self._full_depth, self._predict_batches(exits, progress), strict=True
        ):
            for row, number in enumerate(group):
                yield number, self._text_answers(self._samples[number], row, full, read)

    def batches(self) -> Iterator[Batch]:
        """Yields the texts as arrays, shorter ones first."""
        for group in self._groups:
            yield pack_texts([self._samples[number] for number in group], *self._shape)

    def _predict_batches(
        self, exits: Exits | None, progress: Callable[[int, int], None] | None
    ) -> Iterator[BatchPredictions]:
        done = 0
        for group, batch in zip(self._groups, self.batches(), strict=True):
            out = jax.device_get(_predict(self._engine.model, batch, exits))
            check_finite(np.isfinite(out[1])[np.asarray(batch.positions) >= 0], self._engine.model.dtype)
            done += len(group)
            if progress is not None:
                progress(done, len(self._samples))
            yield BatchPredictions(*out)

    def _text_answers(
        self, sample: Sample, row: int, full: tuple[np.ndarray, np.ndarray], read: BatchPredictions
    ) -> TextAnswers:
        count = len(sample.ids)
        has_next = np.arange(count) < count - 1
        return TextAnswers(
            tokens=np.asarray(sample.ids, np.int32),
            counted=np.arange(count) >= max(1, sample.start),
            full_argmax=full[0][row, :count],
            exit_argmax=read.argmax[row, :count],
            full_log_probs=np.where(has_next, full[1][row, :count], np.float32(0)),
            exit_log_probs=np.where(has_next, read.log_probs[row, :count], np.float32(0)),
            exit_layers=read.exit_layers[row, :count],
            num_layers=self._engine.model.config.num_layers,
        )


def pack_texts(samples: Sequence[Sample], batch_size: int, max_length: int) -> Batch:
    """Pads texts to a full batch, in one of a few widths, since each width is a compilation."""
    return Batch(*map(jnp.asarray, pad_texts(samples, batch_size, max_length, widths=_PADDED_WIDTHS)))


@jax.jit
def _predict(model: Decoder, batch: Batch, exits: Exits | None) -> tuple[Array, Array, Array]:
    may_exit = None if exits is None else batch.counted | exits.prompt
    out = run_depth(model, batch.tokens, batch.positions, None, exits, may_exit=may_exit)

    def predict_row(row: tuple[Array, Array]) -> tuple[Array, Array]:
        """Argmax and log probabilities of one text, so that only its logits are in memory."""
        states, next_tokens = row
        logits = model.logits(states[None])[0]
        next_logits = jnp.take_along_axis(logits, next_tokens[:, None], axis=-1)[:, 0]
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), next_logits - jax.nn.logsumexp(logits, axis=-1)

    # The target of each token is the text's next token.
    argmax, log_probs = lax.map(predict_row, (out.states, jnp.roll(batch.tokens, -1, axis=1)))
    return argmax, log_probs, out.exit_layers

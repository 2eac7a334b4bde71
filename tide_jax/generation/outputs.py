"""Return types of the `TIDE` engine."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from tide_jax.generation.stats import DraftStats, ExitStats


class GenerateOutput(NamedTuple):
    """Result of `TIDE.generate`, as numpy arrays; N is the longest row's number of new tokens.

    Attributes:
      tokens: new tokens, int32 [B, N], padded after a row's end.
      lengths: new tokens of each row, its end-of-sequence token included, int32 [B].
      exit_layers: index of the last layer each token ran, int32 [B, N], -1 past the end.
      stats: layers run, wall clock, drift.
      prompts: the tokens of each prompt, int32, without padding.
    """

    tokens: Int[np.ndarray, "B N"]
    lengths: Int[np.ndarray, " B"]
    exit_layers: Int[np.ndarray, "B N"]
    stats: ExitStats
    prompts: tuple[Int[np.ndarray, " _"], ...] = ()

    @property
    def sequences(self) -> list[np.ndarray]:
        """Prompt and new tokens of each row, without padding: ``tokenizer.batch_decode(out.sequences)``."""
        return [np.concatenate([prompt, new]) for prompt, new in zip(self.prompts, self.new_tokens, strict=True)]

    @property
    def new_tokens(self) -> list[np.ndarray]:
        """New tokens of each row, without padding."""
        return [row[:length] for row, length in zip(self.tokens, self.lengths, strict=True)]


class ScoreOutput(NamedTuple):
    """Result of scoring a batch.

    Attributes:
      logits: logits for the token after each token, float32 [B, T, V]; meaningless at padding.
      exit_layers: index of the last layer each token ran, int32 [B, T], -1 at padding.
      stats: layers run, wall clock, drift.
    """

    logits: Float[Array, "B T V"]
    exit_layers: Int[np.ndarray, "B T"]
    stats: ExitStats


class StreamStep(NamedTuple):
    """One step of `TIDE.stream`.

    Attributes:
      tokens: the new token of each row.
      exit_layers: index of the last layer each token ran; -1 for rows that had ended.
      layers_executed: layers the device ran since the last step.
      drafts: draft counters so far, with ``mode="lossless"``; otherwise None.
    """

    tokens: Int[np.ndarray, " B"]
    exit_layers: Int[np.ndarray, " B"]
    layers_executed: int
    drafts: DraftStats | None = None

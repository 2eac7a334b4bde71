"""Drift monitor: measures whether exits still agree with the full model on an engine's current input.

A share of the finished sequences runs again at full depth, teacher-forced, and argmaxes are compared on the same
prefix. This is the loss that `tide_jax.guarantee` promises. Audits use whole sequences for two reasons: a single token
run deeper during generation would read cache rows written by earlier exits, and tokens of one text are not independent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tide_jax.checks import open_share, share, whole_number
from tide_jax.config import ExitConfig
from tide_jax.drift.confidence_sequence import ConfidenceSequence, RiskTest
from tide_jax.errors import TideError
from tide_jax.exits.depth import run_depth
from tide_jax.exits.evaluation import argmax_by_row
from tide_jax.exits.exits import Exits
from tide_jax.generation.batch import PromptRows, bucket
from tide_jax.generation.programs import Programs
from tide_jax.generation.stats import DriftReport, Status
from tide_jax.model.decoder import Decoder
from tide_jax.model.sharding import fetch

logger = logging.getLogger(__name__)


class FinishedSequence(NamedTuple):
    """A sequence that ran with exits.

    Attributes:
      tokens: the tokens that ran, int32 [T].
      prompt_length: number of leading tokens that ran at full depth.
      start: first token whose argmax counts.
      exit_argmaxes: returns the argmaxes with exits after token `start` and each later one, int32 [T - start]; None if
        another pass has to compute them.
    """

    tokens: Int[np.ndarray, " T"]
    prompt_length: int
    start: int
    exit_argmaxes: Callable[[], np.ndarray] | None


def generated_sequences(
    prompts: Sequence[np.ndarray], tokens: np.ndarray, lengths: np.ndarray, *, prompt_exits: bool, greedy: bool
) -> list[FinishedSequence]:
    """Finished sequences of a generation.

    Counted are the new tokens that an exit may have chosen.

    Args:
      prompts: prompt tokens of each row.
      tokens: new tokens of each row.
      lengths: number of new tokens of each row.
      prompt_exits: whether prompt tokens may exit.
      greedy: whether the new tokens are argmaxes.
    """

    def make_sequence(prompt: np.ndarray, new: np.ndarray) -> FinishedSequence:
        start = max(1, len(prompt) - 1) if prompt_exits else len(prompt)
        run_tokens = np.concatenate([prompt, new[:-1]])  # the last new token does not run
        exit_argmaxes = (lambda: new[start - len(prompt) + 1 :]) if greedy else None
        return FinishedSequence(run_tokens, 0 if prompt_exits else len(prompt), start, exit_argmaxes)

    return [make_sequence(p, row[:n]) for p, row, n in zip(prompts, tokens, lengths, strict=True)]


def scored_sequences(rows: PromptRows, prompts: np.ndarray, logits: Float[Array, "B T V"]) -> list[FinishedSequence]:
    """Finished sequences of a scoring call; every token that was allowed to exit counts."""

    def make_sequence(row: int, prompt: int) -> FinishedSequence:
        start = max(1, prompt)
        return FinishedSequence(
            rows.rows[row], prompt, start, lambda: np.asarray(jnp.argmax(logits[row], axis=-1))[rows.mask[row]][start:]
        )

    return [make_sequence(row, int(prompt)) for row, prompt in enumerate(prompts.reshape(-1))]


class Auditor(NamedTuple):
    """Runs sequences again, with or without exits."""

    model: Decoder
    programs: Programs

    def argmaxes(self, sequences: Sequence[FinishedSequence], exits: Exits | None) -> tuple[list[np.ndarray], float]:
        """Argmaxes after each token of each sequence, and seconds of running; `exits=None` runs every layer."""
        batch = 1 << (len(sequences) - 1).bit_length()  # few compiled shapes
        width = bucket(max(len(s.tokens) for s in sequences))
        # Right-padded rows; the prompt of each sequence may not exit.
        tokens, positions = np.zeros((batch, width), np.int32), np.full((batch, width), -1, np.int32)
        may_exit = np.zeros((batch, width), bool)
        for row, sequence in enumerate(sequences):
            length = len(sequence.tokens)
            tokens[row, :length], positions[row, :length] = sequence.tokens, np.arange(length)
            may_exit[row, sequence.prompt_length : length] = True
        arguments = (jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(may_exit), exits)
        argmaxes, seconds, _ = self.programs.run(_argmaxes, (self.model,), arguments)
        return [row[: len(s.tokens)] for row, s in zip(fetch(argmaxes), sequences, strict=False)], seconds


class DriftMonitor:
    """Monitors the agreement of exits with the full model; pass one monitor to every call to watch.

    >>> monitor = DriftMonitor(rate=0.05, risk=0.02)
    >>> out = engine.generate(ids, monitor=monitor)                             # doctest: +SKIP
    >>> print(out.stats.drift.summary())                                        # doctest: +SKIP

    The choice of audited sequences depends only on the seed and their number, not on their content or batching. An
    audit costs about a prefill of its sequence, or two if tokens were sampled or changed by a repetition penalty or
    rules, since the exits' argmaxes are then unknown. The expected cost for each sequence is `rate` times that.

    Args:
      rate: share of finished sequences to audit.
      seed: determines which sequences are audited.
      risk: promised expected share of tokens that differ. None takes it from the engine's ``config.guarantee``; without
        one there is no promise.
      delta: probability that the interval ever excludes the truth, and that a promise that holds is ever reported as
        exceeded.

    Raises:
      TideError: a value outside its range.
    """

    def __init__(self, rate: float = 0.05, *, seed: int = 0, risk: float | None = None, delta: float = 0.05) -> None:
        self.rate = share("rate", rate)
        self.seed = whole_number("seed", seed, high=2**63 - 1)
        self.risk = None if risk is None else open_share("risk", risk)
        self.delta = open_share("delta", delta)
        self.reset()

    def reset(self) -> None:
        """Forgets all observations; use it after changing routers, exit settings, or the kind of text."""
        self._random = np.random.default_rng(self.seed)
        self._sequence = ConfidenceSequence(self.delta)
        self._test: RiskTest | None = None
        self._settings: ExitConfig | None = None
        self._sequences = self._tokens = 0
        self._seconds = 0.0
        self._status: Status = "unknown"

    def watch(self, config: ExitConfig) -> None:
        """Prepares for a run with exits; the first call takes the promise from the engine's settings.

        Raises:
          TideError: the settings differ from the first call's, or the promise is about a loss other than disagreement.
        """
        if self._settings is not None:
            if config != self._settings:
                raise TideError(
                    "this DriftMonitor has watched other exit settings; use one monitor for each, or reset() it"
                )
            return
        risk, guarantee = self.risk, config.guarantee
        if risk is None and guarantee is not None:
            if guarantee.loss != "disagreement":
                raise TideError(
                    f"the engine's guarantee bounds {guarantee.loss}, but a DriftMonitor measures disagreement; "
                    "pass DriftMonitor(risk=...), the share of tokens that may differ"
                )
            risk = guarantee.risk
        # The test gets half of delta, as does the interval's lower end: together they report a promise that holds as
        # exceeded with probability at most delta.
        self._test = None if risk is None else RiskTest(risk, self.delta / 2)
        self._settings = config

    def audit(self, sequences: Sequence[FinishedSequence], exits: Exits, auditor: Auditor) -> None:
        """Runs a share of the sequences again and records their agreement; skips those without counted tokens."""
        sequences = [s for s in sequences if s.start < len(s.tokens)]
        self._sequences += len(sequences)
        drawn = self._random.random(len(sequences)) < self.rate
        audited = [s for s, is_drawn in zip(sequences, drawn, strict=True) if is_drawn]
        if not audited:
            return
        # Full-depth argmaxes for all picked sequences; argmaxes with exits only where the call does not know them.
        full_argmaxes, seconds = auditor.argmaxes(audited, None)
        exit_argmaxes, exit_seconds = (
            auditor.argmaxes(unknown, exits) if (unknown := [s for s in audited if not s.exit_argmaxes]) else ([], 0.0)
        )
        self._seconds += seconds + exit_seconds
        remaining = iter(exit_argmaxes)
        for sequence, full in zip(audited, full_argmaxes, strict=True):
            with_exits = sequence.exit_argmaxes() if sequence.exit_argmaxes else next(remaining)[sequence.start :]
            self._record(full[sequence.start :] != with_exits)

    def report(self) -> DriftReport:
        """Report of all audits so far."""
        low, high = self._sequence.interval()
        mean = self._sequence.mean
        return DriftReport(
            sequences=self._sequences,
            audited=self._sequence.count,
            tokens=self._tokens,
            agreement=None if mean is None else 1.0 - mean,
            lower=1.0 - high,
            upper=1.0 - low,
            confidence=1.0 - self.delta,
            risk=self.risk if self._test is None else self._test.risk,
            status=self._status,
            wall_time=self._seconds,
        )

    def _record(self, differs: np.ndarray) -> None:
        """Records the comparisons of one sequence and updates the status."""
        value = float(differs.mean())
        self._sequence.update(value)
        self._tokens += differs.size
        if self._test is None:
            return
        self._test.update(value)
        low, high = self._sequence.interval()
        if self._status == "exceeded":
            return
        # The promise is broken if either the test or the interval says so.
        if not self._test.exceeded and low <= self._test.risk:
            self._status = "ok" if high <= self._test.risk else "unknown"
            return
        self._status = "exceeded"
        logger.warning(
            "drift: exits differ from the full model more often than promised; %s. Calibrate on text of this kind or "
            "raise the threshold, then reset() the monitor",
            self.report().summary(),
        )


def _argmaxes(
    model: Decoder,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    may_exit: Bool[Array, "B T"],
    exits: Exits | None,
) -> Int[Array, "B T"]:
    """Argmax after each token of a batch."""
    out = run_depth(model, tokens, positions, None, exits, may_exit=may_exit)
    return argmax_by_row(model, out.states)

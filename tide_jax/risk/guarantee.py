"""Thresholds with a guarantee: `guarantee` finds the lowest threshold whose risk is bounded with a stated confidence.

The method is Learn then Test (Angelopoulos et al. 2021, arXiv:2110.01052), used for early exits by CALM (Schuster et
al. 2022, arXiv:2207.07061). Examples are whole texts, because tokens of one text are not independent.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from tide_jax.calibration.collect import Progress, Sample, tokenise
from tide_jax.checks import instance_of, real_number, share, whole_number
from tide_jax.config import CalibrationConfig, ExitConfig, RiskGuarantee
from tide_jax.engine import TIDE
from tide_jax.errors import GuaranteeError, TideError
from tide_jax.risk.answers import TextAnswers, TextReader
from tide_jax.risk.statistics import fixed_sequence_test, hb_p_value, smallest_sample
from tide_jax.risk.threshold_path import threshold_path

Threshold = float | tuple[float, ...]
Loss = Literal["disagreement", "nll"] | Callable[[TextAnswers], float]

THRESHOLDS = tuple(round(1 - 0.002 * 1.25**k, 4) for k in range(26))
"""Default thresholds to test, one for all exit points: 0.998 to 0.4706, each 25% farther from 1 than the last."""

PATH_SHARE = 0.25
"""Share of the texts that choose the thresholds to test with `per_exit_point=True`; the others test them."""


def guarantee(
    engine: TIDE,
    texts: Iterable[Any],
    risk: float = 0.02,
    delta: float = 0.05,
    loss: Loss = "disagreement",
    *,
    tokenizer: Any = None,
    per_exit_point: bool = False,
    thresholds: Sequence[float | Sequence[float]] | None = None,
    bound: float = 1.0,
    max_length: int = 256,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> ExitConfig:
    """Finds the lowest threshold whose mean loss on new texts is at most `risk`, with probability 1 - `delta`.

    Thresholds are tested from the safest (highest) to the boldest (lowest), each on all texts, until the
    Hoeffding-Bentkus p-value of one exceeds `delta`. The one before is returned. This takes one pass over the texts at
    full depth, and one for each threshold tested.

    The promise covers texts like the given ones: independent draws of one kind, read from their start as here. No
    router may have been calibrated on any of them. Overlapping or repeated texts, or several windows of one document,
    void it: pass one window for each document. The promise is an average over texts, not a bound for each. It covers
    the tokens of given texts, not what the model generates after an exit has changed the text.

    Args:
      engine: model, routers, and the `threshold_tilt`, `min_layers`, `kv_strategy` and `prefill_exits` of the promise.
      texts: strings, sequences of token ids, or `tide_jax.calibration.collect.Sample`s. A sample's tokens before
        `start` run at full depth like a prompt (unless `prefill_exits`) and are not counted. Position 0 is never
        counted. Texts with nothing to count are skipped. `tide_jax.risk.statistics.smallest_sample` gives the least
        number needed.
      risk: mean loss of a text to promise: a share of tokens, or nats for "nll".
      delta: probability, over the draw of the texts, that the promise fails.
      loss: loss of one text.
        "disagreement": the share of its tokens where the most likely next token with exits is not the full model's.
        "nll": the increase of the mean negative log-likelihood of its next tokens over the full model's, clipped to
        0..`bound`.
        Otherwise a function of a `tide_jax.risk.answers.TextAnswers` that returns a number in [0, 1].
      tokenizer: for strings.
      per_exit_point: finds a threshold for each exit point; the engine must have no `threshold_tilt`. A quarter of the
        texts, drawn by `seed`, chooses the threshold vectors to test and their order; only the others test them.
      thresholds: thresholds to test instead of `THRESHOLDS`, safest first; numbers, or one for each exit point. They
        must have been chosen without looking at these texts.
      bound: where "nll" is clipped, in nats.
      max_length: tokens read of each text.
      batch_size: texts in a forward pass.
      seed: draws the texts that choose with `per_exit_point`.
      progress: called with (stage, done, total).

    Returns:
      The engine's configuration with the threshold found; `.guarantee` holds the promise and the measurements.

    Raises:
      GuaranteeError: too few texts for `risk` and `delta`, or not even the safest threshold passed.
      TideError: invalid input; the message is one line.
    """
    # Check the arguments before reading any text.
    claim = _risk_claim(engine, risk, delta, loss, bound)
    seed = whole_number("seed", seed, 0, 2**63 - 1)
    settings = CalibrationConfig(
        calibration_samples=sys.maxsize,
        max_length=min(whole_number("max_length", max_length, 2), engine.model.config.context_length),
        batch_size=batch_size,
    )
    if thresholds is not None and per_exit_point:
        raise TideError("per_exit_point=True chooses its own thresholds; leave out thresholds or per_exit_point")
    if per_exit_point and engine.config.threshold_tilt:
        raise TideError("per_exit_point=True chooses its own thresholds; pass an engine with threshold_tilt=0")
    candidates = _check_thresholds(engine, THRESHOLDS if thresholds is None else thresholds)
    # Tokenise, and check that there are enough texts to test on.
    samples = [
        s for s in tokenise(tokenizer, texts, settings, engine.model.config.vocab_size) if claim.has_countable_tokens(s)
    ]
    pilot_count = pilot_text_count(len(samples)) if per_exit_point else 0
    _check_text_count(claim, len(samples) - pilot_count, pilot_count)
    # Choose threshold vectors on some texts and test them on the others: the order must not depend on test data.
    if per_exit_point:
        order = np.random.default_rng(seed).permutation(len(samples))
        candidates = threshold_path(engine, [samples[i] for i in order[:pilot_count]], settings, progress)
        samples = [samples[i] for i in order[pilot_count:]]
    result = _test_thresholds(engine, samples, claim, candidates, settings, progress)
    return dataclasses.replace(engine.config, exit_threshold=result.exit_threshold, guarantee=result)


def pilot_text_count(count: int) -> int:
    """Number of texts, of `count`, that choose thresholds with `per_exit_point`; the others test them."""
    return max(1, int(PATH_SHARE * count))


class _RiskClaim(NamedTuple):
    """The promise to test; `loss` maps a text to [0, 1], and `unit` times that is the loss in the user's unit."""

    risk: float
    delta: float
    loss: Callable[[TextAnswers], float]
    loss_name: str
    unit: float

    def has_countable_tokens(self, sample: Sample) -> bool:
        """Whether a text has a token to measure; "nll" can't use the last one, whose next token is unknown."""
        return len(sample.ids) > max(1, sample.start) + (self.loss_name == "nll")


def _risk_claim(engine: TIDE, risk: float, delta: float, loss: Loss, bound: float) -> _RiskClaim:
    instance_of("engine", engine, TIDE)
    if not callable(loss) and not isinstance(loss, str):
        raise TideError(f"loss={type(loss).__name__} is not known; choose 'disagreement', 'nll' or a function")
    if engine.routers is None:
        raise TideError("the engine has no routers, so nothing exits; pass TIDE(model, routers)")
    unit = real_number("bound", bound) if loss == "nll" else 1.0
    if not 0.0 < unit < float("inf"):
        raise TideError(f"bound={bound!r} must be a number of nats above 0")
    if not 0.0 < real_number("risk", risk) < unit:
        raise TideError(f"risk={risk!r} must lie between 0 and {unit:g}")
    if not 0.0 < real_number("delta", delta) < 1.0:
        raise TideError(f"delta={delta!r} must lie between 0 and 1")
    if callable(loss):
        name = getattr(loss, "__name__", type(loss).__name__)
        return _RiskClaim(risk, delta, lambda answers: _custom_loss(loss, name, answers), name, unit)
    if loss == "nll":
        return _RiskClaim(risk, delta, lambda answers: _nll_loss(answers, unit), loss, unit)
    if loss == "disagreement":
        return _RiskClaim(risk, delta, _disagreement, loss, unit)
    raise TideError(f"loss={loss!r} is not known; choose 'disagreement', 'nll' or a function of TextAnswers")


def _disagreement(answers: TextAnswers) -> float:
    return float((answers.full_argmax != answers.exit_argmax)[answers.counted].mean())


def _nll_loss(answers: TextAnswers, bound: float) -> float:
    predicts = answers.counted[:-1]
    rise = (answers.full_log_probs[:-1] - answers.exit_log_probs[:-1])[predicts].mean(dtype=np.float64)
    return float(np.clip(rise / bound, 0.0, 1.0))


def _custom_loss(loss: Callable[[TextAnswers], float], name: str, answers: TextAnswers) -> float:
    try:
        return share("loss", loss(answers))
    except TideError as error:
        raise TideError(f"the loss function {name} must return a number in [0, 1] for every text: {error}") from error


def _check_thresholds(engine: TIDE, thresholds: Sequence[float | Sequence[float]]) -> list[Threshold]:
    """Thresholds as `ExitConfig` stores them; checked now, so that an invalid one fails before hours of measuring."""
    if isinstance(thresholds, str) or not isinstance(thresholds, Iterable):
        raise TideError(f"thresholds={thresholds!r} must be a sequence of thresholds, safest first")
    checked = [engine.with_config(exit_threshold=threshold).config.exit_threshold for threshold in thresholds]
    if not checked:
        raise TideError("thresholds is empty; pass at least one, safest first")
    return checked


def _check_text_count(claim: _RiskClaim, count: int, pilot_count: int) -> None:
    needed = smallest_sample(claim.risk / claim.unit, claim.delta)
    if count < needed:
        besides = f" besides the {pilot_count} that choose thresholds" if pilot_count else ""
        raise GuaranteeError(
            f"{count} texts are too few to test on{besides}: risk={claim.risk:g} with delta={claim.delta:g} needs at "
            f"least {needed} even if exits never err; pass more texts or raise risk or delta"
        )


def _test_thresholds(
    engine: TIDE,
    samples: Sequence[Sample],
    claim: _RiskClaim,
    candidates: Sequence[Threshold],
    settings: CalibrationConfig,
    progress: Progress | None,
) -> RiskGuarantee:
    """Tests thresholds in order and returns the guarantee of the last one that passes."""

    def stage_progress(name: str) -> Callable[[int, int], None] | None:
        return None if progress is None else functools.partial(progress, name)

    reader = TextReader(
        engine,
        samples,
        max_length=settings.max_length,
        batch_size=settings.batch_size,
        progress=stage_progress("reading at full depth"),
    )
    results: list[RiskGuarantee] = []

    def p_values() -> Iterator[float]:
        for number, threshold in enumerate(candidates, 1):
            # Loss and depth of every text at this threshold.
            step = stage_progress(f"testing threshold {number} of at most {len(candidates)}")
            losses, depths, tokens = np.zeros(len(samples)), np.zeros(len(samples)), np.zeros(len(samples), int)
            for i, answers in reader.answers(threshold, step):
                tokens[i] = answers.counted.sum()
                losses[i], depths[i] = claim.loss(answers), answers.depth
            mean = float(losses.mean())
            results.append(
                RiskGuarantee(
                    risk=float(claim.risk),
                    delta=float(claim.delta),
                    loss=claim.loss_name,
                    sequences=len(samples),
                    tokens=int(tokens.sum()),
                    p_value=hb_p_value(mean, len(samples), claim.risk / claim.unit),
                    observed=mean * claim.unit,
                    depth=min(1.0, float(np.average(depths, weights=tokens))),  # rounding may exceed 1
                    max_length=settings.max_length,
                    bound=claim.unit,
                    exit_threshold=threshold,
                    min_layers=engine.config.min_layers,
                    kv_strategy=engine.config.kv_strategy,
                    prefill_exits=engine.config.prefill_exits,
                    threshold_tilt=engine.config.threshold_tilt,
                )
            )
            yield results[-1].p_value

    # The test takes p-values one at a time, so thresholds after the first failure are never measured.
    passed = fixed_sequence_test(p_values(), claim.delta)
    if not passed:
        raise GuaranteeError(_failure_message(results[0]))
    return results[passed - 1]


def _failure_message(safest: RiskGuarantee) -> str:
    return (
        f"no threshold qualifies: the safest tested, {safest.exit_threshold}, has a mean loss of "
        f"{safest.observed:.4g} (p-value {safest.p_value:.3g}, delta {safest.delta:g}) over {safest.sequences} texts; "
        f"raise risk={safest.risk:g}, pass more texts or better routers, or turn exits off with exit_threshold=1.0"
    )

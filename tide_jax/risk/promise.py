"""Calibration with a promise: sets texts aside before training, and certifies a threshold on them afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from tide_jax.calibration.collect import Progress, Sample
from tide_jax.checks import share, whole_number
from tide_jax.config import CalibrationConfig, ExitConfig, KVStrategy
from tide_jax.engine import TIDE
from tide_jax.errors import GuaranteeError, TideError
from tide_jax.exits.router import RouterMetadata, Routers
from tide_jax.model.architecture import check_choice
from tide_jax.model.decoder import Decoder
from tide_jax.risk.guarantee import guarantee, pilot_text_count
from tide_jax.risk.statistics import smallest_sample

Loss = Literal["disagreement", "nll"]

MINIMUM_MULTIPLE = 2
"""Texts set aside by default, as a multiple of the fewest possible, which would allow no error at all."""

DEFAULT_SHARE = 0.2
"""Share of all texts set aside by default, if that is more than `MINIMUM_MULTIPLE` gives."""


@dataclasses.dataclass(frozen=True)
class Promise:
    """A promise to certify after calibration, and the number of texts to test it on.

    Attributes:
      risk, delta, loss, per_exit_point: as in `tide_jax.guarantee`.
      kv_strategy, threshold_tilt: exit settings of the promise, see `tide_jax.ExitConfig`.
      guarantee_texts: texts to set aside. None takes `MINIMUM_MULTIPLE` times the fewest possible or `DEFAULT_SHARE` of
        all texts, the larger of the two, but at most half of all, unless the fewest possible is more than half.

    Raises:
      TideError: a value outside its range.
      GuaranteeError: too few `guarantee_texts` for `risk` and `delta`.
    """

    risk: float = 0.02
    delta: float = 0.05
    loss: Loss = "disagreement"
    per_exit_point: bool = False
    kv_strategy: KVStrategy = "propagate"
    threshold_tilt: float = 0.0
    guarantee_texts: int | None = None

    def __post_init__(self) -> None:
        check_choice("kv_strategy", self.kv_strategy, KVStrategy)
        check_choice("loss", self.loss, Loss)
        if not isinstance(self.per_exit_point, bool):
            raise TideError(f"per_exit_point={self.per_exit_point!r} must be True or False")
        if share("threshold_tilt", self.threshold_tilt) and self.per_exit_point:
            raise TideError(
                "threshold_tilt tilts a single threshold, but per_exit_point chooses several; pass only one of them"
            )
        needed = self.minimum_texts
        if self.guarantee_texts is not None and whole_number("guarantee_texts", self.guarantee_texts, 1) < needed:
            raise GuaranteeError(
                f"guarantee_texts={self.guarantee_texts} is too few: risk={self.risk:g} with delta={self.delta:g} "
                f"needs at least {needed} even if exits never err; set more aside or raise risk or delta"
            )

    @property
    def minimum_texts(self) -> int:
        """Fewest texts with which a threshold can qualify, including those that choose it with `per_exit_point`."""
        tested = count = smallest_sample(self.risk, self.delta)
        while self.per_exit_point and count - pilot_text_count(count) < tested:
            count += 1
        return count

    def text_count(self, total: int) -> int:
        """Number of texts to set aside, of `total`.

        Raises:
          GuaranteeError: no texts would remain for the routers.
        """
        needed = self.minimum_texts
        count = self.guarantee_texts or min(
            max(MINIMUM_MULTIPLE * needed, round(DEFAULT_SHARE * total)), max(needed, total // 2)
        )
        if count >= total:
            raise GuaranteeError(
                f"{total} different texts are too few: risk={self.risk:g} with delta={self.delta:g} sets {count} "
                "aside, and routers learn from the others; pass more texts or raise risk or delta"
            )
        return count


def split_test_texts(
    samples: Iterable[Sample], promise: Promise, *, seed: int = 0
) -> tuple[list[Sample], list[Sample]]:
    """Splits texts into those for training and those for testing the promise.

    Test texts are drawn at random, so that they represent the whole source in any order. Repetitions of a text are
    dropped: routers could have learned it, and the same text twice is one observation.

    Args:
      samples: from `tide_jax.calibration.collect.tokenise`.
      promise: determines the number of test texts.
      seed: seed of the draw.

    Returns:
      Training texts and test texts.

    Raises:
      GuaranteeError: too few texts.
    """
    # Only texts with something to measure can be drawn; all others are for training.
    texts = list({np.asarray(sample.ids, np.int32).tobytes(): sample for sample in samples}.values())
    measurable = [i for i, sample in enumerate(texts) if len(sample.ids) > max(1, sample.start) + 1]
    count = promise.text_count(len(measurable))
    drawn = {measurable[i] for i in np.random.default_rng(seed).permutation(len(measurable))[:count]}
    training_texts, test_texts = (
        [s for i, s in enumerate(texts) if (i in drawn) is is_test] for is_test in (False, True)
    )
    return training_texts, test_texts


def certify_routers(
    model: Decoder,
    routers: Routers,
    texts: Sequence[Any],
    promise: Promise,
    config: CalibrationConfig,
    *,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Routers:
    """Certifies a threshold and returns the routers with the guarantee in their metadata.

    `Routers.exit_config` then returns it. If no threshold qualifies, `Routers.exit_config` is None, and the metadata
    holds the reason under "no_guarantee".

    Args:
      model: the model that the routers belong to.
      routers: trained routers.
      texts: as in `tide_jax.guarantee`; the routers must not have been calibrated on any of them.
      promise: the promise to certify.
      config: provides `min_layers`, `max_length`, `batch_size` and `seed`.
      tokenizer: for strings.
      progress: called with (stage, done, total).

    Raises:
      TideError: invalid input; the message is one line.
    """
    settings = {"kv_strategy": promise.kv_strategy, "threshold_tilt": promise.threshold_tilt}
    engine = TIDE(model, routers, ExitConfig(min_layers=config.min_layers, **settings))
    try:
        exit_config = guarantee(
            engine,
            texts,
            promise.risk,
            promise.delta,
            promise.loss,
            tokenizer=tokenizer,
            per_exit_point=promise.per_exit_point,
            max_length=config.max_length,
            batch_size=config.batch_size,
            seed=config.seed,
            progress=progress,
        )
        facts = {"exit_config": exit_config.to_dict(), "no_guarantee": None, "guarantee_dtype": model.precision}
    except GuaranteeError as error:
        facts = {"exit_config": None, "no_guarantee": str(error)}
    metadata = RouterMetadata.from_dict(routers.metadata.to_dict() | facts)
    return dataclasses.replace(routers, metadata=metadata)


def exit_settings(model: Decoder, routers: Routers, **overrides: Any) -> tuple[ExitConfig, str]:
    """Exit settings for a run, and one line that states their promise.

    Settings stored with the routers apply unless `overrides` replaces them. The promise is dropped if any setting
    differs, or if the model's precision is not that of the measurement.

    Args:
      model: the model of the run.
      routers: routers, with or without stored exit settings.
      overrides: fields of `ExitConfig`; None keeps the stored value.

    Raises:
      TideError: a setting outside its range, or unreadable stored settings.
    """
    stored = routers.exit_config
    default = min(ExitConfig.min_layers, model.config.num_layers)
    base = ExitConfig(min_layers=default) if stored is None else stored
    # Overriding a setting drops the promise (`ExitConfig.__post_init__`); another precision does, too.
    config = dataclasses.replace(base, **{name: value for name, value in overrides.items() if value is not None})
    measured, dtype = routers.metadata.to_dict().get("guarantee_dtype"), model.precision
    if config.guarantee is not None and measured != dtype:
        config = dataclasses.replace(config, guarantee=None)
        return config, f"nothing promised: the promise holds for {measured}, this model runs in {dtype}"
    if config.guarantee is not None:
        return config, config.guarantee.summary()
    reason = "" if stored is None else ": the router file's promise is for other settings"
    return config, f"nothing promised{reason}"


def no_guarantee_reason(routers: Routers) -> str | None:
    """Why no threshold qualified for a promise; None if one did, or if no promise was requested."""
    return routers.metadata.to_dict().get("no_guarantee")

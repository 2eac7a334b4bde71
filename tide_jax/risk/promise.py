"""Calibration with a promise: texts set aside before routers see any, and a threshold certified on them afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from tide_jax.calibration.collect import Progress, Sample
from tide_jax.checks import share, whole_number
from tide_jax.config import CalibrationConfig, ExitConfig, KVStrategy
from tide_jax.engine import TIDE
from tide_jax.errors import TideError
from tide_jax.exits.router import RouterMetadata, Routers
from tide_jax.model.architecture import check_choice
from tide_jax.model.decoder import Decoder
from tide_jax.risk.guarantee import guarantee, pilot_texts
from tide_jax.risk.statistics import GuaranteeError, smallest_sample

Loss = Literal["disagreement", "nll"]

ROOM = 2
"""Texts set aside by default, over the fewest that could do: those allow no error at all."""

SHARE = 0.2
"""Share of all texts that is set aside by default where that is more."""


@dataclasses.dataclass(frozen=True)
class Promise:
    """What is to be promised, and on how many texts it is to be tested.

    Attributes:
      risk, delta, loss, per_checkpoint: as in `tide_jax.guarantee`.
      kv_strategy, threshold_tilt: what the promise is for, see `tide_jax.ExitConfig`.
      guarantee_texts: how many to set aside; None: `ROOM` times the fewest that could do or `SHARE` of all, whichever
        is more, but no more than half of them where fewer could do.

    Raises:
      TideError: a value outside its range.
      GuaranteeError: too few `guarantee_texts` for `risk` and `delta`.
    """

    risk: float = 0.02
    delta: float = 0.05
    loss: Loss = "disagreement"
    per_checkpoint: bool = False
    kv_strategy: KVStrategy = "propagate"
    threshold_tilt: float = 0.0
    guarantee_texts: int | None = None

    def __post_init__(self) -> None:
        check_choice("kv_strategy", self.kv_strategy, KVStrategy)
        check_choice("loss", self.loss, Loss)
        if not isinstance(self.per_checkpoint, bool):
            raise TideError(f"per_checkpoint={self.per_checkpoint!r} must be True or False")
        if share("threshold_tilt", self.threshold_tilt) and self.per_checkpoint:
            raise TideError("threshold_tilt tilts one threshold, per_checkpoint chooses many; pass one of them")
        least = self.least
        if self.guarantee_texts is not None and whole_number("guarantee_texts", self.guarantee_texts, 1) < least:
            raise GuaranteeError(
                f"guarantee_texts={self.guarantee_texts} are too few: risk={self.risk:g} with delta={self.delta:g} "
                f"takes at least {least} even if exits never err; set more aside or raise risk or delta"
            )

    @property
    def least(self) -> int:
        """Texts below which no threshold could qualify, those that choose thresholds for each checkpoint included."""
        tested = count = smallest_sample(self.risk, self.delta)
        while self.per_checkpoint and count - pilot_texts(count) < tested:
            count += 1
        return count

    def count(self, total: int) -> int:
        """Texts to set aside of so many.

        Raises:
          GuaranteeError: that would leave none for the routers.
        """
        least = self.least
        count = self.guarantee_texts or min(max(ROOM * least, round(SHARE * total)), max(least, total // 2))
        if count >= total:
            raise GuaranteeError(
                f"{total} different texts are too few: risk={self.risk:g} with delta={self.delta:g} sets {count} "
                "aside, and routers learn from the others; pass more texts or raise risk or delta"
            )
        return count


def set_aside(samples: Iterable[Sample], promise: Promise, *, seed: int = 0) -> tuple[list[Sample], list[Sample]]:
    """Splits texts: those that routers may learn from, and those that a promise is tested on.

    The latter are drawn at random, so that they stand for the whole source whatever its order. A text that occurs again
    is left out: routers would know it, and the same text twice is one observation.

    Args:
      samples: of `tide_jax.calibration.collect.tokenise`.
      promise: says how many.
      seed: of the draw.

    Raises:
      GuaranteeError: too few texts.
    """
    texts = list({np.asarray(sample.ids, np.int32).tobytes(): sample for sample in samples}.values())
    usable = [i for i, sample in enumerate(texts) if len(sample.ids) > max(1, sample.start) + 1]
    count = promise.count(len(usable))
    drawn = {usable[i] for i in np.random.default_rng(seed).permutation(len(usable))[:count]}
    kept, aside = ([s for i, s in enumerate(texts) if (i in drawn) is wanted] for wanted in (False, True))
    return kept, aside


def with_guarantee(
    model: Decoder,
    routers: Routers,
    texts: Sequence[Any],
    promise: Promise,
    config: CalibrationConfig,
    *,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Routers:
    """The same routers with what can be promised for them in their metadata: `Routers.exit_config` has it, and is None
    where no threshold qualifies (`metadata` then says why under "no_guarantee").

    Args:
      texts: as in `tide_jax.guarantee`; none that the routers were calibrated on.
      config: its `min_layers`, `max_length`, `batch_size` and `seed` are taken.

    Raises:
      TideError: bad input, in one line.
    """
    dials = {"kv_strategy": promise.kv_strategy, "threshold_tilt": promise.threshold_tilt}
    engine = TIDE(model, routers, ExitConfig(min_layers=config.min_layers, **dials))
    try:
        found = guarantee(
            engine,
            texts,
            promise.risk,
            promise.delta,
            promise.loss,
            tokenizer=tokenizer,
            per_checkpoint=promise.per_checkpoint,
            max_length=config.max_length,
            batch_size=config.batch_size,
            seed=config.seed,
            progress=progress,
        )
        facts = {"exit_config": found.to_dict(), "no_guarantee": None, "guarantee_dtype": model.precision}
    except GuaranteeError as error:
        facts = {"exit_config": None, "no_guarantee": str(error)}
    metadata = RouterMetadata.from_dict(routers.metadata.to_dict() | facts)
    return dataclasses.replace(routers, metadata=metadata)


def exit_settings(model: Decoder, routers: Routers, **asked: Any) -> tuple[ExitConfig, str]:
    """Exit settings for a run, and a line that says what is promised for them.

    What was stored with the routers holds where nothing else is asked for; a promise is dropped with any other setting,
    and in another precision than it was measured in.

    Args:
      asked: fields of `ExitConfig`; None asks for nothing.

    Raises:
      TideError: a setting outside its range, or stored ones that can't be read.
    """
    stored = routers.exit_config
    default = min(ExitConfig.min_layers, model.config.num_layers)
    base = ExitConfig(min_layers=default) if stored is None else stored
    config = dataclasses.replace(base, **{name: value for name, value in asked.items() if value is not None})
    measured, dtype = routers.metadata.to_dict().get("guarantee_dtype"), model.precision
    if config.guarantee is not None and measured != dtype:
        config = dataclasses.replace(config, guarantee=None)
        return config, f"nothing promised: that was for {measured}, this is {dtype}"
    if config.guarantee is not None:
        return config, config.guarantee.summary()
    reason = "" if stored is None else ": the router file's promise is for other settings"
    return config, f"nothing promised{reason}"


def refusal(routers: Routers) -> str | None:
    """Why no threshold could be promised for these routers; None where one was, or none was asked for."""
    return routers.metadata.to_dict().get("no_guarantee")

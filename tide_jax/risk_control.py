"""Choosing a setting whose risk is held with a stated confidence: the statistics, in numpy.

Learn then Test (Angelopoulos, Bates, Candes, Jordan and Lei 2021, arXiv:2110.01052): every setting is a null hypothesis
"its risk exceeds the promised one", with a p-value from losses on held-out examples; settings are tested in an order
fixed beforehand until the first that can't be rejected. Nothing is assumed about how risk moves along that order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from tide_jax.checks import open_share, real_number, share, whole_number
from tide_jax.errors import TideError


class GuaranteeError(TideError):
    """No setting can be promised: too few texts, or none passed the test."""


@dataclasses.dataclass(frozen=True)
class RiskGuarantee:
    """What was promised for a setting of the exits, and what was measured for it.

    With probability 1 - `delta` over the draw of the texts, the mean loss of a new text of the same kind is at most
    `risk`, for the model and routers it was measured with.

    Attributes:
      risk: promised mean loss of a text: a share of tokens ("disagreement"), nats ("nll"), or the callable's own.
      delta: probability that the promise fails.
      loss: "disagreement", "nll" or the callable's name.
      sequences, tokens: texts tested on, and their counted tokens.
      p_value: of the hypothesis that the risk is exceeded; at most `delta`.
      observed: mean loss of those texts, in the unit of `risk`.
      depth: mean share of the layers that counted tokens ran.
      max_length: tokens read of each text.
      bound: increase of a text's mean loss at which "nll" is clipped, in nats; 1.0 for other losses.
      exit_threshold, threshold_tilt, min_layers, kv_strategy, prefill_exits: the `ExitConfig` it holds for, and no
        other.

    Raises:
      TideError: a value outside its range.
    """

    risk: float
    delta: float
    loss: str
    sequences: int
    tokens: int
    p_value: float
    observed: float
    depth: float
    max_length: int
    exit_threshold: float | tuple[float, ...]
    min_layers: int
    bound: float = 1.0
    kv_strategy: str = "propagate"
    prefill_exits: bool = False
    threshold_tilt: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.exit_threshold, list):  # as JSON has it
            object.__setattr__(self, "exit_threshold", tuple(self.exit_threshold))
        if not 0.0 < real_number("bound", self.bound) < math.inf:
            raise TideError(f"bound={self.bound!r} must be a number of nats above 0")
        if self.loss != "nll" and self.bound != 1.0:
            raise TideError(f"bound={self.bound!r} must be 1.0 for a loss other than nll")
        if not 0.0 < real_number("risk", self.risk) < self.bound:
            raise TideError(f"risk={self.risk!r} must lie between 0 and {self.bound:g}")
        if not 0.0 <= real_number("observed", self.observed) <= self.bound:
            raise TideError(f"observed={self.observed!r} is outside [0, {self.bound:g}]")
        open_share("delta", self.delta)
        for name in ("p_value", "depth", "threshold_tilt"):
            share(name, getattr(self, name))
        if self.exit_threshold == ():
            raise TideError("exit_threshold is empty; expected a number, or one for each checkpoint")
        for threshold in self.exit_threshold if isinstance(self.exit_threshold, tuple) else (self.exit_threshold,):
            share("exit_threshold", threshold)
        for name in ("sequences", "tokens", "max_length"):
            whole_number(name, getattr(self, name), 1, 2**63 - 1)
        whole_number("min_layers", self.min_layers)
        if not isinstance(self.prefill_exits, bool):
            raise TideError(f"prefill_exits={self.prefill_exits!r} must be True or False")
        for name in ("loss", "kv_strategy"):
            if not isinstance(value := getattr(self, name), str) or not value.isprintable():
                raise TideError(f"{name}={str(value)[:60]!r} must be a name")

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of `ExitConfig` that it holds for."""
        names = ("exit_threshold", "threshold_tilt", "min_layers", "kv_strategy", "prefill_exits")
        return {name: getattr(self, name) for name in names}

    def summary(self) -> str:
        """One line for people."""
        bound, observed = f"{self.risk:.4g}", f"{self.observed:.4g}"
        what = f"a mean loss ({self.loss}) of at most {bound}"
        if self.loss == "disagreement":
            bound, observed = f"{self.risk:.2%}", f"{self.observed:.2%}"
            what = f"at most {bound} of a text's tokens differ from the full model's, on average"
        if self.loss == "nll":
            what = f"a text's mean negative log-likelihood rises by at most {bound} nats, on average"
        tilt = f", tilt {self.threshold_tilt:g}" if self.threshold_tilt else ""
        return (
            f"promised with {1 - self.delta:.4g} confidence: {what} (threshold {_listed(self.exit_threshold)}{tilt}, "
            f"{self.sequences} texts: {observed}, p-value {self.p_value:.3g}, mean depth {self.depth:.1%})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RiskGuarantee:
        """Inverse of `to_dict`.

        Raises:
          TideError: unknown or missing fields, values they can't have, or a p-value above delta.
        """
        try:
            found = cls(**values)
        except TypeError as error:
            raise TideError(
                f"guarantee not understood ({error}); it was written by another version of tide_jax: measure it again"
            ) from error
        if found.p_value > found.delta:
            raise TideError(f"p_value={found.p_value!r} exceeds delta={found.delta!r}: that promises nothing")
        return found


def hb_p_value(mean_loss: float, count: int, risk: float) -> float:
    """Hoeffding-Bentkus p-value of "the expected loss exceeds `risk`" (arXiv:2110.01052, proposition 2).

    Args:
      mean_loss: of `count` independent examples, each loss in [0, 1].
      risk: in (0, 1).

    >>> round(hb_p_value(0.0, 149, 0.02), 4)
    0.0493
    """
    mean_loss, count, risk = share("mean_loss", mean_loss), whole_number("count", count, 1), open_share("risk", risk)
    low = min(mean_loss, risk)
    # h1(a, b), the relative entropy of two coins: Hoeffding's bound is exp(-n h1).
    entropy = (1 - low) * math.log((1 - low) / (1 - risk)) + (low * math.log(low / risk) if low else 0.0)
    bentkus = math.e * _binomial_cdf(math.ceil(count * mean_loss), count, risk)
    return min(math.exp(-count * entropy), bentkus, 1.0)


def _binomial_cdf(successes: int, count: int, rate: float) -> float:
    """P(Binomial(count, rate) <= successes), summed in logarithms: the terms under- and overflow by themselves."""
    if successes >= count:
        return 1.0
    k = np.arange(1, successes + 1, dtype=np.float64)
    steps = np.log((count + 1 - k) / k) + (math.log(rate) - math.log1p(-rate))
    terms = count * math.log1p(-rate) + np.concatenate([[0.0], np.cumsum(steps)])
    top = float(terms.max())
    return min(1.0, math.exp(top) * float(np.exp(terms - top).sum()))


def smallest_sample(risk: float, delta: float) -> int:
    """Examples below which not even losses of zero throughout would give a p-value of `delta`.

    >>> smallest_sample(0.02, 0.05)
    149
    """
    risk, delta = open_share("risk", risk), open_share("delta", delta)
    estimate = math.log(delta) / math.log1p(-risk) if risk > 1e-12 else math.inf
    if estimate > 1e9:
        raise GuaranteeError(f"risk={risk:g} with delta={delta:g} takes more than a billion texts; raise risk or delta")
    count = max(1, math.floor(estimate))
    while hb_p_value(0.0, count, risk) > delta:
        count += 1
    return count


def fixed_sequence_test(p_values: Iterable[float], delta: float) -> int:
    """How many hypotheses, from the first on, are rejected before the first that is not.

    The probability that any of them is true is at most `delta`, however many there are: no correction is needed, since
    a false rejection requires rejecting the first true hypothesis of the order. The order must not depend on the data
    the p-values come from. They are taken one at a time, and none after the first above `delta`.
    """
    delta, rejected = open_share("delta", delta), 0
    for p_value in p_values:
        if p_value > delta:
            break
        rejected += 1
    return rejected


def _listed(threshold: float | tuple[float, ...]) -> str:
    values = threshold if isinstance(threshold, tuple) else (threshold,)
    return " ".join(f"{value:.4g}" for value in values)

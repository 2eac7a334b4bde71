"""Confidence interval and test for a mean that stay valid at any time, however often they are read; in numpy.

An interval for a fixed sample size, read repeatedly while the sample grows, eventually misses the mean. These methods
bet against a hypothesis instead. If it is true, a gambler's capital does not grow on average, so the probability that
it ever reaches 1/alpha times the start is at most alpha (Ville's inequality). Waudby-Smith and Ramdas 2020,
arXiv:2010.09686.
"""

from __future__ import annotations

import math

import numpy as np

from tide_jax.checks import open_share, share

_STAKE = 0.9  # largest share of the capital that one observation may lose
_PRIOR_MEAN, _PRIOR_VARIANCE = 0.05, 0.01  # for the first bets; a bad prior widens the interval, but keeps it valid
_GRID = np.linspace(0.0, 1.0, 2001)[1:-1] ** 2  # candidate means, denser near 0, where losses are: 0.0001 apart at 0.02


class ConfidenceSequence:
    """Time-uniform confidence interval for the mean of values in [0, 1].

    It is the hedged betting interval with predictable plug-in bets (arXiv:2010.09686, section 4). A candidate mean is
    excluded once betting that the mean is higher, or that it is lower, has multiplied the capital by 2/delta. Both
    capitals are monotone in the candidate, so a grid of candidates rounds outward, by at most one step.

    The values must have the same conditional mean given those before; see `RiskTest` for a mean that may change.

    Args:
      delta: probability that the interval ever, at any number of values, excludes the mean.
    """

    def __init__(self, delta: float) -> None:
        self.delta = open_share("delta", delta)
        self._log_higher, self._log_lower = np.zeros_like(_GRID), np.zeros_like(_GRID)
        self._count, self._sum, self._squares = 0, 0.0, _PRIOR_VARIANCE

    @property
    def count(self) -> int:
        """Number of values seen."""
        return self._count

    @property
    def mean(self) -> float | None:
        """Mean of the values seen; None before the first."""
        return self._sum / self._count if self._count else None

    def update(self, value: float) -> None:
        """Adds the next value, in [0, 1].

        Raises:
          TideError: the value is outside [0, 1].
        """
        value = share("value", value)
        bet = self._bet()  # depends on earlier values alone; otherwise the bet would not be fair
        self._log_higher += np.log1p(np.minimum(bet, _STAKE / _GRID) * (value - _GRID))
        self._log_lower += np.log1p(np.minimum(bet, _STAKE / (1.0 - _GRID)) * (_GRID - value))
        self._count += 1
        self._sum += value
        self._squares += (value - (_PRIOR_MEAN + self._sum) / (self._count + 1)) ** 2

    def interval(self) -> tuple[float, float]:
        """Lower and upper end, in [0, 1]."""
        level = math.log(2.0 / self.delta)
        below, above = _GRID[self._log_higher >= level], _GRID[self._log_lower >= level]
        return float(below.max(initial=0.0)), float(above.min(initial=1.0))

    def _bet(self) -> float:
        variance, step = self._squares / (self._count + 1), self._count + 1
        return math.sqrt(2.0 * math.log(2.0 / self.delta) / (variance * step * math.log(step + 1)))


class RiskTest:
    """Sequential test that the mean of values in [0, 1] has always been at most `risk`.

    The null hypothesis bounds the mean of every value given those before. So a mean that varies below `risk` keeps the
    test valid, and a late rise is detected: at each time t a new gambler enters with capital 1/(t (t + 1)), which sums
    to 1, and all capitals are pooled (an e-detector's mixture of start times; Shin, Ramdas and Rinaldo 2022,
    arXiv:2203.03532), over six stakes. `exceeded` is True once the pooled capital has reached 1/delta.

    Args:
      risk: bound on the mean, in (0, 1).
      delta: probability that the test ever reports a risk as exceeded that is not.
    """

    _STAKES = _STAKE * 2.0 ** -np.arange(6)

    def __init__(self, risk: float, delta: float) -> None:
        self.risk, self.delta = open_share("risk", risk), open_share("delta", delta)
        self.exceeded = False
        self._log_capital = np.full(self._STAKES.shape, -np.inf)
        self._count = 0

    def update(self, value: float) -> None:
        """Adds the next value, in [0, 1].

        Raises:
          TideError: the value is outside [0, 1].
        """
        value = share("value", value)
        self._count += 1
        entering = -math.log(self._count * (self._count + 1))
        factor = np.log1p(self._STAKES * (value / self.risk - 1.0))
        self._log_capital = np.logaddexp(self._log_capital, entering) + factor
        capital = np.logaddexp.reduce(self._log_capital) - math.log(len(self._STAKES))
        self.exceeded |= bool(capital >= math.log(1.0 / self.delta))

"""Statements about a mean that stay valid however often, and whenever, one looks; in numpy.

An interval for a fixed sample size, watched while the sample grows, sooner or later misses the mean. These bet against
a hypothesis instead: a gambler who can't expect to win if it is true multiplies his capital by 1/alpha, at any time
ever, with probability at most alpha (Ville's inequality). Waudby-Smith and Ramdas 2020, arXiv:2010.09686.
"""

from __future__ import annotations

import math

import numpy as np

from tide_jax.checks import open_share, share

_STAKE = 0.9  # share of the capital that one observation may lose
_PRIOR_MEAN, _PRIOR_VARIANCE = 0.05, 0.01  # of the first bets; wrong ones cost width, never validity
_GRID = np.linspace(0.0, 1.0, 2001)[1:-1] ** 2  # candidate means, denser where losses are: 0.0001 apart at 0.02


class ConfidenceSequence:
    """Time-uniform confidence interval for the mean of values in [0, 1]: the hedged betting interval with predictable
    plug-in bets (arXiv:2010.09686, section 4). A candidate mean is outside once betting that the mean is higher, or
    lower, has multiplied the capital by 2/delta; both capitals are monotone in the candidate, so a grid rounds outward
    and loses nothing but its step.

    For values whose mean, given those before, is always the same; see `RiskTest` for one that may change.

    Args:
      delta: probability that the interval ever, at any number of values, leaves the mean out.
    """

    def __init__(self, delta: float) -> None:
        self.delta = open_share("delta", delta)
        self._log_higher, self._log_lower = np.zeros_like(_GRID), np.zeros_like(_GRID)
        self._count, self._sum, self._squares = 0, 0.0, _PRIOR_VARIANCE

    @property
    def count(self) -> int:
        """Values seen."""
        return self._count

    @property
    def mean(self) -> float | None:
        """Of the values seen; None before the first."""
        return self._sum / self._count if self._count else None

    def update(self, value: float) -> None:
        """Takes the next value, in [0, 1].

        Raises:
          TideError: it is outside.
        """
        value = share("value", value)
        bet = self._bet()  # from earlier values alone: that is what makes the capital a fair game's
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
    """Tests, value by value, that the mean of values in [0, 1] has been at most `risk` all along.

    The null hypothesis is about every value's mean given those before, so a mean that moves below `risk` never makes
    the test wrong, and one that rises late is found: gamblers enter at every time t with capital 1/(t (t + 1)), which
    sums to 1, and play as one (an e-detector's mixture of start times; Shin, Ramdas and Rinaldo 2022,
    arXiv:2203.03532), at six stakes. `exceeded` is True once their capital has reached 1/delta.

    Args:
      risk: in (0, 1).
      delta: probability that the test ever calls a kept risk exceeded.
    """

    _STAKES = _STAKE * 2.0 ** -np.arange(6)

    def __init__(self, risk: float, delta: float) -> None:
        self.risk, self.delta = open_share("risk", risk), open_share("delta", delta)
        self.exceeded = False
        self._log_capital = np.full(self._STAKES.shape, -np.inf)
        self._count = 0

    def update(self, value: float) -> None:
        """Takes the next value, in [0, 1].

        Raises:
          TideError: it is outside.
        """
        value = share("value", value)
        self._count += 1
        entering = -math.log(self._count * (self._count + 1))
        factor = np.log1p(self._STAKES * (value / self.risk - 1.0))
        self._log_capital = np.logaddexp(self._log_capital, entering) + factor
        capital = np.logaddexp.reduce(self._log_capital) - math.log(len(self._STAKES))
        self.exceeded |= bool(capital >= math.log(1.0 / self.delta))

"""Statistics for choosing a setting whose risk is bounded with a stated confidence, in numpy.

Learn then Test (Angelopoulos, Bates, Candes, Jordan and Lei 2021, arXiv:2110.01052): each setting has the null
hypothesis "its risk exceeds the promised one", with a p-value from losses on held-out examples. Settings are tested in
an order fixed beforehand, up to the first hypothesis that can't be rejected. The risk need not be monotone along that
order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from tide_jax.checks import open_share, share, whole_number
from tide_jax.errors import GuaranteeError


def hb_p_value(mean_loss: float, count: int, risk: float) -> float:
    """Hoeffding-Bentkus p-value of "the expected loss exceeds `risk`" (arXiv:2110.01052, proposition 2).

    Args:
      mean_loss: mean loss of the examples, each loss in [0, 1].
      count: number of independent examples.
      risk: the bound under test, in (0, 1).

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
    """P(Binomial(count, rate) <= successes), computed in logarithms because single terms under- and overflow."""
    if successes >= count:
        return 1.0
    k = np.arange(1, successes + 1, dtype=np.float64)
    steps = np.log((count + 1 - k) / k) + (math.log(rate) - math.log1p(-rate))
    terms = count * math.log1p(-rate) + np.concatenate([[0.0], np.cumsum(steps)])
    top = float(terms.max())
    return min(1.0, math.exp(top) * float(np.exp(terms - top).sum()))


def smallest_sample(risk: float, delta: float) -> int:
    """Fewest examples whose p-value can reach `delta`: with fewer, not even zero losses do.

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
    """Number of hypotheses rejected in order, before the first that is not.

    The probability that any rejected hypothesis is true is at most `delta`, for any number of hypotheses. No correction
    is needed, since a false rejection requires rejecting the first true hypothesis of the order. The order must not
    depend on the data behind the p-values. P-values are taken one at a time, and none after the first above `delta`.
    """
    delta, rejected = open_share("delta", delta), 0
    for p_value in p_values:
        if p_value > delta:
            break
        rejected += 1
    return rejected

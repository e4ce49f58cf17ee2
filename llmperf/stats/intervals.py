"""Confidence intervals of a median and of a ratio of two medians.

A median's interval lies between two order statistics, interpolated (Hettmansperger and Sheather,
1986); two are joined on the log scale (MOVER: Zou and Donner, 2008). Both assume independent
samples; where neighbouring runs are correlated, compare conditions paired by round.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CONFIDENCE = 0.95
LEAST = 5  # samples


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval, in the samples' unit; without one, `reason` says why."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str | None = None


def checked(samples: Sequence[float]) -> np.ndarray:
    """The samples as a 1-D float array; ValueError if one of them is not a finite number."""
    if not isinstance(samples, np.ndarray):
        samples = [math.nan if value is None else value for value in samples]
    x = np.asarray(samples, dtype=float)
    if x.ndim != 1:
        raise ValueError(f"samples have {x.ndim} dimensions; give a flat list of numbers")
    if not (finite := np.isfinite(x)).all():
        bad = np.argmin(finite)
        raise ValueError(f"sample {bad} is {x[bad]}; every sample must be a finite number")
    return x


def median_interval(samples: Sequence[float]) -> Interval:
    """The median and its 95 % interval, which needs 5 samples; ValueError for one not finite."""
    x = np.sort(checked(samples))
    if not len(x):
        return Interval(None, None, None, 0, "no samples")
    return Interval(_middle(x), *_bounds(x), len(x), _too_few(len(x)))


def ratio_interval(a: Sequence[float], b: Sequence[float], paired: bool = False) -> Interval:
    """median(a) / median(b) and its 95 % interval; `n` is the smaller sample's size.

    `paired=True` is for pairs of one round (a[i] and b[i]): it gives the median of a[i] / b[i], and
    what slowed both cancels. Raises ValueError for samples that are not above 0.
    """
    x, y = checked(a), checked(b)
    if (x <= 0).any() or (y <= 0).any():
        raise ValueError("a ratio needs samples above 0 on both sides")
    if paired and len(x) != len(y):
        raise ValueError(f"pairs need as many samples on both sides, not {len(x)} and {len(y)}")
    n = min(len(x), len(y))
    if not n:
        return Interval(None, None, None, 0, "no samples on one side")
    x, y = np.log(x), np.log(y)
    x, y = (np.sort(x - y), np.zeros(1)) if paired else (np.sort(x), np.sort(y))
    value = _middle(x) - _middle(y)
    if reason := _too_few(n):
        return Interval(math.exp(value), None, None, n, reason)
    x_low, x_high = _bounds(x)
    y_low, y_high = (0.0, 0.0) if paired else _bounds(y)
    low = value - math.hypot(_middle(x) - x_low, y_high - _middle(y))
    high = value + math.hypot(x_high - _middle(x), _middle(y) - y_low)
    return Interval(math.exp(value), math.exp(low), math.exp(high), n)


def confidence(n: int) -> str:
    """What the interval of n samples covers: the whole range of five covers 94 %."""
    return "94 %" if n == LEAST else f"{CONFIDENCE:.0%}".replace("%", " %")


def _middle(x: np.ndarray) -> float:
    """The median of the sorted x."""
    return float(x[(len(x) - 1) // 2] + x[len(x) // 2]) / 2


def _bounds(x: np.ndarray) -> tuple[float | None, float | None]:
    """Interpolated between the k-th and the next order statistic from either end. x: sorted."""
    n = len(x)
    if n < LEAST:
        return None, None
    k, weight = _order_rank(n)
    if not k:  # the whole range of 5 samples covers the median with 93.75 %
        return float(x[0]), float(x[-1])
    low = (1 - weight) * x[k - 1] + weight * x[k]
    high = (1 - weight) * x[n - k] + weight * x[n - k - 1]
    return float(low), float(high)


@lru_cache(maxsize=4096)
def _order_rank(n: int) -> tuple[int, float]:
    """The largest k whose order statistics still cover 95 %, and the weight of the next."""
    from scipy.stats import binom

    def coverage(k: int) -> float:
        return 1 - 2 * float(binom.cdf(k - 1, n, 0.5))

    k = int(binom.ppf((1 - CONFIDENCE) / 2, n, 0.5)) + 1
    while k and coverage(k) < CONFIDENCE:
        k -= 1
    if not k or 2 * (k + 1) > n + 1:
        return k, 0.0
    share = (coverage(k) - CONFIDENCE) / (coverage(k) - coverage(k + 1))
    return k, (n - k) * share / (k + (n - 2 * k) * share)


def _too_few(n: int) -> str | None:
    return f"{n} sample(s); an interval at {CONFIDENCE:.0%} needs {LEAST}" if n < LEAST else None

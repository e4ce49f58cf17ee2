"""Summaries of one sample, confidence intervals of medians and ratios, and the test for drift.

A median's interval lies between two order statistics, interpolated (Hettmansperger and Sheather,
1986); two are joined on the log scale (MOVER: Zou and Donner, 2008). Both assume independent
samples; where neighbouring runs are correlated, compare conditions paired by round.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special  # a fifth of the time that importing scipy.stats takes

CONFIDENCE = 0.95
LEAST = 5  # samples, for an interval
# The least sample size for a percentile: with a probability of 99 %, two samples at least lie
# above it (mlcommons/endpoints#417). The median is given from two samples on.
PERCENTILES = {"p50": 2, "p90": 64, "p95": 130, "p99": 662}
DRIFT_LEVEL = 0.04  # the rate of false alarms, the same for every number of runs
LEAST_DRIFT = 0.01  # a smaller change does not matter, however certain it is


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

    def coverage(k: int) -> float:
        return 1 - 2 * float(special.bdtr(k - 1, n, 0.5))  # the binomial distribution

    k = n // 2
    while k and coverage(k) < CONFIDENCE:
        k -= 1
    if not k or 2 * (k + 1) > n + 1:
        return k, 0.0
    share = (coverage(k) - CONFIDENCE) / (coverage(k) - coverage(k + 1))
    return k, (n - k) * share / (k + (n - 2 * k) * share)


def _too_few(n: int) -> str | None:
    return f"{n} sample(s); an interval at {CONFIDENCE:.0%} needs {LEAST}" if n < LEAST else None


def describe(samples: Sequence[float]) -> tuple[dict, str | None]:
    """`({median, mad, n, p50, p90, p95, p99}, reason)` of finite samples, in their own unit.

    What the sample is too small for is None, and `reason` names it.
    """
    x = checked(samples)
    least = {"median": 1, "mad": 2, **PERCENTILES}
    middle = float(np.median(x)) if len(x) else None
    mad = float(np.median(np.abs(x - middle))) if len(x) > 1 else None  # without a scale factor
    out = {"median": middle, "mad": mad, "n": len(x)}
    for name, n in PERCENTILES.items():
        out[name] = float(np.percentile(x, int(name[1:]))) if len(x) >= n else None
    missing = [f"{name} needs {n}" for name, n in least.items() if out[name] is None]
    return out, f"{len(x)} sample(s): {', '.join(missing)}" if missing else None


def drift(series: Sequence[Sequence[float]]) -> str | None:
    """A warning if values move with time. `series`: per condition, its values in order of time.

    One t-test of a common slope of the logarithms over all conditions. For independent noise it
    warns falsely in 4 % of cases, whatever the number of conditions and repeats. Raises ValueError
    for values that are not finite and above 0.
    """
    rows = [checked(row) for row in series if len(row) > 2]
    if any((row <= 0).any() for row in rows):
        raise ValueError("a drift needs values above 0")
    rows = [np.log(row) for row in rows]
    values = sum(map(len, rows))
    freedom = values - len(rows) - 1
    if freedom < 1:
        return None
    x = np.concatenate([np.linspace(-0.5, 0.5, len(row)) for row in rows])
    y = np.concatenate([row - row.mean() for row in rows])
    slope = float(x @ y / (x @ x))
    error = math.sqrt(max(0.0, float(y @ y - slope * (x @ y))) / freedom / float(x @ x))
    certain = abs(slope) > special.stdtrit(freedom, 1 - DRIFT_LEVEL / 2) * error
    change = math.expm1(slope)
    if not certain or abs(change) <= LEAST_DRIFT:
        return None
    return f"a trend of {change:+.1%} over {values} runs"

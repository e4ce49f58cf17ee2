"""Spread, drift and when to stop; with the intervals and the comparison, all the statistics.

Stated once: a percentile is numpy's linear one (Hyndman and Fan's type 7); a standard deviation,
where one is given, has n - 1 in it; MAD is the median absolute deviation without a scale factor.
SciPy is imported where it is used, so that importing this module stays cheap.
"""

import math
from collections.abc import Sequence

import numpy as np

from llmperf.stats.comparison import Comparison, Incomparable, compare
from llmperf.stats.intervals import Interval, checked, median_interval, ratio_interval

__all__ = [
    "Comparison",
    "Incomparable",
    "Interval",
    "checked",
    "compare",
    "describe",
    "drift",
    "mad",
    "median_interval",
    "narrow_enough",
    "ratio_interval",
    "spread",
]

# A percentile is given from the size on at which one sample is expected beyond it.
PERCENTILES = {"p50": 2, "p90": 10, "p95": 20, "p99": 100}
DRIFT_LEAST, DRIFT_LEVEL = 8, 0.04  # four against four is the least that can reach 4 %


def describe(samples: Sequence[float]) -> tuple[dict, str | None]:
    """`({median, mad, n, p50, p90, p95, p99}, reason)` of finite samples, in their own unit.

    What the sample is too small for is `None`, and `reason` names it; else the reason is None.
    Raises ValueError for a value that is not finite.
    """
    x = checked(samples)
    least = {"median": 1, "mad": 2, **PERCENTILES}
    out = {"median": None, "mad": None, "n": len(x), **dict.fromkeys(PERCENTILES)}
    if len(x):
        out["median"] = float(np.median(x))
    if len(x) > 1:
        out["mad"] = mad(x)
    carried = [key for key, n in PERCENTILES.items() if len(x) >= n]
    if carried:
        found = np.percentile(x, [int(key[1:]) for key in carried]).tolist()
        out |= dict(zip(carried, found, strict=True))
    lacking = [f"{key} needs {n}" for key, n in least.items() if out[key] is None]
    return out, f"{len(x)} sample(s): {', '.join(lacking)}" if lacking else None


def mad(samples: Sequence[float]) -> float | None:
    """Median absolute deviation from the median, unscaled, by SciPy; None below two samples."""
    from scipy.stats import median_abs_deviation

    x = checked(samples)
    return float(median_abs_deviation(x)) if len(x) > 1 else None


def spread(samples: Sequence[float], confidence: float = 0.95) -> dict:
    """`{n, median, mad, low, high, reason}`: what a plot or a table states of repeats."""
    found = median_interval(samples, confidence)
    return {
        "n": found.n,
        "median": found.value,
        "mad": mad(samples),
        "low": found.low,
        "high": found.high,
        "reason": found.reason,
    }


def drift(
    samples: Sequence[float], times: Sequence[float] | None = None, least_change: float = 0.01
) -> str | None:
    """A warning if the second half of the samples, in order of `times`, differs from the first.

    Mann-Whitney's rank test at 4 %, which assumes no law of the noise, and a change of the median
    of more than `least_change`, since a large sample makes any trifle significant. None: no drift
    seen, or fewer than 8 samples, which cannot show one. Raises ValueError for non-finite values.
    """
    from scipy.stats import mannwhitneyu

    x = checked(samples)
    at = np.arange(len(x)) if times is None else checked(times)
    if len(at) != len(x):
        raise ValueError(f"{len(x)} samples have {len(at)} times; give one time for each sample")
    if len(x) < DRIFT_LEAST:
        return None
    first, second = np.array_split(x[np.argsort(at, kind="stable")], 2)
    before, after = float(np.median(first)), float(np.median(second))
    change = (after - before) / abs(before) if before else math.inf * (after - before or 0)
    if not abs(change) > least_change or mannwhitneyu(first, second).pvalue >= DRIFT_LEVEL:
        return None
    return (
        f"drift: the median moved from {before:.4g} in the first half to {after:.4g} in the second "
        f"({change:+.1%})"
    )


def narrow_enough(
    samples: Sequence[float], relative_width: float, confidence: float = 0.95, least: int = 8
) -> bool:
    """Whether to stop: the interval's width is at most `relative_width` of the median.

    Never before `least` samples: a lucky narrow start is what would bias a sequential stop. The
    interval after such a stop is a little too narrow; the median is not biased (under 1 %).
    """
    if not relative_width > 0:
        raise ValueError(f"relative_width is {relative_width}; it must be above 0, such as 0.05")
    found = median_interval(samples, confidence)
    if found.n < least or found.low is None:
        return False
    return found.high - found.low <= relative_width * abs(found.value)

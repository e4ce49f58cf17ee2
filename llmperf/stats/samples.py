"""Summaries of one sample, and the test for drift."""

import math
from collections.abc import Sequence

import numpy as np

from llmperf.stats.intervals import checked

# The least sample size for a percentile: with a probability of 99 %, two samples at least lie
# above it (mlcommons/endpoints#417). The median is given from two samples on.
PERCENTILES = {"p50": 2, "p90": 64, "p95": 130, "p99": 662}
DRIFT_LEVEL = 0.04  # the rate of false alarms, the same for every number of runs
LEAST_DRIFT = 0.01  # a smaller change does not matter, however certain it is


def describe(samples: Sequence[float]) -> tuple[dict, str | None]:
    """`({median, mad, n, p50, p90, p95, p99}, reason)` of finite samples, in their own unit.

    What the sample is too small for is None, and `reason` names it.
    """
    x = checked(samples)
    least = {"median": 1, "mad": 2, **PERCENTILES}
    out = {"median": float(np.median(x)) if len(x) else None, "mad": mad(x), "n": len(x)}
    for name, n in PERCENTILES.items():
        out[name] = float(np.percentile(x, int(name[1:]))) if len(x) >= n else None
    missing = [f"{name} needs {n}" for name, n in least.items() if out[name] is None]
    return out, f"{len(x)} sample(s): {', '.join(missing)}" if missing else None


def mad(samples: Sequence[float]) -> float | None:
    """Median absolute deviation from the median, unscaled; None below two samples."""
    x = checked(samples)
    return float(np.median(np.abs(x - np.median(x)))) if len(x) > 1 else None


def drift(series: Sequence[Sequence[float]]) -> str | None:
    """A warning if values move with time. `series`: per condition, its values in order of time.

    One t-test of a common slope of the logarithms over all conditions. For independent noise it
    warns falsely in 4 % of cases, whatever the number of conditions and repeats. Raises ValueError
    for values that are not finite and above 0.
    """
    from scipy.stats import t as student

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
    certain = abs(slope) > student.ppf(1 - DRIFT_LEVEL / 2, freedom) * error
    change = math.expm1(slope)
    if not certain or abs(change) <= LEAST_DRIFT:
        return None
    return f"a trend of {change:+.1%} over {values} runs"

"""Spread, confidence, drift and comparison of samples.

Stated once: a percentile is numpy's linear one (Hyndman and Fan's type 7); a standard deviation,
where one is given, has n - 1 in it; MAD is the median absolute deviation without a scale factor.
SciPy is imported where it is used, so that importing this module stays cheap.
"""

import math
from collections.abc import Sequence

import numpy as np

# A percentile is given from the size on at which one sample is expected beyond it.
PERCENTILES = {"p50": 2, "p90": 10, "p95": 20, "p99": 100}


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


def mad(samples: Sequence[float]) -> float:
    """Median absolute deviation from the median, unscaled, by SciPy."""
    from scipy.stats import median_abs_deviation

    return float(median_abs_deviation(checked(samples)))


def checked(samples: Sequence[float]) -> np.ndarray:
    """The samples as a 1-D float array; ValueError if one of them is not a finite number."""
    x = np.asarray([math.nan if v is None else v for v in samples], dtype=float)
    bad = np.flatnonzero(~np.isfinite(x))
    if len(bad):
        raise ValueError(f"sample {bad[0]} is {x[bad[0]]}; every sample must be a finite number")
    return x

"""Statistics of repeated measurements: median, interval, ratio, comparison, drift.

Conventions: percentiles are numpy's linear ones (Hyndman and Fan, type 7); standard deviations
divide by n - 1; MAD is the median absolute deviation without a scale factor.
"""

from llmperf import lazy_face

__getattr__, __all__ = lazy_face(
    __name__,
    comparison="SpeedComparison compare_speeds",
    samples="Interval PERCENTILES checked confidence describe drift median_interval ratio_interval",
)

"""Runs from any machines: load, put side by side, compare, and pack into one file to share."""

from llmperf.runs.comparing import Comparison, Pair, compare
from llmperf.runs.loading import Run, latest, load, published, shipped
from llmperf.runs.sharing import share
from llmperf.runs.tables import differences, side_by_side

__all__ = [
    "Comparison",
    "Pair",
    "Run",
    "compare",
    "differences",
    "latest",
    "load",
    "published",
    "share",
    "shipped",
    "side_by_side",
]

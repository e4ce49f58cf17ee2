"""Runs from any machines: load, put side by side, compare, and pack into one file to share."""

from llmperf.findings.runs.comparing import Comparison, Pair, compare
from llmperf.findings.runs.loading import Run, latest, load, published, shipped
from llmperf.findings.runs.sharing import share
from llmperf.findings.runs.tables import differences, side_by_side

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

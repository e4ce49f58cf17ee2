"""Load: when requests arrive, and the highest rate at which a service level still holds.

An open loop sends at its scheduled times whether or not answers have come; its metrics count from
these times. A closed loop sends when an answer has come, and so hides the queue that it causes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Trace
from llmperf.measure import metrics

KINDS = ("poisson", "even")


def arrival_times(kind: str, n: int, rate_per_s: float = 1.0, *, seed: int = 0) -> np.ndarray:
    """`n` scheduled times in seconds, the first at 0, the last at (n - 1) / `rate_per_s`.

    `poisson`: exponential gaps, stretched to that length as in vLLM's benchmark, so that a short
    load has the rate it is named by; `even`: equal gaps. Raises ValueError for what cannot be.
    """
    if kind not in KINDS:
        raise ValueError(f"arrivals of kind {kind!r}: choose {', '.join(KINDS)}")
    if not 0 < rate_per_s < math.inf:
        raise ValueError(f"rate_per_s is {rate_per_s}: it must be a number above 0")
    gaps = np.random.default_rng(seed).exponential(size=n) if kind == "poisson" else np.ones(n)
    times = np.cumsum(gaps)
    times -= times[0]
    return times / (times[-1] or 1.0) * (n - 1) / rate_per_s


def arriving(work: Workload, kind: str, **options) -> Workload:
    """The same requests, each with its scheduled time; `options` are those of `arrival_times`."""
    return scheduled(work, arrival_times(kind, len(work.requests), **options))


def scheduled(work: Workload, times: Sequence[float]) -> Workload:
    """The same requests at the given times (s)."""
    requests = (replace(r, arrival_s=float(t)) for r, t in zip(work.requests, times, strict=True))
    return replace(work, requests=tuple(requests))


@dataclass(frozen=True)
class Probe:
    """One rate that was tried: the share of requests that met every limit."""

    rate_per_s: float
    attained: float
    goodput_per_s: float


@dataclass(frozen=True)
class HighestRate:
    """A rate that held and a higher one that did not; None where none was found."""

    probes: tuple[Probe, ...]
    holds_per_s: float | None
    misses_per_s: float | None


def probe(rate_per_s: float, trace: Trace, slo: dict) -> Probe:
    """Score a run at one rate from its scheduled times. No answer counts as a miss."""
    met = [metrics.meets(row, slo) for row in metrics.per_request(trace, clock="scheduled")]
    return Probe(rate_per_s, sum(met) / len(met), sum(met) / trace.duration_s)


def highest_rate(
    run: Callable[[float, int], Trace], slo: dict, low: float, high: float, *, steps: int = 5
) -> HighestRate:
    """The highest rate (requests/s) at which `metrics.SHARE` of the requests meet `slo`.

    `run(rate, seed)` answers one load. Bisection on the logarithm of the rate, as a bracket: one
    run a rate, so a short load may miss the true rate. The lowest is tried again when it fails: one
    disturbed run would end the search.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"rates from {low} to {high}: give two numbers above 0, the lower first")
    probes: list[Probe] = []

    def holds(rate: float) -> bool:
        probes.append(probe(rate, run(rate, len(probes)), slo))
        return probes[-1].attained >= metrics.SHARE

    if not (holds(low) or holds(low)):
        return HighestRate(tuple(probes), None, low)
    if holds(high):
        return HighestRate(tuple(probes), high, None)
    for _ in range(steps):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return HighestRate(tuple(sorted(probes, key=lambda p: p.rate_per_s)), low, high)

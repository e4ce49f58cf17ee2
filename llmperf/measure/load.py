"""Load: when requests arrive, and the highest rate at which a service level still holds.

An open loop sends at its scheduled times whether or not answers have come; a closed loop sends the
next request when an answer has come, and so hides the queue that it causes. Every strategy honours
`Request.arrival_s`, and metrics of an open loop count from it (`clock="scheduled"`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Trace
from llmperf.measure import metrics
from llmperf.measure.condition import Condition

KINDS = ("poisson", "gamma", "even", "closed")
RESAMPLES = 2_000  # of the bootstrap behind a rate's interval


def arrival_times(
    kind: str, n: int, rate_per_s: float = 1.0, *, burstiness: float = 1.0, seed: int = 0
) -> np.ndarray:
    """`n` scheduled times in seconds, the first at 0, at `rate_per_s` on average.

    `poisson`: exponential gaps. `gamma`: gaps of shape `burstiness`, as vLLM's benchmark has it:
    1 is Poisson, below 1 they come in bursts, above 1 more evenly. `even`: equal gaps. `closed`:
    all at 0, for a closed loop (the strategy's `concurrency` or `workers` holds them back).
    Times at another rate are the same ones stretched. Raises ValueError for what cannot be.
    """
    if kind not in KINDS:
        raise ValueError(f"arrivals of kind {kind!r}: choose {', '.join(KINDS)}")
    for name, value in (("rate_per_s", rate_per_s), ("burstiness", burstiness)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}: it must be a number above 0")
    if kind == "closed":
        return np.zeros(n)
    shape = {"poisson": 1.0, "gamma": burstiness}.get(kind)
    gaps = np.random.default_rng(seed).gamma(shape, 1 / shape, n) if shape else np.ones(n)
    times = np.cumsum(gaps) / rate_per_s
    return times - times[0]


def arriving(work: Workload, kind: str, **options) -> Workload:
    """The same requests, each with its scheduled time; `options` are those of `arrival_times`."""
    return scheduled(work, arrival_times(kind, len(work.requests), **options))


def scheduled(work: Workload, times: Sequence[float]) -> Workload:
    """The same requests at the given times (s)."""
    if len(times) != len(work.requests):
        raise ValueError(f"{len(work.requests)} requests have {len(times)} times: give one each")
    if not all(0 <= t < math.inf for t in times):
        raise ValueError("a scheduled time is negative or not a number: give seconds from 0 on")
    requests = (replace(r, arrival_s=float(t)) for r, t in zip(work.requests, times, strict=True))
    return replace(work, requests=tuple(requests))


@dataclass(frozen=True)
class Arriving(Condition):
    """A condition whose `level` requests arrive over time, scored from their scheduled times."""

    arrivals: Mapping = field(default_factory=lambda: {"kind": "poisson", "rate_per_s": 1.0})
    slo: Mapping | None = None

    @cached_property
    def workload(self) -> Workload:
        """The requests of the plain condition, with their arrivals."""
        return arriving(Condition.workload.func(self), **self.arrivals)

    def describe(self) -> dict:
        return super().describe() | {"arrivals": dict(self.arrivals), "slo": dict(self.slo or {})}

    def summarize(self, trace: Trace) -> dict:
        clock = "submitted" if self.arrivals["kind"] == "closed" else "scheduled"
        return metrics.summarize(trace, slo=dict(self.slo) if self.slo else None, clock=clock)

    def shortened(self, new_tokens: int) -> Workload:
        """A warm-up takes a few requests and does not wait for their arrival."""
        few = min(self.level, max(2, self.options.get("workers", 0)))
        short = super().shortened(new_tokens).take(few)
        return scheduled(short, [0.0] * len(short.requests))

    def reference(self, level: int) -> Condition:
        """Without arrivals: they make no difference to the tokens."""
        plain = {f: getattr(self, f) for f in Condition.__dataclass_fields__}
        return Condition(**plain).reference(level)


@dataclass(frozen=True)
class Probe:
    """One rate that was tried: how many requests met every limit.

    Requests that share a queue meet or miss together, so they tell less than independent ones:
    `inflation` times as many are needed to tell as much.
    """

    rate_per_s: float
    met: int
    requests: int
    inflation: float
    goodput_per_s: float

    @property
    def attained(self) -> float:
        return self.met / self.requests


@dataclass(frozen=True)
class HighestRate:
    """`rate_per_s` is the estimate, `low` and `high` its 95 % interval; None when not found."""

    probes: tuple[Probe, ...]
    rate_per_s: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


def probe(rate_per_s: float, traces: Sequence[Trace], slo: dict) -> Probe:
    """Score runs at one rate from their scheduled times. No answer counts as a miss."""
    rows = [metrics.per_request(t, clock="scheduled") for t in traces]
    met = [np.array([metrics.meets(row, slo) for row in run], dtype=float) for run in rows]
    total, n = float(sum(m.sum() for m in met)), sum(map(len, met))
    goodput = total / sum(t.duration_s for t in traces)
    return Probe(rate_per_s, int(total), n, _inflation(met, total / n), goodput)


def _inflation(met: Sequence[np.ndarray], p: float) -> float:
    """How much wider than of independent requests: from the means of blocks of neighbours."""
    if not 0 < p < 1:
        return 1.0
    size = max(1, round(max(map(len, met)) ** (2 / 3)))
    means = [m[i : i + size].mean() for m in met for i in range(0, len(m) - size + 1, size)]
    return max(1.0, size * float(np.mean((np.array(means) - p) ** 2)) / (p * (1 - p)))


def highest_rate(
    run: Callable[[float, int], Trace],
    slo: dict,
    low: float,
    high: float,
    *,
    share: float = 0.9,
    steps: int = 5,
    repeats: int = 1,
    seed: int = 0,
) -> HighestRate:
    """The highest rate (requests/s) at which `share` of the requests meet every limit of `slo`.

    `run(rate, seed)` answers one load; each rate gets `repeats` of them with seeds of their own.
    Bisection on the logarithm of the rate: a rate holds when its goodput is at least `share` of
    what arrived. The interval comes from drawing each probe's share again, allowing for requests
    that share a queue, and reaches at least over the last bracket. On simulated queues it
    covers the true rate in 8 of 10 sweeps with one run of 200 requests a rate, and in more than 9
    with three runs or 1,000 requests.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"rates from {low} to {high}: give two numbers above 0, the lower first")
    if not 0 < share < 1:
        raise ValueError(f"share is {share}: it must be between 0 and 1, such as 0.9")
    probes: list[Probe] = []

    def holds(rate: float) -> bool:
        seeds = (seed + 1_000 * len(probes) + i for i in range(repeats))
        probes.append(probe(rate, [run(rate, s) for s in seeds], slo))
        return probes[-1].attained >= share

    if not holds(low):
        why = f"at the lowest rate tried, {low:g}/s, {probes[0].attained:.0%} met the limits"
        return HighestRate(tuple(probes), reason=why)
    if holds(high):
        why = f"the limits still hold at the highest rate tried, {high:g}/s"
        return HighestRate(tuple(probes), high, reason=why)
    for _ in range(steps):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    ordered = tuple(sorted(probes, key=lambda p: p.rate_per_s))
    crossings = _bootstrap(ordered, share, seed)
    edges = np.quantile(crossings, (0.025, 0.975)).tolist()
    estimate = _crossing(ordered, [p.attained for p in ordered], share)
    return HighestRate(ordered, estimate, min(low, edges[0]), max(high, edges[1]))


def _bootstrap(probes: Sequence[Probe], share: float, seed: int) -> np.ndarray:
    """Crossing rates of probes whose shares are drawn again; half a success and failure added, so
    that a probe where all went well is not taken for certain (Jeffreys)."""
    dice = np.random.default_rng(seed)
    near = [p.inflation for p in probes if 2 * share - 1 <= p.attained < 1]
    inflation = max(near, default=1.0)  # where all met, a probe cannot know its own
    chance = [
        dice.beta(p.met / inflation + 0.5, (p.requests - p.met) / inflation + 0.5, RESAMPLES)
        for p in probes
    ]
    return np.array([_crossing(probes, row, share) for row in np.transpose(chance)])


def _crossing(probes: Sequence[Probe], attained: Sequence[float], share: float) -> float:
    """The rate at which attainment, made to fall with the rate, first passes below `share`."""
    falling = np.minimum.accumulate(attained)[::-1]
    logs = np.log([p.rate_per_s for p in probes])[::-1]
    return float(np.exp(np.interp(share - 1e-12, falling, logs)))

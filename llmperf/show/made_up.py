"""Simulated machines on a simulated clock for notebook 02: exact and repeatable."""

from dataclasses import dataclass

import numpy as np

from llmperf import stats
from llmperf.decoding.trace import RequestTrace, Trace

FIRST_RUNS_MS = (600.0, 60.0, 8.0)  # of the first runs: kernels load, memory grows, clocks rise


@dataclass
class Device:
    """A device that works through a queue while the program goes on; `now_ms` is the clock."""

    launch_ms: float = 0.02  # the program's time for a launch
    now_ms: float = 0.0
    free_ms: float = 0.0  # when the device will have finished its queue

    def launch(self, work_ms: float) -> None:
        """Queue work and return at once."""
        self.now_ms += self.launch_ms
        self.free_ms = max(self.free_ms, self.now_ms) + work_ms

    def synchronize(self) -> None:
        """Wait until the device has finished."""
        self.now_ms = max(self.now_ms, self.free_ms)


def request(id: int, scheduled_s: float, submitted_s: float, token_s, started_s=None):
    """A request that ended ok with these token times; which tokens they are does not matter."""
    times = tuple(round(float(t), 6) for t in token_s)
    tokens = tuple(range(len(times)))
    return RequestTrace(id, 32, scheduled_s, submitted_s, started_s, times, tokens)


def three_requests() -> Trace:
    """A quick answer, a long one with a pause of half a second, and a short one that waited."""
    pause = np.r_[0.6 + 0.05 * np.arange(4), 1.25 + 0.05 * np.arange(5)]
    rows = (
        request(0, 0.0, 0.0, 0.2 + 0.05 * np.arange(5), started_s=0.0),
        request(1, 0.0, 0.0, pause, started_s=0.4),
        request(2, 0.1, 0.1, (1.5, 1.6), started_s=1.4),
    )
    return Trace(rows, 2.0)


def warming_up(runs: int) -> np.ndarray:
    """Milliseconds of each run of a fresh process: the first ones load kernels and wake clocks."""
    return 40.0 + np.resize([*FIRST_RUNS_MS, *np.zeros(runs)], runs)


def noisy(rng: np.random.Generator, n, percent: float = 3.0) -> np.ndarray:
    """Throughputs around 30 tokens/s: most runs alike, a few much slower, as on real machines."""
    return 30 * np.exp(-percent / 100 * np.abs(rng.standard_t(4, size=n)))


def throttled(rng: np.random.Generator, order: str, slower: float = 0.0) -> tuple[np.ndarray, ...]:
    """Throughput of programs A and B on a machine that slows by 10 % over 10 runs of each.

    B is `slower` than A by that share. `order` is "A then B", or "shuffled" (each round has both
    once). Gives positions of A's runs in time, A's throughput and B's.
    """
    speeds = noisy(rng, 20, 1.0) * np.linspace(1, 0.9, 20)
    first = np.arange(10) if order == "A then B" else 2 * np.arange(10) + rng.integers(0, 2, 10)
    return first, speeds[first], np.delete(speeds, first) * (1 - slower)


def told_apart(order: str, slower: float, paired: bool) -> float:
    """The share of 200 trials in which A and B of `throttled` are called different."""
    rng = np.random.default_rng(0)
    pairs = (throttled(rng, order, slower)[1:] for _ in range(200))
    found = [stats.ratio_interval(a, b, paired=paired) for a, b in pairs]
    return sum(not f.low <= 1 <= f.high for f in found) / len(found)


def interval_width(n: int) -> float | None:
    """Typical width of the median's interval after n noisy runs, as a share of the median."""
    rng = np.random.default_rng(0)
    found = [stats.median_interval(noisy(rng, n)) for _ in range(300)]
    if found[0].low is None:
        return None
    return float(np.median([(i.high - i.low) / i.value for i in found]))


def stalling_server() -> Trace:
    """One connection to a server that answers in 50 ms, but stalls from second 3 to 5.

    A request is due every 0.1 s. While the server stalls, the connection is taken, and the requests
    that are due wait to be sent.
    """
    rows, free = [], 0.0
    for i in range(100):
        due = i * 0.1
        sent = max(due, free)
        free = (5.0 if 3.0 <= sent < 5.0 else sent) + 0.05
        rows.append(request(i, round(due, 6), round(sent, 6), (free,), started_s=round(sent, 6)))
    return Trace(tuple(rows), round(free, 6))

"""The statistics of one record with 100,000 inter-token latencies: `python bench_stats.py`."""

import time

import numpy as np
import scipy.stats  # noqa: F401  the first import of SciPy is not what is timed

from llmperf import stats
from llmperf.decoding.trace import RequestTrace, Trace
from llmperf.measure import metrics

REQUESTS, TOKENS, REPEATS = 100, 1001, 7


def made_up() -> Trace:
    rng = np.random.default_rng(0)
    requests = []
    for id in range(REQUESTS):
        times = tuple((1 + np.cumsum(rng.lognormal(-4, 0.5, TOKENS))).tolist())
        requests.append(RequestTrace(id, 32, 0.0, 0.1, 0.5, times, tuple(range(TOKENS))))
    return Trace(tuple(requests), 1 + max(r.token_s[-1] for r in requests))


def main() -> None:
    trace, taken = made_up(), {"summarize": [], "interval": []}
    gaps = metrics.itl_ms(trace)
    work = {
        "summarize": lambda: metrics.summarize(trace, {"ttft_ms": 2000, "tpot_ms": 100}),
        "interval": lambda: stats.median_interval(gaps),
    }
    for _ in range(REPEATS):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    for name, seconds in taken.items():
        print(f"{name:10} {np.median(seconds):.3f} s, worst of {REPEATS} {max(seconds):.3f} s")
    whole = sum(np.median(seconds) for seconds in taken.values())
    print(f"{len(gaps)} samples, both: {whole:.3f} s (wanted: under 0.3 s)")


if __name__ == "__main__":
    main()

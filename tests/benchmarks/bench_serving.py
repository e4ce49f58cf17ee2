"""Serving: what the front process costs, continuous batching against its rivals, and a soak.

python tests/benchmarks/bench_serving.py front      # overhead with a model that costs nothing
python tests/benchmarks/bench_serving.py saturated  # tokens/s, interleaved, bf16
python tests/benchmarks/bench_serving.py joins      # ITL while a long prompt joins
python tests/benchmarks/bench_serving.py idle       # TTFT at low load against sequential
python tests/benchmarks/bench_serving.py soak       # 10,000 requests with a deadline
"""

import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil

TESTS = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, TESTS)
os.environ["PYTHONPATH"] = TESTS  # where the inference process finds `engines`

import engines  # noqa: E402

from llmperf import models, stats, strategies  # noqa: E402
from llmperf.decoding import Slots  # noqa: E402
from llmperf.decoding import requests as workload  # noqa: E402
from llmperf.decoding.requests import Request, Workload  # noqa: E402
from llmperf.decoding.sampling import GREEDY  # noqa: E402
from llmperf.measure import load, metrics, paired  # noqa: E402
from llmperf.strategies import Server  # noqa: E402


def front(n: int = 2_000, rate: float = 500.0) -> None:
    """Time from sending to the one token that costs nothing, and the front's own CPU time."""
    times = load.arrival_times("even", n, rate)
    requests = (Request(i, (1, 2, 3), 1, arrival_s=float(at)) for i, at in enumerate(times))
    with Server(engines.front(), engine="engines:null") as server:
        server.run(Workload((Request(0, (1, 2, 3), 1),)))  # warm
        cpu = time.process_time()
        trace = server.run(Workload(tuple(requests)), window_s=0)
        cpu = (time.process_time() - cpu) / n * 1e3
    took = [(r.token_s[0] - r.submitted_s) * 1e3 for r in trace.requests]
    p50, p99 = np.quantile(took, (0.5, 0.99))
    print(f"{n} requests at {rate:g}/s: median {p50:.2f} ms, p99 {p99:.2f} ms", end="; ")
    print(f"front CPU {cpu:.2f} ms a request")


def saturated(n: int = 32, rounds: int = 7) -> None:
    """All requests at once, 16 rows: continuous batching against its rivals, output tokens/s."""
    model = models.load("smollm2-135m", dtype="bf16", device="cpu")

    def arm(work, name, **options):
        return lambda: strategies.STRATEGIES[name](model, work, options)

    equal = workload.build(model.tokenizer, n, 32, 32, sampling=GREEDY)
    lengths = [int(x) for x in np.linspace(16, 128, n)]
    random.Random(0).shuffle(lengths)
    mixed = workload.build(model.tokenizer, n, 32, lengths, sampling=GREEDY)
    with strategies.session():
        for title, work in (("equal lengths", equal), ("lengths from 16 to 128", mixed)):
            arms = {
                "continuous": arm(work, "continuous", max_batch=16),
                "dynamic": arm(work, "dynamic", max_batch=16),
                "batches of 16": arm(work, "batch", batch_size=16),
                "padded generate": arm(work, "peer", engine="generate"),
                "transformers-continuous": arm(work, "peer", engine="transformers-continuous"),
                "sequential": arm(work, "sequential"),
            }
            speeds = paired(arms, rounds)
            print(title)
            for other, values in speeds.items():
                ratio = stats.ratio_interval(speeds["continuous"], values, paired=True)
                span = f"({ratio.low:.2f} to {ratio.high:.2f})" if ratio.low else ""
                print(f"  continuous over {other}: {ratio.value:.2f} {span},", end=" ")
                print(f"{np.median(values):.0f} tokens/s")


def joins(rounds: int = 7, rows: int = 4, new: int = 64) -> None:
    """p95 of the gaps between tokens of running requests while a prompt of 512 tokens joins."""
    model = models.load("smollm2-135m", dtype="bf16", device="cpu")
    asked = workload.build(model.tokenizer, rows, 32, new, sampling=GREEDY).requests
    late = Request(99, workload.build(model.tokenizer, 1, 512, 4).requests[0].prompt_ids, 4)

    def gaps(joining: bool) -> float:
        slots = Slots(model, rows + 1, 600, sampling=GREEDY)
        for request in asked:
            slots.admit(request.id, request)
        times = []
        for step in range(new):
            if joining and step == 10:
                slots.admit(late.id, late)
            slots.step()
            times.append(time.perf_counter())
        return float(np.quantile(np.diff(times[5:]), 0.95))

    pairs = [(gaps(True), gaps(False)) for _ in range(rounds + 1)][1:]
    ratio = stats.ratio_interval(*map(list, zip(*pairs, strict=True)), paired=True)
    print(f"p95 gap while 512 tokens join / without: {ratio.value:.2f}", end=" ")
    print(f"({ratio.low:.2f} to {ratio.high:.2f}), {np.median([b for _, b in pairs]) * 1e3:.1f} ms")


def idle(n: int = 20, rate: float = 0.5) -> None:
    """TTFT when almost every request finds the device free."""
    model = models.load("smollm2-135m", dtype="fp32", device="cpu")
    work = workload.build(model.tokenizer, n, 32, 8, sampling=GREEDY)
    work = load.arriving(work, "even", rate_per_s=rate)
    with strategies.session():
        for name in ("sequential", "dynamic") * 2:
            trace = strategies.STRATEGIES[name](model, work, {})
            ttft = metrics.summarize(trace, clock="scheduled")["ttft_ms"]["median"]
            print(f"{name}: median TTFT {ttft:.1f} ms")


def soak(n: int = 10_000, rate: float = 400.0) -> None:
    """Random lengths and a deadline: one answer each, and memory that stays put."""
    dice, seen, sizes = random.Random(0), Counter(), []
    with Server(engines.front(), engine="engines:null") as server:
        watched = [psutil.Process(), *map(psutil.Process, server.pids())]
        for _ in range(10):
            times = load.arrival_times("poisson", n // 10, rate, seed=dice.randrange(1000))
            requests = (
                Request(i, (1, 2, 3), dice.randint(1, 20), arrival_s=float(at))
                for i, at in enumerate(times)
            )
            trace = server.run(Workload(tuple(requests)), rows=16, deadline_s=0.05)
            seen.update(r.status for r in trace.requests)
            sizes.append([p.memory_info().rss for p in watched])
    front_growth, worker_growth = (np.array(sizes[-1]) / np.array(sizes[1]) - 1) * 100
    print(f"{sum(seen.values())} answers to {n} requests: {dict(seen)}")
    print(f"RSS after the second tenth: front {front_growth:+.1f} %, ", end="")
    print(f"inference process {worker_growth:+.1f} %")
    assert sum(seen.values()) == n and front_growth < 5 and worker_growth < 5


if __name__ == "__main__":
    for name in sys.argv[1:] or ["front", "soak"]:
        {"front": front, "saturated": saturated, "joins": joins, "idle": idle, "soak": soak}[name]()

"""Serving: what the front process costs, dynamic against sequential and continuous, and a soak.

python tests/benchmarks/bench_serving.py front      # overhead with a model that costs nothing
python tests/benchmarks/bench_serving.py saturated  # tokens/s, interleaved, bf16
python tests/benchmarks/bench_serving.py idle       # TTFT at low load against sequential
python tests/benchmarks/bench_serving.py soak       # 10,000 requests, cancels, malformed ones
"""

import asyncio
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
from llmperf.decoding import requests as workload  # noqa: E402
from llmperf.decoding.requests import Request  # noqa: E402
from llmperf.decoding.sampling import GREEDY  # noqa: E402
from llmperf.measure import load, metrics, paired  # noqa: E402
from llmperf.strategies import RequestFailed, Server  # noqa: E402


def front(n: int = 2_000, rate: float = 500.0) -> None:
    """Time from sending to the one token that costs nothing, and the front's own CPU time."""

    async def go():
        times = load.arrival_times("even", n, rate)
        async with Server(engines.front(), engine="engines:null", window_s=0) as server:
            origin, cpu = time.perf_counter() + 0.1, time.process_time()

            async def one(at):
                await asyncio.sleep(origin + at - time.perf_counter())
                sent = time.perf_counter()
                token = await anext(server.generate(Request(0, (1, 2, 3), 1)))
                return token.at_s - sent

            took = np.array(await asyncio.gather(*map(one, times))) * 1e3
            cpu = (time.process_time() - cpu) / n * 1e3
        p50, p99 = np.quantile(took, (0.5, 0.99))
        print(f"{n} requests at {rate:g}/s: median {p50:.2f} ms, p99 {p99:.2f} ms", end="; ")
        print(f"front CPU {cpu:.2f} ms a request")

    asyncio.run(go())


def saturated(n: int = 32, rounds: int = 5) -> None:
    """All requests at once: output tokens/s of dynamic over sequential and over continuous."""
    model = models.load("smollm2-135m", dtype="bf16", device="cpu")
    work = workload.build(model.tokenizer, n, 32, 32, sampling=GREEDY)

    def arm(name, **options):
        return lambda: strategies.STRATEGIES[name](model, work, options)

    with strategies.session():
        arms = {"sequential": arm("sequential"), "dynamic": arm("dynamic", max_batch=16)}
        arms["continuous"] = arm("continuous", max_batch=16)
        speeds = paired(arms, rounds)
    for other in ("sequential", "continuous"):
        ratio = stats.ratio_interval(speeds["dynamic"], speeds[other], paired=True)
        print(f"dynamic / {other}: {ratio.value:.2f} [{ratio.low}, {ratio.high}]")


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
    """Random cancels, deadlines and 5 % malformed: one answer each, and memory that stays put."""
    dice = random.Random(0)
    seen: Counter[str] = Counter()

    async def one(server, at, origin):
        await asyncio.sleep(origin + at - time.perf_counter())
        bad = dice.random() < 0.05
        deadline = 0.05 if dice.random() < 0.05 else None
        try:
            request = Request(0, (10**6,) if bad else (1, 2, 3), dice.randint(1, 20))
            stream = server.generate(request, deadline_s=deadline)
        except ValueError:
            seen["refused"] += 1
            return
        if dice.random() < 0.2:
            asyncio.get_running_loop().call_later(dice.random() * 0.02, stream.cancel)
        try:
            async for _ in stream:
                pass
            seen["ok"] += 1
        except RequestFailed as failed:
            seen[failed.status] += 1

    async def go():
        times = load.arrival_times("poisson", n, rate, seed=0)
        async with Server(engines.front(), engine="engines:null", rows=16) as server:
            watched = [psutil.Process(), *map(psutil.Process, server.pids())]
            sizes = []
            for part in np.array_split(times, 10):
                origin = time.perf_counter() + 0.05 - part[0]
                await asyncio.gather(*(one(server, at, origin) for at in part))
                sizes.append([p.memory_info().rss for p in watched])
        front_growth, worker_growth = (np.array(sizes[-1]) / np.array(sizes[1]) - 1) * 100
        print(f"{sum(seen.values())} answers to {n} requests: {dict(seen)}")
        print(f"RSS after the second tenth: front {front_growth:+.1f} %, ", end="")
        print(f"inference process {worker_growth:+.1f} %")
        assert sum(seen.values()) == n and front_growth < 5 and worker_growth < 5

    asyncio.run(go())


if __name__ == "__main__":
    for name in sys.argv[1:] or ["front", "soak"]:
        {"front": front, "saturated": saturated, "idle": idle, "soak": soak}[name]()

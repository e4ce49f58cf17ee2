"""What a newcomer waits for, and what sampling costs: one command, every figure with its spread.

python tests/benchmarks/bench_first_light.py
"""

import statistics
import subprocess
import sys
import time

import torch

from llmperf import models
from llmperf.decoding import decode
from llmperf.decoding import requests as workload
from llmperf.decoding.requests import PUBLISHED
from llmperf.decoding.sampling import next_tokens, uniforms


def show(name: str, seconds: list[float], target: str) -> None:
    middle, low, high = statistics.median(seconds), min(seconds), max(seconds)
    print(f"{name:44} {middle:8.4f} s  ({low:.4f} to {high:.4f}, n={len(seconds)})  {target}")


def timed(call, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def importing(code: str) -> float:
    """Seconds of the import alone, in a fresh interpreter that times itself."""
    probe = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
    return float(subprocess.check_output([sys.executable, "-c", probe], text=True))


def main() -> None:
    show("import llmperf", [importing("import llmperf") for _ in range(5)], "target < 0.5 s")
    everything = "import llmperf.measure, llmperf.study, llmperf.predict"
    show("import of all rooms but torch", [importing(everything) for _ in range(5)], "")
    models.load("smollm2-135m", device="cpu")  # fetches and converts on first use
    load = timed(lambda: models.load("smollm2-135m", dtype="fp32", device="cpu"), 5)
    show("load smollm2-135m from the cache", load, "target < 3 s")

    llm = models.load("smollm2-135m", dtype="fp32", device="cpu")
    request = workload.build(llm.tokenizer, 1, 32, 33).requests[0]
    steps = decode(llm, [request], sampling=PUBLISHED)
    next(steps)
    step = timed(lambda: next(steps), 32)
    logits = torch.randn(1, llm.shape.vocab)
    draw = uniforms([0], 1)[:, 0]
    draws = timed(lambda: next_tokens(logits, PUBLISHED, draw).tolist(), 200)
    show("one decode step, batch 1, fp32", step, "")
    show("sampling with top-k 50, top-p 0.9", draws, "")
    share = statistics.median(draws) / statistics.median(step)
    print(f"sampling is {share:.1%} of a batch-1 step; target < 10 %")


if __name__ == "__main__":
    main()

"""Measure rates of a device. The device is synchronised before the clock is read."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from llmperf.machine.private_memory import allocate_like
from llmperf.machine.probes import PROBES
from llmperf.machine.units import DTYPES

TINY_OPS = 10_000  # enough that a queue of about a thousand launches is long full
REPEATS = 5  # of products and launches
LONG_RUN_S = 0.06  # a product that takes this long is as efficient as it gets


def seconds_of(run: Callable, wait: Callable, repeats: int, budget_s: float = 0.5) -> list[float]:
    """Seconds of up to `repeats` runs after a warm-up; past three, only while the budget lasts."""
    run()
    wait()
    samples, end = [], time.perf_counter() + budget_s
    while len(samples) < repeats and (len(samples) < 3 or time.perf_counter() < end):
        start = time.perf_counter()
        run()
        wait()
        samples.append(time.perf_counter() - start)
    return samples


def with_median(samples: Sequence[float]) -> dict:
    """The raw `samples` and their `median`, in the unit of the samples."""
    return {"median": statistics.median(samples), "samples": list(samples)}


def waiter(device: str) -> Callable[[], None]:
    """What waits until the device has finished."""
    if device.startswith("cuda"):
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def past_caches_bytes(device: str) -> int:
    """Bytes that no cache holds, but no more than a share of what is free."""
    cuda = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if cuda else PROBES["ram_available_bytes"]()
    return min(1 << 30, free // 8)


def read_bandwidth(device: str = "cpu", repeats: int = 9, share: float = 1.0) -> dict:
    """Bytes per second read past the caches: the fastest of three reductions, by median. `share`
    of `past_caches_bytes` is read."""
    floats = int(share * past_caches_bytes(device)) // 4
    (buffer,) = allocate_like([torch.empty(floats, device="meta")], device)
    buffer.fill_(0.01)
    reductions = (
        buffer.sum,
        lambda: torch.dot(buffer, buffer),
        lambda: torch.linalg.vector_norm(buffer),
    )
    seconds = (seconds_of(run, waiter(device), repeats) for run in reductions)
    rates = (with_median([buffer.nbytes / s for s in samples]) for samples in seconds)
    return max(rates, key=lambda rate: rate["median"])


def matmul_flops(dtype: str, device: str = "cpu") -> dict:
    """FLOP/s of square matrix products in `dtype`; the size with the highest median counts.

    Sizes double until one product takes 60 ms, so an emulated type costs little time.
    """
    size, largest = (1024, 8192) if device.startswith("cuda") else (256, 4096)
    best: dict = {"median": 0.0}
    while size <= largest:
        a = torch.randn(size, size, device=device).to(getattr(torch, DTYPES[dtype]))
        seconds = seconds_of(lambda a=a: a @ a, waiter(device), REPEATS)
        rate = with_median([2 * size**3 / s for s in seconds])
        best = max(best, rate, key=lambda found: found["median"])
        if min(seconds) > LONG_RUN_S:
            break
        size *= 2
    return best


def launch_latency(device: str = "cpu") -> dict:
    """Seconds per tiny operation: until it is `enqueue`d, and until it is `drained`."""
    x, wait = torch.zeros(1, device=device), waiter(device)
    enqueue, drained = [], []
    for repeat in range(REPEATS + 1):
        wait()
        start = time.perf_counter()
        for _ in range(TINY_OPS):
            x.add_(1)
        middle = time.perf_counter()
        wait()
        end = time.perf_counter()
        if repeat:  # the first one warms up
            enqueue.append((middle - start) / TINY_OPS)
            drained.append((end - start) / TINY_OPS)
    return {"enqueue": with_median(enqueue), "drained": with_median(drained)}


def matmul_seconds(
    shapes: Sequence[tuple[int, int]], dtype: str, rows: int, product: Callable
) -> dict[tuple[int, int], float]:
    """Median seconds of products on the CPU, the weights (out, in) coming from memory.

    `product(weight)` gives the callable that is timed. Each weight is repeated until no cache holds
    all copies.
    """
    target, found = past_caches_bytes("cpu") // 4, {}
    for n, k in dict.fromkeys(shapes):
        weight = torch.randn(n, k).to(getattr(torch, DTYPES[dtype]))
        copies = max(1, -(-target // weight.nbytes))
        layers = [product(m.copy_(weight)) for m in allocate_like([weight] * copies)]
        x = torch.randn(rows, k).to(weight.dtype)
        with torch.inference_mode():
            run = lambda layers=layers, x=x: deque((f(x) for f in layers), maxlen=0)  # noqa: E731
            found[n, k] = statistics.median(seconds_of(run, waiter("cpu"), 3)) / copies
    return found

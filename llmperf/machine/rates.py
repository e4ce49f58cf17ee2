"""Measure rates of a device: bytes read, FLOPs, launches, and the matrix products of a model.

A sample is taken from start to finished: the device is synchronised before the clock is read.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from llmperf.machine.private_memory import allocate_like
from llmperf.machine.probes import PROBES
from llmperf.machine.run_tool import ask
from llmperf.machine.timing import check_device, seconds_of, spread
from llmperf.machine.units import DTYPES

TINY_OPS = 10_000  # enough that a queue of about a thousand launches is long full
LONG_RUN_S = 0.06  # a product that takes this long is as efficient as it gets
PAST_CACHES = 8  # a buffer of so many times the last-level cache is read from memory


def waiter(device: str) -> Callable[[], None]:
    """What waits until the device has finished; on the CPU there is nothing to wait for."""
    if device.startswith("cuda"):
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def check_present(device: str) -> None:
    """Raise ValueError when the device is unknown or torch sees no such card."""
    check_device(device)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch sees no CUDA GPU: use 'cpu'")


def past_caches_bytes(device: str) -> int:
    """Bytes that no cache holds: 256 MiB or more, but no more than a share of what is free."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return min(1 << 30, free // 4)
    cache, _ = ask(PROBES["last_level_cache_bytes"], 20.0)
    free = PROBES["ram_available_bytes"]()
    return min(max(256 << 20, PAST_CACHES * (cache or 0)), free // 8)


def read_bandwidth(device: str = "cpu", repeats: int = 9) -> dict:
    """Bytes per second read past the caches, with all of torch's threads.

    Three reductions over one buffer compete, since which of them keeps up with the memory depends
    on the processor; the fastest by median is the ceiling, and `method` names it.
    """
    (buffer,) = allocate_like([torch.empty(past_caches_bytes(device) // 4, device="meta")], device)
    buffer.fill_(0.01)
    size = buffer.nbytes
    reductions = {
        "sum": buffer.sum,
        "dot": lambda: torch.dot(buffer, buffer),
        "norm": lambda: torch.linalg.vector_norm(buffer),
    }
    rates = {
        name: spread([size / s for s in seconds_of(run, waiter(device), repeats)])
        for name, run in reductions.items()
    }
    best = max(rates, key=lambda name: rates[name]["median"])
    return {**rates[best], "unit": "bytes/s", "method": best, "buffer_bytes": size}


def matmul_flops(dtype: str, device: str = "cpu", repeats: int = 5) -> dict:
    """FLOP/s of square matrix products in `dtype`; the size with the highest median counts.

    A product of n x n matrices is 2 n^3 FLOPs. Sizes double until one product takes 60 ms, so a
    type that the processor only emulates costs little time.
    """
    size, largest = (1024, 8192) if device.startswith("cuda") else (256, 4096)
    best: dict = {"median": 0.0}
    while size <= largest:
        a = torch.randn(size, size, device=device).to(getattr(torch, DTYPES[dtype]))
        seconds = seconds_of(lambda a=a: a @ a, waiter(device), repeats)
        rate = spread([2 * size**3 / s for s in seconds])
        if rate["median"] > best["median"]:
            best = {**rate, "unit": "FLOP/s", "size": size}
        if min(seconds) > LONG_RUN_S:
            break
        size *= 2
    return best


def launch_latency(device: str = "cpu", repeats: int = 5) -> dict:
    """Seconds per tiny operation: until it is `enqueue`d, and until it is `drained`.

    On a GPU the first is what Python and the driver cost, the second what a step of many small
    kernels costs; where both are equal the processor is what the GPU waits for. On the CPU an
    operation is done when the call returns, so both are the cost of dispatch.
    """
    x, wait = torch.zeros(1, device=device), waiter(device)
    enqueue, drained = [], []
    for repeat in range(repeats + 1):
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
    return {"enqueue": spread(enqueue), "drained": spread(drained), "unit": "s", "ops": TINY_OPS}


def linear(weight: torch.Tensor) -> Callable:
    """The plain product of a layer: `x @ weight.T`; weight (n, k), x (batch, k)."""
    return lambda x: torch.nn.functional.linear(x, weight)


def matmul_rates(
    shapes: Sequence[tuple[int, int]],
    dtype: str = "fp32",
    device: str = "cpu",
    batches: Sequence[int] = (1,),
    product: Callable = linear,
    repeats: int = 5,
) -> list[dict]:
    """How long the matrix products of a model really take, its weights coming from memory.

    `shapes` are weights (n, k) = (out_features, in_features), `batches` rows of the input, and
    `product(weight)` gives the callable that is timed (a packed or compiled one, say). Each weight
    is repeated until no cache holds all copies, as in a model where other layers come between, and
    lies where a model's weights do (`private_memory`). On a GPU the copies run as one CUDA graph,
    so launches are left out where that works.

    Returns one dict per (shape, batch): `n, k, batch, dtype, seconds, flops_per_s, bytes_per_s`
    (weight bytes; each with median and MAD) and `graph`.
    """
    check_present(device)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known: use one of {', '.join(DTYPES)}")
    target = past_caches_bytes(device) // 2
    rows = []
    with torch.inference_mode():
        for n, k in dict.fromkeys(shapes):
            weight = torch.randn(n, k, device=device).to(getattr(torch, DTYPES[dtype]))
            copies = max(1, -(-target // weight.nbytes))
            layers = [product(m.copy_(weight)) for m in allocate_like([weight] * copies, device)]
            for batch in batches:
                x = torch.randn(batch, k, device=device).to(weight.dtype)
                once = lambda layers=layers, x=x: deque((f(x) for f in layers), maxlen=0)  # noqa: E731
                run, graph = _graphed(once, device)
                seconds = [s / copies for s in seconds_of(run, waiter(device), repeats)]
                rows.append(
                    {
                        "n": n,
                        "k": k,
                        "batch": batch,
                        "dtype": dtype,
                        "graph": graph,
                        "seconds": spread(seconds),
                        "flops_per_s": spread([2 * n * k * batch / s for s in seconds]),
                        "bytes_per_s": spread([weight.nbytes / s for s in seconds]),
                    }
                )
    return rows


def _graphed(run: Callable, device: str) -> tuple[Callable, bool]:
    """`run` captured as a CUDA graph, or itself where that cannot be (CPU, no capture)."""
    if not device.startswith("cuda"):
        return run, False
    try:
        run()  # workspaces and kernels are loaded before the capture
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph):
            run()
    except RuntimeError:
        return run, False
    return graph.replay, True

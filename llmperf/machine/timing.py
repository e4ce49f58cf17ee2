"""Time a piece of work on a device, and the matrix products of a model in particular.

A sample is taken from start to finished: the device is synchronised before the clock is read.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence

from llmperf.machine import pages
from llmperf.machine.probes import PROBES
from llmperf.machine.run_tool import ask

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
PAST_CACHES = 8  # a buffer of so many times the last-level cache is read from memory


def spread(samples: Sequence[float]) -> dict:
    """`median`, `mad` and the raw `samples`, all in the unit of the samples."""
    middle = statistics.median(samples)
    mad = statistics.median(abs(x - middle) for x in samples)
    return {"median": middle, "mad": mad, "samples": list(samples)}


def seconds_of(run: Callable, wait: Callable, repeats: int, budget_s: float = 0.5) -> list[float]:
    """Seconds of each run after one that does not count; at least three, then until the budget."""
    run()
    wait()
    samples, end = [], time.perf_counter() + budget_s
    while len(samples) < repeats and (len(samples) < 3 or time.perf_counter() < end):
        start = time.perf_counter()
        run()
        wait()
        samples.append(time.perf_counter() - start)
    return samples


def waiter(device: str) -> Callable[[], None]:
    """What waits until the device has finished; on the CPU there is nothing to wait for."""
    import torch

    if device.startswith("cuda"):
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def past_caches_bytes(device: str) -> int:
    """Bytes that no cache holds: 256 MiB or more, but no more than a share of what is free."""
    import torch

    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return min(1 << 30, free // 4)
    cache, _ = ask(PROBES["last_level_cache_bytes"], 20.0)
    free = PROBES["ram_available_bytes"]()
    return min(max(256 << 20, PAST_CACHES * (cache or 0)), free // 8)


def check_device(device: str) -> None:
    """Raise ValueError when this is no device that is known, without importing torch."""
    if device != "cpu" and not device.startswith("cuda"):
        raise ValueError(f"device {device!r} is not known: use 'cpu', 'cuda' or 'cuda:N'")


def check_present(device: str) -> None:
    """Raise ValueError when the device is unknown or torch sees no such card."""
    import torch

    check_device(device)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch sees no CUDA GPU: use 'cpu'")


def linear(weight) -> Callable:
    """The plain product of a layer: `x @ weight.T`; weight (n, k), x (batch, k)."""
    import torch

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
    lies where a model's weights do (`pages`).
    On a GPU the copies run as one CUDA graph, so launches are left out where that works.

    Returns one dict per (shape, batch): `n, k, batch, dtype, seconds, flops_per_s, bytes_per_s`
    (weight bytes; each with median and MAD) and `graph`.
    """
    import torch

    check_present(device)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known: use one of {', '.join(DTYPES)}")
    target = past_caches_bytes(device) // 2
    rows = []
    with torch.inference_mode():
        for n, k in dict.fromkeys(shapes):
            weight = torch.randn(n, k, device=device).to(getattr(torch, DTYPES[dtype]))
            copies = max(1, -(-target // weight.nbytes))
            layers = [
                product(room.copy_(weight)) for room in pages.rooms([weight] * copies, device)
            ]
            for batch in batches:
                x = torch.randn(batch, k, device=device).to(weight.dtype)
                seconds, graph = _sweep(layers, x, device, repeats)
                row = {"n": n, "k": k, "batch": batch, "dtype": dtype, "graph": graph}
                rows.append(row | _rates(seconds, 2 * n * k * batch, weight.nbytes))
    return rows


def _sweep(layers: list[Callable], x, device: str, repeats: int) -> tuple[list[float], bool]:
    """Seconds per layer, and whether they ran as a CUDA graph. x: (batch, k)."""
    run, graph = _graphed(lambda: deque((layer(x) for layer in layers), maxlen=0), device)
    return [s / len(layers) for s in seconds_of(run, waiter(device), repeats)], graph


def _rates(seconds: list[float], flops: int, weight_bytes: int) -> dict:
    return {
        "seconds": spread(seconds),
        "flops_per_s": spread([flops / s for s in seconds]),
        "bytes_per_s": spread([weight_bytes / s for s in seconds]),
    }


def _graphed(run: Callable, device: str) -> tuple[Callable, bool]:
    """`run` captured as a CUDA graph, or itself where that cannot be (CPU, no capture)."""
    import torch

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

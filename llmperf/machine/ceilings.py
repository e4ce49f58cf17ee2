"""What this machine can do at best, measured: bytes read, FLOPs and launches per second.

Every rate is a median with its median absolute deviation (MAD) over repeats, beside the figure of
the data sheet where one is known. A roofline drawn from these is this machine's own.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import time
from pathlib import Path

from llmperf import machine
from llmperf.machine import pages
from llmperf.machine.card_specs import data_sheet
from llmperf.machine.overhead import overhead
from llmperf.machine.probes import PROBES
from llmperf.machine.run_tool import ask
from llmperf.machine.timing import (
    DTYPES,
    check_device,
    check_present,
    matmul_rates,
    past_caches_bytes,
    seconds_of,
    spread,
    waiter,
)

__all__ = ["cached", "data_sheet", "matmul_rates", "measure", "overhead", "spread"]

SCHEMA = 2  # 2: read from huge pages, as the weights are
TINY_OPS = 10_000  # enough that a queue of about a thousand launches is long full
LONG_RUN_S = 0.06  # a product that takes this long is as efficient as it gets
KEY_PROBES = (
    "os", "cpu_model", "cores_logical", "cores_allowed", "cores_quota", "power_plan", "on_battery",
)  # fmt: skip


def read_bandwidth(device: str = "cpu", repeats: int = 9) -> dict:
    """Bytes per second read past the caches, with all of torch's threads.

    Three reductions over one buffer compete, since which of them keeps up with the memory depends
    on the processor; the fastest by median is the ceiling, and `method` names it.
    """
    import torch

    (buffer,) = pages.rooms([torch.empty(past_caches_bytes(device) // 4, device="meta")], device)
    buffer.fill_(0.01)
    size = buffer.nbytes
    tries = {
        "sum": buffer.sum,
        "dot": lambda: torch.dot(buffer, buffer),
        "norm": lambda: torch.linalg.vector_norm(buffer),
    }
    rates = {
        name: spread([size / s for s in seconds_of(run, waiter(device), repeats)])
        for name, run in tries.items()
    }
    best = max(rates, key=lambda name: rates[name]["median"])
    return {**rates[best], "unit": "bytes/s", "method": best, "buffer_bytes": size}


def matmul_flops(dtype: str, device: str = "cpu", repeats: int = 5) -> dict:
    """FLOP/s of square matrix products in `dtype`; the size with the highest median counts.

    A product of n x n matrices is 2 n^3 FLOPs. Sizes double until one product takes 60 ms, so a
    type that the processor only emulates costs little time.
    """
    import torch

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
    import torch

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


def measure(device: str = "cpu") -> dict:
    """Measured ceilings of `device`, about five seconds on two cores.

    Returns `read_bytes_per_s`, `flops_per_s` (by dtype), `launch_s`, `data_sheet`, `warning` when
    the machine was busy, `took_s`, and `reasons` for what is None. Raises ValueError for a CUDA
    device where there is none.
    """
    import torch

    check_present(device)
    start, reasons = time.perf_counter(), {}
    warning = machine.busy()
    flops: dict = {}
    for dtype in DTYPES:
        try:
            flops[dtype] = matmul_flops(dtype, device)
        except RuntimeError as error:  # no kernel for this type here, or no memory
            flops[dtype] = None
            reasons[f"flops_per_s.{dtype}"] = str(error).partition("\n")[0]
    sheet, why = data_sheet(device)
    if why:
        reasons["data_sheet"] = why
    return {
        "schema": SCHEMA,
        "device": device,
        "device_name": _device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "read_bytes_per_s": read_bandwidth(device),
        "flops_per_s": flops,
        "launch_s": launch_latency(device),
        "data_sheet": sheet,
        "warning": warning,
        "reasons": reasons,
        "took_s": time.perf_counter() - start,
    }


def _device_name(device: str) -> str | None:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return ask(PROBES["cpu_model"])[0]


def _key(device: str) -> dict:
    """What a measurement holds for: another machine, driver, power limit or torch is another."""
    check_device(device)
    key = {name: ask(PROBES[name])[0] for name in KEY_PROBES}
    key |= {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    key |= {"schema": SCHEMA, "device": device, "torch": importlib.metadata.version("torch")}
    if device.startswith("cuda"):
        cards, _ = ask(PROBES["gpus"], 20.0)
        names = ("name", "driver", "power_limit_w", "memory_total_bytes")
        key["cards"] = [[card[name] for name in names] for card in cards or []]
    return key


def cached(device: str = "cpu", refresh: bool = False) -> dict:
    """`measure(device)`, kept in the user's cache for this machine and torch version.

    Measured again with `refresh`, when the file cannot be read, and when it was measured on a busy
    machine that is idle now.
    """
    key = _key(device)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    file = machine.cache_dir() / "ceilings" / f"{device.replace(':', '-')}-{digest}.json"
    kept = None if refresh else _load(file)
    if kept and not (kept["warning"] and machine.busy() is None):
        return kept
    result = measure(device)
    with contextlib.suppress(OSError):  # a read-only cache costs time, not the answer
        _save(file, result)
    return result


def _load(file: Path) -> dict | None:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept if isinstance(kept, dict) and kept.get("schema") == SCHEMA else None


def _save(file: Path, result: dict) -> None:
    """Whole or not at all: two processes may measure at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(result), encoding="utf-8")
    part.replace(file)

"""What this machine can do at best, measured: bytes read, FLOPs and launches per second.

Every rate is a median with its median absolute deviation (MAD) over repeats, next to the figure of
the data sheet where one is known.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import time
from pathlib import Path

import torch

from llmperf.machine import description, rates
from llmperf.machine.card_specs import data_sheet
from llmperf.machine.overhead import overhead
from llmperf.machine.probes import PROBES
from llmperf.machine.rates import matmul_rates
from llmperf.machine.run_tool import ask
from llmperf.machine.timing import check_device, spread
from llmperf.machine.units import DTYPES

__all__ = ["cached", "data_sheet", "matmul_rates", "measure", "overhead", "spread"]

SCHEMA = 2  # 2: read from huge pages, as the weights are
KEY_PROBES = (
    "os", "cpu_model", "cores_logical", "cores_allowed", "cores_quota", "power_plan", "on_battery",
)  # fmt: skip


def measure(device: str = "cpu") -> dict:
    """Measured ceilings of `device`, about five seconds on two cores.

    Returns `read_bytes_per_s`, `flops_per_s` (by dtype), `launch_s`, `data_sheet`, `warning` when
    the machine was busy, `took_s`, and `reasons` for what is None. Raises ValueError for a CUDA
    device where there is none.
    """
    rates.check_present(device)
    start, reasons = time.perf_counter(), {}
    warning = description.busy()
    flops: dict = {}
    for dtype in DTYPES:
        try:
            flops[dtype] = rates.matmul_flops(dtype, device)
        except RuntimeError as error:  # no kernel for this type here, or no memory
            flops[dtype] = None
            reasons[f"flops_per_s.{dtype}"] = str(error).partition("\n")[0]
    sheet, why = data_sheet(device)
    if why:
        reasons["data_sheet"] = why
    cuda = device.startswith("cuda")
    return {
        "schema": SCHEMA,
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if cuda else ask(PROBES["cpu_model"])[0],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "read_bytes_per_s": rates.read_bandwidth(device),
        "flops_per_s": flops,
        "launch_s": rates.launch_latency(device),
        "data_sheet": sheet,
        "warning": warning,
        "reasons": reasons,
        "took_s": time.perf_counter() - start,
    }


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
    digest = hashlib.sha256(json.dumps(_key(device), sort_keys=True).encode()).hexdigest()[:12]
    folder = description.cache_dir() / "ceilings"
    file = folder / f"{device.replace(':', '-')}-{digest}.json"
    kept = None if refresh else _load(file)
    if kept and not (kept["warning"] and description.busy() is None):
        return kept
    result = measure(device)
    with contextlib.suppress(OSError):  # a read-only cache costs time, not the answer
        description.save_whole(file, json.dumps(result))
    return result


def _load(file: Path) -> dict | None:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept if isinstance(kept, dict) and kept.get("schema") == SCHEMA else None

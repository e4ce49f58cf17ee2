"""The ceilings of this machine, measured: bytes read, FLOPs and launches per second."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable

from llmperf.machine import description, rates
from llmperf.machine.probes import PROBES, ask
from llmperf.machine.units import DTYPES

SCHEMA = 2  # 2: read from huge pages, as the weights are
KEY_PROBES = (
    "os", "cpu_model", "cores_logical", "cores_allowed", "cores_quota", "power_plan", "on_battery",
)  # fmt: skip


def measure(device: str = "cpu") -> dict:
    """Measured ceilings of `device`, about five seconds on two cores; `warning`: it was busy.

    Each rate is a median with its MAD and samples; FLOP/s is None where a dtype has no kernel.
    """
    warning, flops = description.busy(), {}
    for dtype in DTYPES:
        try:
            flops[dtype] = rates.matmul_flops(dtype, device)
        except RuntimeError:  # no kernel for this type here, or no memory
            flops[dtype] = None
    return {
        "read_bytes_per_s": rates.read_bandwidth(device),
        "flops_per_s": flops,
        "launch_s": rates.launch_latency(device),
        "warning": warning,
    }


def _key(device: str) -> dict:
    key = {name: ask(PROBES[name])[0] for name in KEY_PROBES}
    key |= {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    key |= {"schema": SCHEMA, "device": device}
    key |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    if device.startswith("cuda"):
        cards, _ = ask(PROBES["gpus"])
        names = ("name", "driver", "power_limit_w", "memory_total_bytes")
        key["cards"] = [[card[name] for name in names] for card in cards or []]
    return key


def cached(device: str = "cpu") -> dict:
    """`measure(device)`, kept in the user's cache for this machine, driver and torch version.

    What was measured on a busy machine is measured again when it is idle.
    """
    return kept("ceilings", device, measure)


def now(device: str = "cpu") -> dict:
    """`cached(device)`, with the bandwidth of this minute where that is higher: other programs and
    neighbours of a virtual machine change it."""
    found, fresh = cached(device), rates.read_bandwidth(device, repeats=3)
    higher = max(found["read_bytes_per_s"], fresh, key=lambda rate: rate["median"])
    return {**found, "read_bytes_per_s": higher}


def kept(kind: str, device: str, measured: Callable[[str], dict]) -> dict:
    """`measured(device)` from the user's cache, where it is of this machine and these versions."""
    digest = hashlib.sha256(json.dumps(_key(device), sort_keys=True).encode()).hexdigest()[:12]
    file = description.cache_dir() / kind / f"{device.replace(':', '-')}-{digest}.json"
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        if not found.get("warning") or description.busy():
            return found
    result = measured(device)
    with contextlib.suppress(OSError):  # a read-only cache costs time, not the answer
        description.save_whole(file, json.dumps(result))
    return result

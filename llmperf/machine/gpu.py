"""NVIDIA cards as NVML shows them, field by field. Only queries: no setting is changed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pynvml
from pynvml import NVMLError

from llmperf.machine.units import Unknown

DRIVER_MODELS = {0: "WDDM", 1: "TCC", 2: "MCDM"}  # nvmlDriverModel_t


@contextmanager
def nvml() -> Iterator[None]:
    """Within it NVML answers. Raises `Unknown` without a driver, and for an answer it refuses."""
    try:
        pynvml.nvmlInit()
    except NVMLError as error:
        raise Unknown(f"no NVIDIA driver: {error}") from None
    try:
        yield
    except NVMLError as error:
        raise Unknown(f"NVML: {error}") from None
    finally:
        with suppress(NVMLError):
            pynvml.nvmlShutdown()


def memory(handle):
    """Bytes `total`, `used`, `free`, `reserved`; `total - free` means the same in all versions."""
    return pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)


def _compute_processes(handle) -> list[dict]:
    """`pid` (in a container: the host's) and `used_bytes` (None under WDDM)."""
    listed = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    return [{"pid": p.pid, "used_bytes": p.usedGpuMemory} for p in listed]


# name → query(handle); a query that fails leaves None and its reason
FIELDS = {
    "name": lambda h: pynvml.nvmlDeviceGetName(h),
    "driver": lambda h: pynvml.nvmlSystemGetDriverVersion(),
    "driver_model": lambda h: DRIVER_MODELS.get(pynvml.nvmlDeviceGetCurrentDriverModel(h)),
    "compute_capability": lambda h: "{}.{}".format(*pynvml.nvmlDeviceGetCudaComputeCapability(h)),
    "memory_total_bytes": lambda h: memory(h).total,
    "memory_used_bytes": lambda h: memory(h).used,
    "memory_free_bytes": lambda h: memory(h).free,
    "power_limit_w": lambda h: pynvml.nvmlDeviceGetEnforcedPowerLimit(h) / 1000,
    "pcie_gen_max": lambda h: pynvml.nvmlDeviceGetMaxPcieLinkGeneration(h),
    "pcie_width_max": lambda h: pynvml.nvmlDeviceGetMaxPcieLinkWidth(h),
    "utilization_percent": lambda h: pynvml.nvmlDeviceGetUtilizationRates(h).gpu,
    "processes": _compute_processes,
}


def card(handle) -> dict:
    """One card as flat values, with `reasons` for those that are None."""
    values, reasons = {}, {}
    for name, query in FIELDS.items():
        try:
            values[name] = query(handle)
        except NVMLError as error:
            values[name], reasons[name] = None, f"NVML: {error}"
    return {**values, "reasons": reasons}


def cards() -> list[dict]:
    """All cards. Raises `Unknown` without a driver."""
    with nvml():
        count = pynvml.nvmlDeviceGetCount()
        return [card(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)]


def nvml_handle(device: str):
    """The NVML handle of a torch device such as `cuda:0`, respecting CUDA_VISIBLE_DEVICES.

    CUDA may count different cards in another order than NVML: then name them by UUID there.
    """
    chosen = device.partition(":")[2] or "0"
    visible = [v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
    if visible and int(chosen) >= len(visible):
        raise ValueError(f"{device} is not among CUDA_VISIBLE_DEVICES ({len(visible)} named)")
    chosen = visible[int(chosen)] if visible else chosen
    if chosen.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(chosen))
    return pynvml.nvmlDeviceGetHandleByUUID(chosen)

"""NVIDIA cards as NVML shows them, field by field. Only queries: no setting is changed."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pynvml
from pynvml import NVMLError

from llmperf.machine.units import Unknown

DRIVER_MODELS = {0: "WDDM", 1: "TCC", 2: "MCDM"}  # nvmlDriverModel_t


def torch_in_use():
    """torch where this process has used a card with it, else None; never imports it."""
    torch = sys.modules.get("torch")
    return torch if torch and torch.cuda.is_initialized() else None


def no_cuda() -> str:
    """Why torch cannot use a card here, and what to do."""
    import torch

    if torch.version.cuda:
        return (
            f"this torch ({torch.__version__}) sees no CUDA GPU: where there is one, install a"
            f" driver for CUDA {torch.version.cuda}, or a torch that was built for an older CUDA"
        )
    return (
        f"this torch ({torch.__version__}) is no CUDA build: the README says under With a GPU how"
        " to install one"
    )


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
    """Bytes `total`, `used`, `free`, and what the driver has `reserved`, which is not in `used`."""
    return pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)


def used_bytes(device: str) -> int:
    """What all programs together use of a card. Raises `Unknown`."""
    with nvml():
        return memory(nvml_handle(device)).used


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
    """The cards that CUDA may use, in its order. Raises `Unknown` where there is none."""
    with nvml():
        if found := [card(handle) for handle in _handles()]:
            return found
    raise Unknown("no NVIDIA card, or CUDA_VISIBLE_DEVICES hides it")


def index(device: str) -> int:
    """The number of a card of torch: `cuda` and `cuda:0` are 0."""
    return int(device.partition(":")[2] or 0)


def nvml_handle(device: str):
    """The NVML handle of a torch device such as `cuda:0`."""
    found = _handles()
    if index(device) >= len(found):
        raise ValueError(f"{device} is not among the {len(found)} cards that CUDA may use")
    return found[index(device)]


def _handles() -> list:
    """Those that CUDA_VISIBLE_DEVICES names, by index or UUID; without it all.

    CUDA and NVML count alike, see `llmperf.__init__`.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        chosen = [str(i) for i in range(pynvml.nvmlDeviceGetCount())]
    else:
        chosen = [word.strip() for word in visible.split(",") if word.strip()]
    by_index, by_uuid = pynvml.nvmlDeviceGetHandleByIndex, pynvml.nvmlDeviceGetHandleByUUID
    return [by_index(int(word)) if word.isdigit() else by_uuid(word) for word in chosen]

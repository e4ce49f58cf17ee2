"""NVIDIA cards as NVML and nvidia-smi show them. Only queries: no setting of a card is changed.

Field by field, each with its own reason when there is no answer: under WDDM, WSL2, vGPU and in
containers some queries work and others do not, and which ones depends on the driver.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from llmperf.machine import probe_text
from llmperf.machine.run_tool import Unknown, run_tool

DRIVER_MODELS = {0: "WDDM", 1: "TCC", 2: "MCDM"}  # nvmlDriverModel_t


@contextmanager
def nvml() -> Iterator:
    """The `pynvml` module, initialised; shut down on leaving. Raises `Unknown` without a driver."""
    try:
        import pynvml
    except ImportError:
        raise Unknown("the package nvidia-ml-py is not installed") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise Unknown(f"no NVIDIA driver: {error}") from None
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def memory(pynvml, handle) -> dict:
    """Bytes `total`, `used`, `free`, `reserved` of a card.

    Version 2 of the query keeps what the driver reserves apart; version 1 counts it as used, and
    `reserved` is then None. For differences use `total - free`, which means the same in both.
    """
    try:
        info = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        reserved = info.reserved
    except (pynvml.NVMLError, AttributeError, TypeError):
        info, reserved = pynvml.nvmlDeviceGetMemoryInfo(handle), None
    return {"total": info.total, "used": info.used, "free": info.free, "reserved": reserved}


def _text(value) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


# name → query(pynvml, handle); a query that fails leaves None and its reason
FIELDS = {
    "name": lambda n, h: _text(n.nvmlDeviceGetName(h)),
    "driver": lambda n, h: _text(n.nvmlSystemGetDriverVersion()),
    "cuda": lambda n, h: "{}.{}".format(*divmod(n.nvmlSystemGetCudaDriverVersion_v2() // 10, 100)),
    "driver_model": lambda n, h: DRIVER_MODELS.get(n.nvmlDeviceGetCurrentDriverModel(h)),
    "compute_capability": lambda n, h: "{}.{}".format(*n.nvmlDeviceGetCudaComputeCapability(h)),
    "memory_total_bytes": lambda n, h: memory(n, h)["total"],
    "memory_used_bytes": lambda n, h: memory(n, h)["used"],
    "memory_free_bytes": lambda n, h: memory(n, h)["free"],
    "memory_reserved_bytes": lambda n, h: memory(n, h)["reserved"],
    "memory_bus_bits": lambda n, h: n.nvmlDeviceGetMemoryBusWidth(h),
    "power_limit_w": lambda n, h: n.nvmlDeviceGetEnforcedPowerLimit(h) / 1000,
    "power_limit_default_w": lambda n, h: n.nvmlDeviceGetPowerManagementDefaultLimit(h) / 1000,
    "clock_sm_mhz": lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM),
    "clock_sm_max_mhz": lambda n, h: n.nvmlDeviceGetMaxClockInfo(h, n.NVML_CLOCK_SM),
    "clock_memory_mhz": lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_MEM),
    "clock_memory_max_mhz": lambda n, h: n.nvmlDeviceGetMaxClockInfo(h, n.NVML_CLOCK_MEM),
    "pcie_gen": lambda n, h: n.nvmlDeviceGetCurrPcieLinkGeneration(h),
    "pcie_gen_max": lambda n, h: n.nvmlDeviceGetMaxPcieLinkGeneration(h),
    "pcie_width": lambda n, h: n.nvmlDeviceGetCurrPcieLinkWidth(h),
    "pcie_width_max": lambda n, h: n.nvmlDeviceGetMaxPcieLinkWidth(h),
    "temperature_c": lambda n, h: n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU),
    "utilization_percent": lambda n, h: n.nvmlDeviceGetUtilizationRates(h).gpu,
    "display_active": lambda n, h: bool(n.nvmlDeviceGetDisplayActive(h)),
    "processes": lambda n, h: processes(n, h),
}


def card(pynvml, handle, index: int = 0) -> dict:
    """One card as flat values, with `reasons` for those that are None."""
    values, reasons = {"index": index}, {}
    for name, query in FIELDS.items():
        try:
            values[name] = query(pynvml, handle)
        except (pynvml.NVMLError, AttributeError) as error:
            values[name] = None
            reasons[name] = f"NVML: {error}"
    if values["memory_reserved_bytes"] is None:
        reasons.setdefault("memory_reserved_bytes", "this driver has only version 1 of the query")
    if values["driver_model"] is None:
        reasons["driver_model"] = (
            "NVML reports a driver model only to Windows programs"
            if sys.platform != "win32"
            else reasons.get("driver_model", "a driver model that NVML has no name for")
        )
    return {**values, "reasons": reasons}


def processes(pynvml, handle) -> list[dict]:
    """Who uses the card: `name` (no folder), `type` (C compute, G graphics), `used_bytes`, `pid`.

    Under WDDM the memory of a process is not available (None); in a container the process ids are
    those of the host, so they cannot be matched with `os.getpid()`.
    """
    found: dict[int, dict] = {}
    for kind, list_of in (
        ("C", pynvml.nvmlDeviceGetComputeRunningProcesses),
        ("G", pynvml.nvmlDeviceGetGraphicsRunningProcesses),
    ):
        try:
            rows = list_of(handle)
        except pynvml.NVMLError:
            if kind == "C":
                raise
            continue
        for row in rows:
            entry = found.setdefault(row.pid, {"pid": row.pid, "type": ""})
            entry["type"] = kind if not entry["type"] else "C+G"
            entry |= {"used_bytes": row.usedGpuMemory, "name": None}
            with suppress(pynvml.NVMLError):
                name = _text(pynvml.nvmlSystemGetProcessName(row.pid))
                entry["name"] = probe_text.program_name(name)
    return list(found.values())


def cards() -> list[dict]:
    """All cards through NVML, or through nvidia-smi where NVML's binding is not installed.

    Raises `Unknown` when neither answers.
    """
    try:
        with nvml() as pynvml:
            count = pynvml.nvmlDeviceGetCount()
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
            return [card(pynvml, handle, i) for i, handle in enumerate(handles)]
    except Unknown as no_nvml:
        try:
            return queried("nvidia-smi")
        except Unknown as no_tool:
            raise Unknown(f"{no_nvml}; {no_tool}") from None


# field of a card → (what nvidia-smi calls it, what turns its text into the field)
QUERY = {
    "index": ("index", int),
    "name": ("name", str),
    "driver": ("driver_version", str),
    "driver_model": ("driver_model.current", str),
    "memory_total_bytes": ("memory.total", lambda mib: int(mib) << 20),
    "memory_used_bytes": ("memory.used", lambda mib: int(mib) << 20),
    "memory_free_bytes": ("memory.free", lambda mib: int(mib) << 20),
    "power_limit_w": ("enforced.power.limit", float),
    "utilization_percent": ("utilization.gpu", int),
}


def queried(program: str) -> list[dict]:
    """The cards that nvidia-smi lists, in the form that `card` gives. Raises `Unknown`."""
    names = ",".join(name for name, _ in QUERY.values())
    text = run_tool(program, f"--query-gpu={names}", "--format=csv,noheader,nounits")
    rows = [line.split(", ") for line in text.splitlines() if line.count(",") == len(QUERY) - 1]
    if not rows:
        raise Unknown(f"{program} names no card")
    found = []
    for row in rows:
        values = dict.fromkeys(FIELDS)
        for (field, (_, parse)), word in zip(QUERY.items(), row, strict=True):
            values[field] = None if word.startswith("[") else parse(word.strip())  # [N/A]
        absent = f"{program} does not say, and NVML did not answer"
        reasons = {k: absent for k, v in values.items() if v is None}
        found.append({**values, "reasons": reasons})
    return found


def nvml_handle(pynvml, device: str):
    """The NVML handle of a torch device such as `cuda:0`, respecting CUDA_VISIBLE_DEVICES.

    With several different cards CUDA counts the fastest first unless CUDA_DEVICE_ORDER says
    PCI_BUS_ID, NVML always counts by bus: then name the cards by UUID. Raises ValueError.
    """
    index = int(device.partition(":")[2] or 0)
    visible = [v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
    if not visible:
        return pynvml.nvmlDeviceGetHandleByIndex(index)
    if index >= len(visible):
        raise ValueError(f"{device} is not among CUDA_VISIBLE_DEVICES ({len(visible)} named)")
    chosen = visible[index]
    if chosen.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(chosen))
    return pynvml.nvmlDeviceGetHandleByUUID(chosen)

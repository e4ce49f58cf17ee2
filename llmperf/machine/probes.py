"""The probes: one small function for each thing to know about a machine.

A probe returns its value or raises `Unknown` with the reason; `machine.describe` runs each alone.
Nothing that is read here names a person, a host or a folder, so that a record can be shared.
"""

import importlib.metadata
import os
import platform
import re
import sys
import time
from pathlib import Path

import psutil

from llmperf.machine import gpu, probe_text
from llmperf.machine.run_tool import Unknown, ask, run_tool

PACKAGES = (
    "llmperf-study", "torch", "transformers", "tokenizers", "safetensors", "numpy", "triton",
    "nvidia-ml-py", "torchao", "bitsandbytes", "gptqmodel", "llama-cpp-python",
)  # fmt: skip
MARKERS = ("/.dockerenv", "/run/.containerenv")
GRAPHICS_KEY = r"HKLM\SYSTEM\CurrentControlSet\Control\GraphicsDrivers"
POWER_KEY = r"HKLM\SYSTEM\CurrentControlSet\Control\Power\User\PowerSchemes"
CPU_KEY = r"HKLM\HARDWARE\DESCRIPTION\System\CentralProcessor\0"


def _known(value, otherwise: str):
    """The value, unless there is none: then `Unknown` with the reason."""
    if not value:
        raise Unknown(otherwise)
    return value


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise Unknown("this kernel does not show it") from None


def _os() -> str:
    if sys.platform.startswith("linux"):
        return probe_text.linux_kind(_read("/proc/version"))
    return {"win32": "Windows", "darwin": "macOS"}.get(sys.platform, platform.system())


def _host_tool(name: str, *arguments: str) -> str:
    """Run a Windows program, on Windows itself or on the host of WSL2."""
    kind = _os()
    if kind not in ("Windows", "WSL1", "WSL2"):
        raise Unknown(f"{kind} has no such thing: it belongs to Windows")
    return run_tool(name + ".exe", *arguments)


def _os_version() -> str:
    if sys.platform.startswith("linux"):
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    if sys.platform == "darwin":
        return platform.mac_ver()[0]
    return platform.version()


def _kernel() -> str:
    """Only the number: people name the kernels that they build after their machines."""
    number = re.match(r"[\d.]*\d", platform.release())
    return _known(number, "the kernel gives no version number")[0]


def _container() -> str:
    if not sys.platform.startswith("linux"):
        raise Unknown("looked for on Linux only")
    cgroup = ask(lambda: _read("/proc/1/cgroup"))[0] or ""
    files = {marker for marker in MARKERS if Path(marker).exists()}
    return probe_text.container_kind(cgroup, files, dict(os.environ)) or "none"


def _cpu_model() -> str:
    if sys.platform == "win32":
        key = "ProcessorNameString"
        name = probe_text.registry_value(run_tool("reg.exe", "query", CPU_KEY, "/v", key), key)
    elif sys.platform == "darwin":
        name = run_tool("sysctl", "-n", "machdep.cpu.brand_string")
    elif not (name := _cpuinfo("model")):  # ARM kernels leave it out; lscpu knows the part numbers
        found = re.search(r"^Model name:\s*(\S.*)$", run_tool("lscpu"), re.M)
        name = found and found[1]
    return probe_text.cpu_name(str(_known(name, "the system gives no name")))


def _cpuinfo(key: str):
    return probe_text.proc_cpuinfo(_read("/proc/cpuinfo"))[key]


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    try:
        return len(psutil.Process().cpu_affinity())
    except AttributeError:
        raise Unknown("macOS has no processor affinity") from None


def _last_level_cache() -> int:
    """Bytes of all last-level caches together: each one is counted once, by the cores it serves."""
    if sys.platform == "darwin":
        return int(run_tool("sysctl", "-n", "hw.l2cachesize"))
    if sys.platform == "win32":
        text = run_tool(
            "powershell.exe", "-NoProfile", "-Command",
            "(Get-CimInstance Win32_Processor | Measure-Object L3CacheSize -Sum).Sum",
        )  # fmt: skip
        return int(text) * 1024
    caches: dict[int, dict[str, int]] = {}
    for size in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*/size"):
        level = int(_read(str(size.parent / "level")))
        cores = _read(str(size.parent / "shared_cpu_list"))
        caches.setdefault(level, {})[cores] = probe_text.cache_size(_read(str(size)))
    return sum(_known(caches, "the kernel lists no caches")[max(caches)].values())


def _power_plan() -> str:
    """Linux: frequency governor. Windows and WSL2: power plan, and the mode laid over it."""
    if sys.platform == "darwin":
        plan = probe_text.mac_power(run_tool("pmset", "-g"))
    elif _os() == "Linux":
        files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
        plan = ", ".join(sorted({_read(str(file)).strip() for file in files}))
        _known(plan, "no frequency governor, as is usual in a virtual machine")
    else:
        plan = probe_text.power_plan(_host_tool("powercfg", "/getactivescheme"))
        query = ("query", POWER_KEY, "/v", "ActiveOverlayAcPowerScheme")
        mode = probe_text.power_mode(ask(lambda: _host_tool("reg", *query))[0] or "")
        plan = f"{plan}, {mode}" if plan and mode else plan
    return _known(plan, "the system names none")


def _on_battery() -> bool:
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is None or battery.power_plugged is None:
        raise Unknown("no battery is reported")
    return not battery.power_plugged


def _load_average() -> list[float]:
    if sys.platform == "win32":
        raise Unknown("Windows keeps no load average")
    return [round(x, 2) for x in psutil.getloadavg()]


def _mps() -> bool:
    if _os() != "Linux":
        raise Unknown("MPS exists on Linux only, and not under WSL2")
    names = (process.info["name"] or "" for process in psutil.process_iter(["name"]))
    return any(name.startswith("nvidia-cuda-mps") for name in names)


def _hags() -> bool:
    text = _host_tool("reg", "query", GRAPHICS_KEY, "/v", "HwSchMode")
    mode = probe_text.registry_value(text, "HwSchMode")
    if mode not in (1, 2):
        raise Unknown("the registry does not say; the driver's default applies")
    return mode == 2


def _host_gpu() -> list[dict]:
    """Under WSL2: driver model and memory of the cards as the Windows host sees them."""
    if _os() != "WSL2":
        raise Unknown("asked under WSL2 only")
    keys = ("index", "name", "driver_model", "memory_used_bytes")
    return [{k: card[k] for k in keys} for card in gpu.queried("nvidia-smi.exe")]


def _packages() -> dict[str, str | None]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None  # None: not installed
    return found


def _our_cpu_s() -> float:
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:2])
        except psutil.Error:
            continue
    return total


def cpu_others_percent(window_s: float = 0.3) -> float:
    """Share of all cores (0 to 100) that other processes used, our own and our children's left out.

    Time that a hypervisor gave to others counts too.
    """
    before, ours, start = psutil.cpu_times(), _our_cpu_s(), time.perf_counter()
    time.sleep(window_s)
    after, ours_after = psutil.cpu_times(), _our_cpu_s()
    idle = sum(getattr(after, k, 0) - getattr(before, k, 0) for k in ("idle", "iowait"))
    capacity = (time.perf_counter() - start) * psutil.cpu_count()
    used = capacity - idle - (ours_after - ours)
    return round(min(max(100 * used / capacity, 0.0), 100.0), 1)


PROBES = {
    "os": _os,
    "os_version": _os_version,
    "kernel": _kernel,
    "architecture": platform.machine,
    "container": _container,
    "virtual_machine": lambda: _cpuinfo("virtual"),
    "cpu_model": _cpu_model,
    "cpu_isa": lambda: _cpuinfo("isa"),
    "cores_physical": lambda: _known(
        psutil.cpu_count(logical=False), "the system does not tell physical from logical cores"
    ),
    "cores_logical": psutil.cpu_count,
    "cores_allowed": _affinity,
    "cores_quota": lambda: _known(
        probe_text.cpu_max_cores(_read("/sys/fs/cgroup/cpu.max")), "no limit is set"
    ),
    "last_level_cache_bytes": _last_level_cache,
    "ram_total_bytes": lambda: psutil.virtual_memory().total,
    "ram_available_bytes": lambda: psutil.virtual_memory().available,
    "power_plan": _power_plan,
    "on_battery": _on_battery,
    "load_average": _load_average,
    "cpu_others_percent": cpu_others_percent,
    "gpus": gpu.cards,
    "host_gpus": _host_gpu,
    "hags": _hags,
    "mps_daemon": _mps,
    "python": platform.python_version,
    "gil_enabled": getattr(sys, "_is_gil_enabled", lambda: True),
    "switch_interval_s": sys.getswitchinterval,
    "packages": _packages,
}

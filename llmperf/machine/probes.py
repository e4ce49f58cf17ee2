"""The probes: one small function for each thing to know about a machine.

A probe returns its value or raises `Unknown` with the reason. Nothing that is read here names a
person, a host or a folder, so that a record can be shared.
"""

import contextlib
import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from llmperf.machine import gpu
from llmperf.machine.units import Unknown

PACKAGES = (
    "llmperf-study", "torch", "transformers", "tokenizers", "safetensors", "numpy", "triton",
    "nvidia-ml-py", "torchao", "bitsandbytes", "gptqmodel", "llama-cpp-python",
)  # fmt: skip
WINDOWS_TOOLS = Path("/mnt/c/Windows/System32")  # where WSL2 reaches the programs of its host
CGROUP = Path("/sys/fs/cgroup")
TOOL_S = 5.0
BUSY_WINDOW_S = 0.1


def ask(probe: Callable[[], object]) -> tuple[object, str | None]:
    """`(value, None)` from a probe, or `(None, reason)`; it never raises."""
    try:
        return probe(), None
    except Unknown as error:
        return None, str(error)
    except Exception as error:  # its text could name a path
        return None, f"the probe failed with {type(error).__name__}"


def run_tool(name: str, *arguments: str) -> str:
    """Standard output of a program. Raises `Unknown` when it is missing, slow or fails."""
    path = shutil.which(name) or shutil.which(str(WINDOWS_TOOLS / name))
    if path is None:
        raise Unknown(f"{name} is not on this machine's search path")
    try:
        done = subprocess.run(
            [path, *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=TOOL_S,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unknown(f"{name} gave no answer ({type(error).__name__})") from None
    if done.returncode:
        raise Unknown(f"{name} ended with exit status {done.returncode}")
    return done.stdout


def _known(value, otherwise: str):
    if not value:
        raise Unknown(otherwise)
    return value


def linux_kind(proc_version: str) -> str:
    """`WSL2` or `Linux`, from /proc/version: the kernel of WSL2 is called `microsoft-standard`."""
    release = proc_version.split("(")[0]
    return "WSL2" if re.search(r"microsoft-standard|WSL2", release) else "Linux"


def _os() -> str:
    if sys.platform.startswith("linux"):
        return linux_kind(Path("/proc/version").read_text(encoding="utf-8"))
    return {"win32": "Windows", "darwin": "macOS"}.get(sys.platform, platform.system())


def _only_windows() -> None:
    if _os() not in ("Windows", "WSL2"):
        raise Unknown(f"{_os()} has none: it belongs to Windows")


def _os_version() -> str:
    if sys.platform.startswith("linux"):
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    return platform.mac_ver()[0] or platform.version()


def cpu_name(brand: str) -> str:
    """The brand string without trade marks, clock and padding."""
    brand = re.sub(r"\((?:R|TM|C)\)|\bCPU\b|\bProcessor\b|@.*$|\d+-Core", " ", brand, flags=re.I)
    return " ".join(brand.split())


def _cpu_model() -> str:
    if sys.platform == "win32":
        import winreg

        key = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, key) as processor:
            return cpu_name(winreg.QueryValueEx(processor, "ProcessorNameString")[0])
    if sys.platform == "darwin":
        return cpu_name(run_tool("sysctl", "-n", "machdep.cpu.brand_string"))
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    found = re.search(r"^model name\s*:\s*(\S.*)$", text, re.M)
    return cpu_name(_known(found, "the kernel gives no name, as on ARM")[1])


def _cores_allowed() -> int:
    affinity = getattr(psutil.Process(), "cpu_affinity", None)
    return len(_known(affinity, "macOS has no processor affinity")())


def cpu_max_cores(cpu_max: str) -> float | None:
    """Cores that cgroup v2 allows (`200000 100000` → 2.0); None for no limit (`max 100000`)."""
    quota, period = cpu_max.split()
    return None if quota == "max" else int(quota) / int(period)


def _cores_quota() -> float:
    file = CGROUP / "cpu.max"
    return _known(file.exists() and cpu_max_cores(file.read_text()), "no limit is set")


def ram_available() -> int:
    """Bytes of RAM for new work: what the system has, and at most what its container allows."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or no limit in it (`max`)
        limit, used = (int((CGROUP / f"memory.{x}").read_text()) for x in ("max", "current"))
        cached = re.search(r"^inactive_file (\d+)$", (CGROUP / "memory.stat").read_text(), re.M)
        free = min(free, limit - used + int(cached[1] if cached else 0))
    return max(0, free)


def _power_plan() -> str:
    """Linux: frequency governors. Windows and WSL2: the power plan, as Windows calls it."""
    if _os() == "Linux":
        files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
        plans = sorted({file.read_text().strip() for file in files})
        return _known(", ".join(plans), "no frequency governor, as is usual in a virtual machine")
    _only_windows()
    found = re.search(r"\((.+)\)", run_tool("powercfg.exe", "/getactivescheme"))
    return _known(found, "the system names none")[1]


def _on_battery() -> bool:
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return not _known(battery, "no battery is reported").power_plugged


def _mps() -> bool:
    if _os() != "Linux":
        raise Unknown("MPS exists on Linux only, and not under WSL2")
    names = (process.info["name"] or "" for process in psutil.process_iter(["name"]))
    return any(name.startswith("nvidia-cuda-mps") for name in names)


def _hags() -> bool:
    """Hardware-accelerated GPU scheduling of Windows; asked of the host under WSL2."""
    _only_windows()
    key = r"HKLM\SYSTEM\CurrentControlSet\Control\GraphicsDrivers"
    text = run_tool("reg.exe", "query", key, "/v", "HwSchMode")
    found = re.search(r"REG_DWORD\s+0x([12])", text)
    return _known(found, "the registry does not say; the driver's default applies")[1] == "2"


def _packages() -> dict[str, str | None]:  # None: not installed
    version = importlib.metadata.version
    return {name: ask(lambda name=name: version(name))[0] for name in PACKAGES}


def others_percent() -> float:
    """What other programs use of all cores; this process and its children (a sampler that starts)
    are left out."""
    me = psutil.Process()
    ours = (me, *me.children(recursive=True))  # before the clock: to list them takes a while
    before = _seconds(ours)
    percent = psutil.cpu_percent(BUSY_WINDOW_S)
    own = 100 * (_seconds(ours) - before) / BUSY_WINDOW_S / psutil.cpu_count()
    return max(0.0, percent - max(0.0, own))  # below 0: a child has ended meanwhile


def _seconds(processes: Iterable[psutil.Process]) -> float:
    """Processor time of those that still run."""
    seconds = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it has just ended
            seconds += sum(process.cpu_times()[:2])
    return seconds


PROBES = {
    "os": _os,
    "os_version": _os_version,
    "cpu_model": _cpu_model,
    "cores_physical": lambda: psutil.cpu_count(logical=False),
    "cores_logical": psutil.cpu_count,
    "cores_allowed": _cores_allowed,
    "cores_quota": _cores_quota,
    "ram_total_bytes": lambda: psutil.virtual_memory().total,
    "ram_available_bytes": ram_available,
    "power_plan": _power_plan,
    "on_battery": _on_battery,
    "cpu_others_percent": others_percent,
    "gpus": gpu.cards,
    "hags": _hags,
    "mps_daemon": _mps,
    "python": platform.python_version,
    "gil_enabled": getattr(sys, "_is_gil_enabled", lambda: True),
    "packages": _packages,
}

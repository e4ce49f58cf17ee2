"""The sampling process: `python -m llmperf.memory.probe PID INTERVAL_S [GPU_UUID]`."""

import os
import queue
import sys
import time

import psutil

from llmperf.machine.child import Parent
from llmperf.memory.channels import GPU_CHANNELS, SYSTEM_CHANNELS, summary
from llmperf.memory.windows_counters import ProcessMemory

SLOW_SHARE = 0.004  # of one core, that the costly readings may take


class Probe:
    """Reads every channel of one process tree and one GPU; remembers why one has no answer."""

    def __init__(self, pid: int, gpu_uuid: str | None = None):
        self.root = psutil.Process(pid)
        self.tree = [self.root]
        self.without = {os.getpid()}  # processes of the tree that are not watched
        self.reasons: dict[str, str] = {}
        self.nvml = self.windows = None
        try:
            import pynvml

            pynvml.nvmlInit()
            by_uuid, first = pynvml.nvmlDeviceGetHandleByUUID, pynvml.nvmlDeviceGetHandleByIndex
            self.gpu = by_uuid(gpu_uuid) if gpu_uuid else first(0)
            self.nvml = pynvml
            self.windows = self._windows_counters()
        except Exception as error:  # no driver, no library, no card: all mean "no GPU to watch"
            self.reasons = dict.fromkeys(GPU_CHANNELS, f"no NVIDIA GPU to ask ({error})")

    def _windows_counters(self) -> ProcessMemory | None:
        try:
            return ProcessMemory()
        except Exception as error:  # another system, or counters that are switched off
            why = f"a performance counter of Windows ({type(error).__name__}: {error})"
            self.reasons["process_shared"] = why
            return None

    def fast(self) -> dict[str, float]:
        """What is cheap enough for every tick."""
        values = {"rss": sum(self._each(lambda p: p.memory_info().rss))}
        return values | self._on_gpu() if self.nvml else values

    def slow(self) -> dict[str, float]:
        """Child processes, looked for anew; the unique set size and the clock, which take long."""
        values, self.tree = {}, [self.root]
        for child in self.root.children(recursive=True):
            # In a virtual environment on Windows a process is the child of its launcher.
            if self.without.isdisjoint([child.pid, *self._parents(child)]):
                self.tree.append(child)
        try:
            values["cpu_clock"] = max(core.current for core in psutil.cpu_freq(percpu=True))
        except (AttributeError, NotImplementedError, OSError, TypeError, ValueError):
            self.reasons["cpu_clock"] = "the operating system shows no clock of the CPU"
        try:
            values["uss"] = sum(self._each(lambda p: p.memory_full_info().uss))
        except psutil.AccessDenied:
            self.reasons["uss"] = "the operating system does not let this user read it"
        return values

    def _parents(self, process: psutil.Process) -> list[int]:
        try:
            return [parent.pid for parent in process.parents()]
        except psutil.NoSuchProcess:
            return []

    def _each(self, read) -> list[int]:
        values = []
        for process in self.tree:
            try:
                values.append(read(process))
            except psutil.NoSuchProcess:  # it ended; a zombie too
                continue
        return values

    def _on_gpu(self) -> dict[str, float]:
        """Each reading by itself, at every tick: one that fails may work the next time."""
        nvml, gpu = self.nvml, self.gpu

        def memory(name: str) -> int:  # version 2 keeps driver-reserved memory apart from used
            return getattr(nvml.nvmlDeviceGetMemoryInfo(gpu, version=nvml.nvmlMemory_v2), name)

        readings = {
            "device_used": lambda: memory("used"),
            "device_free": lambda: memory("free"),
            "device_reserved": lambda: memory("reserved"),
            "utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
            "power": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            "gpu_clock": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
            "process_vram": self._process_vram,
        }
        values = {}
        for name, read in readings.items():
            try:
                values[name] = read()
            except (nvml.NVMLError, LookupError) as error:
                self.reasons[name] = str(error)
        if self.windows:
            try:
                values = self.windows.read({p.pid for p in self.tree}) | values
            except Exception as error:  # pywintypes.error, which another system does not have
                self.reasons["process_shared"] = str(error)
        return values

    def _process_vram(self) -> int:
        """Sum over the watched processes. NVML gives host ids, which containers do not share."""
        listed = self.nvml.nvmlDeviceGetComputeRunningProcesses(self.gpu)
        used = {p.pid: p.usedGpuMemory for p in listed}
        watched = [used[p.pid] for p in self.tree if p.pid in used]
        if not watched:
            raise LookupError("NVML lists no process of ours (a container has other process ids)")
        if None in watched:
            raise LookupError("the driver model does not report memory per process (WDDM, WSL2)")
        return sum(watched)


def sample(probe: Probe, interval_s: float, inbox: queue.Queue, started) -> dict[str, dict]:
    """Each channel's summary until the next message; `started` is called after the first one."""
    values: dict[str, list] = {name: [] for name in GPU_CHANNELS | SYSTEM_CHANNELS}
    due = 0.0

    def keep(slow: bool) -> None:
        nonlocal due
        if slow:
            began = time.perf_counter()
            read, ended = probe.slow(), time.perf_counter()
            due = ended + (ended - began) / SLOW_SHARE
        for name, value in (probe.fast() | (read if slow else {})).items():
            values[name].append(value)

    keep(slow=True)
    started()
    while True:
        try:
            inbox.get(timeout=interval_s)
            break
        except queue.Empty:
            keep(slow=time.perf_counter() >= due)
    keep(slow=True)
    return {name: summary(name, seen, probe.reasons.get(name)) for name, seen in values.items()}


def main(pid: str, interval_s: str, gpu_uuid: str | None = None) -> None:
    """Serve `start` and `stop` messages until the parent ends."""
    parent, inbox = Parent(), queue.Queue()
    probe = Probe(int(pid), gpu_uuid)
    parent.listen(inbox.put)
    while True:
        asked = inbox.get()
        if asked["do"] == "start":
            window = asked["window"]
            probe.without = {os.getpid(), *asked["without"]}
            found = sample(
                probe, float(interval_s), inbox, lambda n=window: parent.send(window=n, channels={})
            )
            parent.send(window=window, channels=found)


if __name__ == "__main__":
    main(*sys.argv[1:])

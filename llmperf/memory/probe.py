"""The sampling process: `python -m llmperf.memory.probe PID INTERVAL_S DEVICE`."""

import os
import queue
import re
import sys
import time
from collections.abc import Collection
from contextlib import suppress

import psutil

from llmperf.machine import gpu
from llmperf.machine.child import Parent
from llmperf.machine.description import NVML_WINDOW_S
from llmperf.memory.channels import GPU_CHANNELS, SYSTEM_CHANNELS, summary

SLOW_SHARE = 0.004  # of one core, that the costly readings may take
TOO_SHORT = f"the run was shorter than the {NVML_WINDOW_S:g} s that NVML averages over"

# Video memory of processes as Windows counts it, the view of its Task Manager: under WDDM the
# driver does not tell NVML. `Dedicated Usage` is what a process has committed on the card, `Shared
# Usage` what it has in system memory, into which a full card spills.
COUNTERS = {"process_vram": "Dedicated Usage", "process_shared": "Shared Usage"}
PROCESS = re.compile(r"pid_(\d+)_")  # of an instance: pid_4242_luid_0x00000000_0x0000D3F4_phys_0


class ProcessMemory:
    """Reads COUNTERS for some processes, without elevation. ImportError away from Windows."""

    def __init__(self):
        import win32pdh

        self._pdh, self._query = win32pdh, win32pdh.OpenQuery()
        self._counters = {
            name: win32pdh.AddEnglishCounter(self._query, rf"\GPU Process Memory(*)\{counter}")
            for name, counter in COUNTERS.items()
        }

    def read(self, pids: Collection[int]) -> dict[str, int]:
        """Bytes of each counter, summed over the processes; without those that have none."""
        self._pdh.CollectQueryData(self._query)
        found = {}
        for name, counter in self._counters.items():
            instances = self._pdh.GetFormattedCounterArray(counter, self._pdh.PDH_FMT_LARGE)
            processes = ((PROCESS.match(instance), n) for instance, n in instances.items())
            used = [n for match, n in processes if match and int(match[1]) in pids]
            if used:
                found[name] = sum(used)
        return found


class ChannelReader:
    """Reads every channel of one process tree and of `device`, if that is a card; remembers why a
    channel has no answer."""

    def __init__(self, pid: int, device: str = "cpu"):
        self.root = psutil.Process(pid)
        self.tree = [self.root]
        self.without = {os.getpid()}  # processes of the tree that are not watched
        self.card = self.windows = None
        self.reasons = dict.fromkeys(GPU_CHANNELS, "the run is on the CPU")
        if device == "cpu":
            return
        try:
            gpu.pynvml.nvmlInit()
            self.card, self.reasons = gpu.nvml_handle(device), {}
        except Exception as error:  # no driver, no library, no card: all mean "no GPU to watch"
            self.reasons = dict.fromkeys(GPU_CHANNELS, f"no NVIDIA GPU to ask ({error})")
            return
        try:
            self.windows = ProcessMemory()
        except Exception as error:  # another system, or counters that are switched off
            why = f"a performance counter of Windows ({type(error).__name__}: {error})"
            self.reasons["process_shared"] = why

    def fast(self) -> dict[str, float]:
        """What is cheap enough for every tick."""
        values = {"rss": sum(self._each(lambda p: p.memory_info().rss))}
        return values | self._on_gpu() if self.card else values

    def slow(self) -> dict[str, float]:
        """Child processes, looked for anew, and what takes long: the unique set size, and the
        counters of Windows, which are collected for all processes."""
        self.tree = [self.root]
        for child in self.root.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                # In a virtual environment on Windows a process is the child of its launcher.
                if self.without.isdisjoint([child.pid, *(p.pid for p in child.parents())]):
                    self.tree.append(child)
        values = {}
        try:
            values["uss"] = sum(self._each(lambda p: p.memory_full_info().uss))
        except psutil.AccessDenied:
            self.reasons["uss"] = "the operating system does not let this user read it"
        if self.windows:
            try:
                values |= self.windows.read({p.pid for p in self.tree})
            except Exception as error:  # pywintypes.error, which another system does not have
                self.reasons["process_shared"] = str(error)
        return values

    def _each(self, read) -> list[int]:
        values = []
        for process in self.tree:
            with suppress(psutil.NoSuchProcess):  # it ended; a zombie too
                values.append(read(process))
        return values

    def _on_gpu(self) -> dict[str, float]:
        """Each reading by itself, at every tick: one that fails may work the next time."""
        readings = {
            "device_used": lambda: gpu.memory(self.card).used,
            "utilization": lambda: gpu.FIELDS["utilization_percent"](self.card),
            "power": lambda: gpu.pynvml.nvmlDeviceGetPowerUsage(self.card) / 1000,
            "process_vram": self._process_vram,
        }
        values = {}
        for name, read in readings.items():
            try:
                values[name] = read()
            except (gpu.NVMLError, LookupError) as error:
                self.reasons[name] = str(error)
        return values

    def _process_vram(self) -> int:
        """Sum over the watched processes. NVML gives host ids, which containers do not share."""
        used = {p["pid"]: p["used_bytes"] for p in gpu.FIELDS["processes"](self.card)}
        watched = [used[p.pid] for p in self.tree if p.pid in used]
        if not watched:
            raise LookupError("NVML lists no process of ours (a container has other process ids)")
        if None in watched:
            raise LookupError("the driver model does not report memory per process (WDDM, WSL2)")
        return sum(watched)


def sample(probe: ChannelReader, interval_s: float, inbox: queue.Queue, started) -> dict[str, dict]:
    """Each channel's summary until the next message; `started` is called after the first one."""
    values: dict[str, list] = {name: [] for name in GPU_CHANNELS | SYSTEM_CHANNELS}
    due, opened = 0.0, time.perf_counter()

    def keep(slow: bool) -> None:
        nonlocal due
        if slow:
            began = time.perf_counter()
            read, ended = probe.slow(), time.perf_counter()
            due = ended + (ended - began) / SLOW_SHARE
        found = (read if slow else {}) | probe.fast()
        if time.perf_counter() < opened + NVML_WINDOW_S:
            found.pop("utilization", None)  # it would be in part of what ran before
        for name, value in found.items():
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
    reasons = {"utilization": TOO_SHORT} | probe.reasons
    return {name: summary(name, seen, reasons.get(name)) for name, seen in values.items()}


def main(pid: str, interval_s: str, device: str) -> None:
    """Serve `start` and `stop` messages until the parent ends."""
    parent, inbox = Parent(), queue.Queue()
    probe = ChannelReader(int(pid), device)
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

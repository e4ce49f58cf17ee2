"""The sampling process: `python -m llmperf.memory PID INTERVAL_S [GPU_UUID]`."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import time

from llmperf.memory import CHANNELS, GPU_CHANNELS

# The share of one core that a costly reading may take: so much rarer is it made.
UNIQUE_SHARE, CHILDREN_SHARE = 0.002, 0.002


class _Probe:
    """Reads every channel of one process tree and one GPU; remembers why one has no answer."""

    def __init__(self, pid: int, gpu_uuid: str | None):
        import psutil

        self._psutil = psutil
        self.root = psutil.Process(pid)
        self.tree = [self.root]
        self.without = {os.getpid()}  # processes of the tree that are not watched
        self.reasons: dict[str, str] = {}
        self.gpu = self._open_gpu(gpu_uuid)

    def _open_gpu(self, uuid: str | None):
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            if uuid:
                return pynvml.nvmlDeviceGetHandleByUUID(uuid)
            return pynvml.nvmlDeviceGetHandleByIndex(0)
        except Exception as error:  # no driver, no library, no card: all mean "no GPU to watch"
            self.reasons |= dict.fromkeys(GPU_CHANNELS, f"no NVIDIA GPU to ask ({error})")
            return None

    def fast(self) -> dict[str, float]:
        """What is cheap enough for every tick."""
        values = {"rss": sum(self._each(lambda p: p.memory_info().rss))}
        if self.gpu is not None:
            values.update(self._device())
        return values

    def children(self) -> dict[str, float]:
        """Look for child processes anew; gives no value itself."""
        found = self.root.children(recursive=True)
        self.tree = [self.root, *(c for c in found if c.pid not in self.without)]
        return {}

    def unique(self) -> dict[str, float]:
        """The unique set size (a walk over page tables) and the clock."""
        values = self._cpu_clock()
        try:
            values["uss"] = sum(self._each(lambda p: p.memory_full_info().uss))
        except self._psutil.AccessDenied:
            self.reasons["uss"] = "the operating system does not let this user read it"
        return values

    def _cpu_clock(self) -> dict[str, float]:
        try:
            return {"cpu_clock": max(core.current for core in self._psutil.cpu_freq(percpu=True))}
        except (AttributeError, NotImplementedError, OSError, TypeError, ValueError):
            self.reasons["cpu_clock"] = "the operating system shows no clock of the CPU"
            return {}

    def _each(self, read) -> list[int]:
        values = []
        for process in self.tree:
            try:
                values.append(read(process))
            except (self._psutil.NoSuchProcess, self._psutil.ZombieProcess):
                continue
        return values

    def _device(self) -> dict[str, float]:
        nvml, gpu = self._nvml, self.gpu
        readings = {
            "device_used": lambda: _memory_v2(nvml, gpu).used,
            "device_free": lambda: _memory_v2(nvml, gpu).free,
            "device_reserved": lambda: _memory_v2(nvml, gpu).reserved,
            "utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
            "power": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            "gpu_clock": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
            "process_vram": self._process_vram,
        }
        values = {}
        for name, read in readings.items():
            if name in self.reasons:
                continue
            try:
                values[name] = read()
            except (nvml.NVMLError, LookupError) as error:
                self.reasons[name] = str(error)
        return values

    def _process_vram(self) -> int:
        """Sum over the watched processes. NVML gives host ids, which containers do not share."""
        used = {
            p.pid: p.usedGpuMemory
            for p in self._nvml.nvmlDeviceGetComputeRunningProcesses(self.gpu)
        }
        mine = [used[p.pid] for p in self.tree if p.pid in used]
        if not mine:
            if used and self.root.pid not in used:
                raise LookupError("NVML lists other process ids than this system (a container?)")
            return 0
        if any(v is None for v in mine):
            raise LookupError("the driver model does not report memory per process (WDDM, WSL2)")
        return sum(mine)


def _memory_v2(nvml, gpu):
    """Version 2 of the memory query keeps driver-reserved memory apart from used."""
    return nvml.nvmlDeviceGetMemoryInfo(gpu, version=nvml.nvmlMemory_v2)


def _watch(pid: int, interval_s: float, gpu_uuid: str | None) -> None:
    """Serve `start` and `stop` lines on standard input until it ends."""
    words: queue.Queue[str | None] = queue.Queue()

    def listen():
        for line in sys.stdin:
            words.put(line.strip())
        words.put(None)

    threading.Thread(target=listen, daemon=True).start()
    probe = _Probe(pid, gpu_uuid)
    _answer(ready=True)
    while (word := words.get()) is not None:
        if word.startswith("start"):
            probe.without = {os.getpid(), *map(int, word.split()[1:])}
            _answer(channels=_sample_until_told(probe, interval_s, words))


def _sample_until_told(probe: _Probe, interval_s: float, words: queue.Queue) -> dict:
    """Sample until the next word. The costly first readings end before the run may begin."""
    samples: dict[str, list] = {}
    costly = {probe.children: CHILDREN_SHARE, probe.unique: UNIQUE_SHARE}
    due = dict.fromkeys(costly, 0.0)
    opened = None

    def keep(values):
        now = 0.0 if opened is None else round(time.perf_counter() - opened, 4)
        for name, value in values.items():
            samples.setdefault(name, []).append((now, value))

    def keep_costly():
        for read, share in costly.items():
            began = time.perf_counter()
            if began >= due[read]:
                keep(read())
                ended = time.perf_counter()
                due[read] = ended + (ended - began) / share

    keep_costly()
    keep(probe.fast())
    _answer(started=True)
    opened = time.perf_counter()
    while True:
        try:
            word = words.get(timeout=interval_s)
        except queue.Empty:
            keep_costly()
            keep(probe.fast())
            continue
        if word is None:
            words.put(None)  # for `_watch`: nobody listens any more
        for read in (*costly, probe.fast):
            keep(read())
        return _channels(samples, probe.reasons)


def _channels(samples: dict[str, list], reasons: dict[str, str]) -> dict[str, dict]:
    """Each channel's samples, or why it has none. The allocator is read by the parent."""
    found = {}
    for name in CHANNELS:
        if name in ("allocated", "reserved"):
            continue
        why = None if samples.get(name) else reasons.get(name, "no sample was taken in time")
        found[name] = {"samples": samples.get(name, []), "reason": why}
    return found


def _answer(**message) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(OSError):  # the watched process was killed: nobody is left to answer
        _watch(int(sys.argv[1]), float(sys.argv[2]), *(sys.argv[3:4] or [None]))

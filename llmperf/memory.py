"""Memory while something runs: device, process and allocator, sampled from outside.

The sampler is a process of its own (`python -m llmperf.memory`), so that watching costs the watched
process nothing. Only the allocator, which no other process can read, is read at step boundaries.
A channel that cannot be read is `unavailable` with a reason, never 0.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

INTERVAL_S = 0.02
SLOW_SHARE = 0.002  # share of one core that the costly readings (unique set size) may take

# Channel → unit. Device and process VRAM come from NVML, rss and uss from the operating system,
# allocated and reserved from torch's caching allocator.
CHANNELS = {
    "device_used": "bytes",
    "device_free": "bytes",
    "device_reserved": "bytes",
    "utilization": "percent",
    "power": "watts",
    "process_vram": "bytes",
    "rss": "bytes",
    "uss": "bytes",
    "allocated": "bytes",
    "reserved": "bytes",
}


@dataclass(frozen=True)
class Channel:
    """One quantity as (seconds since the window opened, value) pairs, or why there is none."""

    unit: str
    samples: tuple[tuple[float, float], ...] = ()
    reason: str | None = None

    @property
    def status(self) -> str:
        """`ok`, or `unavailable: <reason>`."""
        return f"unavailable: {self.reason}" if self.reason else "ok"

    def summary(self) -> dict:
        """Status, unit, and the first, last, lowest, highest and mean value."""
        if self.reason:
            return {"status": "unavailable", "reason": self.reason, "unit": self.unit}
        values = [v for _, v in self.samples]
        return {
            "status": "ok",
            "unit": self.unit,
            "first": values[0],
            "last": values[-1],
            "min": min(values),
            "max": max(values),
            "mean": sum(values) / len(values),
            "n": len(values),
        }


@dataclass
class Window:
    """What the sampler saw between opening and closing. `channels` is filled on closing."""

    channels: dict[str, Channel] = field(default_factory=dict)
    allocator: list[tuple[float, int, int]] = field(default_factory=list)
    _opened: float = field(default_factory=time.perf_counter)

    def step(self) -> None:
        """Read the allocator now. The decoding loops call this at each step's end."""
        import torch

        if torch.cuda.is_initialized():
            now = time.perf_counter() - self._opened
            used, held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            self.allocator.append((now, used, held))

    def summary(self) -> dict[str, dict]:
        """Each channel's summary, for the record."""
        return {name: channel.summary() for name, channel in self.channels.items()}


class Sampler:
    """Watches this process, its children and the GPU until closed; one window a measurement.

    with Sampler() as sampler:
        with sampler.window() as window:
            ...
        window.channels["rss"].samples
    """

    def __init__(self, interval_s: float = INTERVAL_S, gpu_uuid: str | None = None):
        if not interval_s > 0:
            raise ValueError(f"interval_s is {interval_s}: it must be above 0 seconds")
        command = [sys.executable, "-m", "llmperf.memory", str(os.getpid()), str(interval_s)]
        self._process = subprocess.Popen(
            command + ([gpu_uuid] if gpu_uuid else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._expect("ready")

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the sampling process."""
        if self._process.poll() is None:
            self._process.stdin.close()  # end of input is its signal to go
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process.stdout.close()

    def window(self) -> _WindowContext:
        """A context manager that yields a `Window`."""
        return _WindowContext(self)

    def _say(self, word: str) -> None:
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def _expect(self, key: str):
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the memory sampler ended early (exit code {self._process.wait()}): run"
                " `python -m llmperf.memory` by hand to see why"
            )
        return json.loads(line)[key]


class _WindowContext:
    def __init__(self, sampler: Sampler):
        self._sampler = sampler
        self._window = Window()

    def __enter__(self) -> Window:
        _reset_allocator_peaks()
        self._sampler._say("start")
        self._sampler._expect("started")
        self._window._opened = time.perf_counter()
        self._window.step()
        return self._window

    def __exit__(self, *_) -> None:
        window = self._window
        window.step()
        self._sampler._say("stop")
        for name, data in self._sampler._expect("channels").items():
            samples = tuple((t, v) for t, v in data["samples"])
            window.channels[name] = Channel(CHANNELS[name], samples, data["reason"])
        window.channels.update(_allocator_channels(window.allocator))


def _reset_allocator_peaks() -> None:
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _allocator_channels(samples: list[tuple[float, int, int]]) -> dict[str, Channel]:
    """The samples at step boundaries, with torch's own exact peak as a last one."""
    if not samples:
        reason = "torch has no caching allocator on the CPU"
        return {name: Channel("bytes", reason=reason) for name in ("allocated", "reserved")}
    import torch

    end = samples[-1][0]
    peaks = (end, torch.cuda.max_memory_allocated()), (end, torch.cuda.max_memory_reserved())
    series = [(t, a) for t, a, _ in samples], [(t, r) for t, _, r in samples]
    return {
        name: Channel("bytes", (*values, peak))
        for name, values, peak in zip(("allocated", "reserved"), series, peaks, strict=True)
    }


# The sampling process.


class _Probe:
    """Reads every channel of one process tree and one GPU; remembers why one has no answer."""

    def __init__(self, pid: int, gpu_uuid: str | None):
        import psutil

        self._psutil = psutil
        self.root = psutil.Process(pid)
        self.tree = [self.root]
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
            for name in ("device_used", "device_free", "device_reserved"):
                self.reasons[name] = f"no NVIDIA GPU to ask ({error})"
            for name in ("utilization", "power", "process_vram"):
                self.reasons[name] = f"no NVIDIA GPU to ask ({error})"
            return None

    def fast(self) -> dict[str, float]:
        """What is cheap enough for every tick."""
        values = {"rss": sum(self._each(lambda p: p.memory_info().rss))}
        if self.gpu is not None:
            values.update(self._device())
        return values

    def slow(self) -> dict[str, float]:
        """The unique set size (a walk over page tables), and a fresh look for child processes."""
        children = self.root.children(recursive=True)
        self.tree = [self.root, *(c for c in children if c.pid != os.getpid())]
        try:
            return {"uss": sum(self._each(lambda p: p.memory_full_info().uss))}
        except self._psutil.AccessDenied:
            self.reasons["uss"] = "the operating system does not let this user read it"
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
        if word == "start":
            _answer(started=True)
            _answer(channels=_sample_until_told(probe, interval_s, words))


def _sample_until_told(probe: _Probe, interval_s: float, words: queue.Queue) -> dict:
    samples: dict[str, list] = {}
    opened = next_slow = time.perf_counter()

    def keep(values):
        now = round(time.perf_counter() - opened, 4)
        for name, value in values.items():
            samples.setdefault(name, []).append((now, value))

    while True:
        if time.perf_counter() >= next_slow:
            began = time.perf_counter()
            keep(probe.slow())
            cost = time.perf_counter() - began
            next_slow = began + cost / SLOW_SHARE
        keep(probe.fast())
        try:
            words.get(timeout=interval_s)
        except queue.Empty:
            continue
        keep(probe.fast())
        keep(probe.slow())
        return {
            name: {"samples": samples.get(name, []), "reason": _reason(probe, samples, name)}
            for name in CHANNELS
            if name not in ("allocated", "reserved")
        }


def _reason(probe: _Probe, samples: dict, name: str) -> str | None:
    return None if samples.get(name) else probe.reasons.get(name, "no sample was taken in time")


def _answer(**message) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), float(sys.argv[2]), *(sys.argv[3:4] or [None]))

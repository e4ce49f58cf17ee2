"""Memory while something runs: device, process and allocator, sampled from outside.

The sampler is a process of its own (`python -m llmperf.memory`), so that watching costs the watched
process nothing. Only the allocator, which no other process can read, is read at step boundaries.
A channel that cannot be read is `unavailable` with a reason, never 0.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

INTERVAL_S = 0.02

# Channel → unit. Device, process VRAM and gpu_clock (the multiprocessors') come from NVML; rss, uss
# and cpu_clock (the fastest core's) from the operating system; allocated and reserved from torch's
# caching allocator.
CHANNELS = {
    "device_used": "bytes",
    "device_free": "bytes",
    "device_reserved": "bytes",
    "utilization": "percent",
    "power": "watts",
    "gpu_clock": "mhz",
    "process_vram": "bytes",
    "rss": "bytes",
    "uss": "bytes",
    "cpu_clock": "mhz",
    "allocated": "bytes",
    "reserved": "bytes",
}
GPU_CHANNELS = (
    *("device_used", "device_free", "device_reserved"),
    *("utilization", "power", "gpu_clock", "process_vram"),
)


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
        torch = sys.modules.get("torch")  # importing it here would be what is measured
        if torch and torch.cuda.is_initialized():
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
        if not 0 < interval_s <= 60:
            raise ValueError(
                f"interval_s is {interval_s}: it must be above 0 and at most 60 seconds"
            )
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

    def window(self, without: Sequence[int] = ()) -> _WindowContext:
        """A context manager that yields a `Window`.

        `without`: ids of child processes that only wait, and are no part of what is measured.
        """
        return _WindowContext(self, without)

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
    def __init__(self, sampler: Sampler, without: Sequence[int]):
        self._sampler, self._without = sampler, without
        self._window = Window()

    def __enter__(self) -> Window:
        give_back()
        _reset_allocator_peaks()
        self._sampler._say(" ".join(map(str, ["start", *self._without])))
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


def give_back() -> None:
    """Return what is free inside this process to the operating system, where the C library can.

    glibc keeps freed memory, so that without this the resident set of a small run after a large
    one shows the large one. Young garbage only is collected: a full collection takes a quarter of
    a second once transformers is loaded, and a run's own tensors are young. Elsewhere than on
    Linux with glibc only that happens.
    """
    gc.collect(1)
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim:
            trim(0)


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

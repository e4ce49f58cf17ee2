"""The quantities that are sampled: what was seen of each, or why nothing was."""

from __future__ import annotations

from dataclasses import dataclass

# Channel → unit. GPU channels come from NVML (gpu_clock: the multiprocessors'); rss, uss and
# cpu_clock (the fastest core's) from the operating system; allocated and reserved from torch.
GPU_CHANNELS = {
    "device_used": "bytes",
    "device_free": "bytes",
    "device_reserved": "bytes",
    "utilization": "percent",
    "power": "watts",
    "gpu_clock": "mhz",
    "process_vram": "bytes",
}
SYSTEM_CHANNELS = {"rss": "bytes", "uss": "bytes", "cpu_clock": "mhz"}
ALLOCATOR_CHANNELS = {"allocated": "bytes", "reserved": "bytes"}
CHANNELS = GPU_CHANNELS | SYSTEM_CHANNELS | ALLOCATOR_CHANNELS


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

"""The quantities that are sampled, and what is kept of each."""

from collections.abc import Sequence

# Channel → unit. GPU channels come from NVML, process_vram under WDDM and process_shared (system
# memory that a full card spills into) from Windows; rss and uss from the operating system;
# allocated and reserved from torch.
GPU_CHANNELS = {
    "device_used": "bytes",
    "utilization": "percent",
    "power": "watts",
    "process_vram": "bytes",
    "process_shared": "bytes",
}
SYSTEM_CHANNELS = {"rss": "bytes", "uss": "bytes"}
ALLOCATOR_CHANNELS = {"allocated": "bytes", "reserved": "bytes"}
CHANNELS = GPU_CHANNELS | SYSTEM_CHANNELS | ALLOCATOR_CHANNELS
# Of inference processes on a card: `device_used` once, before the first of them was started. This
# process has opened its context by then, so it is more than what an idle card holds.
RECORDED_CHANNELS = CHANNELS | {"device_before": "bytes"}


def summary(name: str, values: Sequence[float], reason: str | None = None) -> dict:
    """Summary of one channel for a record, or why it is unavailable."""
    if not values:
        why = reason or "no sample was taken in time"
        return {"status": "unavailable", "reason": why, "unit": RECORDED_CHANNELS[name]}
    return {
        "status": "ok",
        "unit": RECORDED_CHANNELS[name],
        "first": values[0],
        "last": values[-1],
        "min": min(values),
        "max": max(values),
        "mean": sum(values) / len(values),
        "n": len(values),
    }

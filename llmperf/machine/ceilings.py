"""The ceilings of this machine, measured: bytes read, FLOPs and launches per second."""

from llmperf.machine import description, rates
from llmperf.machine.units import DTYPES


def measure(device: str = "cpu") -> dict:
    """Measured ceilings of `device`, about five seconds on two cores; `warning`: it was busy.

    Each rate is a median with its samples; FLOP/s is None where a dtype has no kernel.
    """
    warning, flops = description.busy(device), {}
    for dtype in DTYPES:
        try:
            flops[dtype] = rates.matmul_flops(dtype, device)
        except RuntimeError:  # no kernel for this type here, or no memory
            flops[dtype] = None
    return {
        "read_bytes_per_s": rates.read_bandwidth(device),
        "flops_per_s": flops,
        "launch_s": rates.launch_latency(device),
        "warning": warning,
    }


def cached(device: str = "cpu") -> dict:
    """`measure(device)`, kept in the user's cache for this machine, driver and torch version.

    What was measured on a busy machine is measured again when it is idle.
    """
    return description.cached_measurement("ceilings", device, measure)


def this_minute(limits: dict, device: str = "cpu") -> dict:
    """`limits` with the bandwidth of this minute, since other programs and neighbours of a virtual
    machine change it; `most_read_bytes_per_s` keeps the highest sample of all.

    On a card they stay as they are: the buffer would stay in torch's allocator.
    """
    known, most = limits["read_bytes_per_s"], highest_read(limits)
    if device == "cpu":
        known = rates.read_bandwidth(device, repeats=3, share=0.5)  # half is enough, and quicker
        most = max(most, highest_read({"read_bytes_per_s": known}))
    return {**limits, "read_bytes_per_s": known, "most_read_bytes_per_s": most}


def highest_read(limits: dict) -> float:
    """The highest sample of the bandwidth, of this minute or before."""
    known = limits["read_bytes_per_s"]
    return limits.get("most_read_bytes_per_s") or max(known.get("samples", [known["median"]]))


def now(device: str = "cpu") -> dict:
    """Cached ceilings with the bandwidth of this minute, which is stored when it is higher."""
    known = cached(device)
    found = this_minute(known, device)
    if found["read_bytes_per_s"]["median"] > known["read_bytes_per_s"]["median"]:
        description.store_measurement("ceilings", device, found)
    return found

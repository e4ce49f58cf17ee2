"""The ceilings of this machine, measured: bytes read, FLOPs and launches per second."""

from llmperf.machine import description, rates
from llmperf.machine.units import DTYPES


def measure(device: str = "cpu") -> dict:
    """Measured ceilings of `device`, about five seconds on two cores; `warning`: it was busy.

    Each rate is a median with its MAD and samples; FLOP/s is None where a dtype has no kernel.
    """
    warning, flops = description.busy(), {}
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
    return description.kept("ceilings", device, measure)


def now(device: str = "cpu") -> dict:
    """`cached(device)`; on a processor with the bandwidth of this minute where that is higher,
    since other programs and neighbours of a virtual machine change it."""
    found = cached(device)
    if device != "cpu":
        return found
    fresh = rates.read_bandwidth(device, repeats=3)
    higher = max(found["read_bytes_per_s"], fresh, key=lambda rate: rate["median"])
    return {**found, "read_bytes_per_s": higher}

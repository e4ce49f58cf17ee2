"""Time a piece of work: samples, their spread, and whether a device is known; without torch."""

import statistics
import time
from collections.abc import Callable, Sequence

from llmperf.machine.units import DTYPES

__all__ = ["DTYPES", "check_device", "seconds_of", "spread"]


def spread(samples: Sequence[float]) -> dict:
    """`median`, `mad` and the raw `samples`, all in the unit of the samples."""
    middle = statistics.median(samples)
    mad = statistics.median(abs(x - middle) for x in samples)
    return {"median": middle, "mad": mad, "samples": list(samples)}


def seconds_of(run: Callable, wait: Callable, repeats: int, budget_s: float = 0.5) -> list[float]:
    """Seconds of each run after one that does not count; at least three, then until the budget.

    `wait` synchronises the device before the clock is read.
    """
    run()
    wait()
    samples, end = [], time.perf_counter() + budget_s
    while len(samples) < repeats and (len(samples) < 3 or time.perf_counter() < end):
        start = time.perf_counter()
        run()
        wait()
        samples.append(time.perf_counter() - start)
    return samples


def check_device(device: str) -> None:
    """Raise ValueError when this is no device that is known."""
    if device != "cpu" and not device.startswith("cuda"):
        raise ValueError(f"device {device!r} is not known: use 'cpu', 'cuda' or 'cuda:N'")

"""Video memory of processes as Windows itself counts it, the view of its Task Manager.

Under WDDM the driver does not tell NVML what a process holds; Windows tells it in performance
counters, without elevation.
"""

import re
from collections.abc import Collection

# `Dedicated Usage` is what a process has committed on the card, `Shared Usage` what it has in
# system memory: there a card that is full spills.
COUNTERS = {"process_vram": "Dedicated Usage", "process_shared": "Shared Usage"}
PROCESS = re.compile(r"pid_(\d+)_")  # of an instance: pid_4242_luid_0x00000000_0x0000D3F4_phys_0


class ProcessMemory:
    """Reads COUNTERS for some processes. Raises ImportError away from Windows."""

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
            used = [n for instance, n in instances.items() if _process(instance) in pids]
            if used:
                found[name] = sum(used)
        return found


def _process(instance: str) -> int | None:
    match = PROCESS.match(instance)
    return int(match[1]) if match else None

"""What the records of one measurement show together: a table, instability, wide intervals."""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from llmperf import stats
from llmperf.decoding.trace import Trace
from llmperf.measure import frames, records
from llmperf.measure.records import Record

CLOCK_MOVED = 0.10  # the highest clocks of two runs differ by more than this share
CLOCKS = {"gpu_clock": "the GPU's clock", "cpu_clock": "the CPU's fastest clock"}


@dataclass(frozen=True)
class Results:
    """What `measure` gathered: its records, and why it stopped."""

    records: tuple[Record, ...]
    stopped: str

    @property
    def frame(self):
        """One row a counted run, as a DataFrame (`frames.frame`); failed runs are in it."""
        return frames.frame(r for r in self.records if r.kind in ("measure", "failed"))

    def traces(self, **wanted) -> list[Trace]:
        """The traces of the counted runs whose condition has these values."""
        return [
            r.to_trace()
            for r in self.records
            if r.kind == "measure"
            and r.status == "ok"
            and all(r.condition.get(k) == v for k, v in wanted.items())
        ]

    def twin(self, quantity: str = "output_tokens_per_s") -> stats.SpeedComparison:
        """The same condition twice, paired by round: anything but "cannot tell" is a false alarm.

        Of runs measured with `twin=True`.
        """
        second = [replace(r, kind="measure") for r in self.records if r.kind == "twin"]
        keys = {condition_key(r) for r in second}
        first = [r for r in self.records if _counted(r) and condition_key(r) in keys]
        return stats.compare_speeds(first, second, quantity)


def paired(
    arms: Mapping[str, Callable[[], Trace]], rounds: int, seed: int = 0
) -> dict[str, list[float]]:
    """Output tokens/s of every arm in every round; a round has each once, in shuffled order.

    Entries i of two arms ran in one round, so `stats.ratio_interval(..., paired=True)` may compare
    them. A first round is not counted.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: it must be at least 1")
    order, speeds = random.Random(seed), {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name in order.sample(list(arms), len(arms)):
            trace = arms[name]()
            speeds[name].append(trace.output_tokens / trace.duration_s)
    return {name: values[1:] for name, values in speeds.items()}


def condition_key(record: Record) -> str:
    """`Condition.key` of the condition that a record describes."""
    return records.key("", "", record.condition, 0)


def wide(found: Iterable[Record], width: float) -> list[str]:
    """The conditions whose interval of tokens/s is wider than `width` of its median."""
    speeds = defaultdict(list)
    for r in filter(_counted, found):
        label = f"{r.condition['strategy']} {r.condition['level']}"
        speeds[label, condition_key(r)].append(r.metrics["output_tokens_per_s"])
    return [label for (label, _), v in speeds.items() if not stats.narrow_enough(v, width)]


def _counted(record: Record) -> bool:
    speed = record.metrics.get("output_tokens_per_s")
    return record.kind == "measure" and record.status == "ok" and bool(speed)


def with_warnings(found: Sequence[Record]) -> list[Record]:
    """The records, in order of time, with the warnings that only a whole series can show.

    Clocks that moved between the runs of a condition, and throughput that drifted, over all
    conditions together. The store is never rewritten: call this on what is read.
    """
    series = defaultdict(list)  # condition → positions of its counted runs
    for i, r in enumerate(found):
        if _counted(r):
            series[records.key(r.experiment, r.run_id, r.condition, 0)].append(i)
    noticed = [(members, text) for members in series.values() for text in _clocks(found, members)]
    speeds = [[found[i].metrics["output_tokens_per_s"] for i in s] for s in series.values()]
    if text := stats.drift(speeds):
        noticed.append((sum(series.values(), []), f"throughput, {text}"))
    warned = defaultdict(list)
    for members, text in noticed:
        for i in members:
            warned[i].append(f"unstable: {text}")
    return [
        replace(r, warnings=list(dict.fromkeys([*r.warnings, *warned[i]])))
        for i, r in enumerate(found)
    ]


def _clocks(found: Sequence[Record], members: Iterable[int]) -> list[str]:
    """Which clocks moved. A run counts with its highest reading: it begins with an idle clock."""
    moved = []
    for channel, name in CLOCKS.items():
        memory = [found[i].memory.get(channel, {}) for i in members]
        peaks = [c["max"] for c in memory if "max" in c]
        if peaks and max(peaks) - min(peaks) > CLOCK_MOVED * statistics.median(peaks):
            moved.append(f"{name} moved between {min(peaks):,.0f} and {max(peaks):,.0f} MHz")
    return moved

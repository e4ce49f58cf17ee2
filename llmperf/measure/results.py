"""What the records of one measurement show together: a table, instability, intervals still wide."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llmperf import stats
from llmperf.decoding.trace import Trace
from llmperf.measure import frames, records
from llmperf.measure.records import Record

CLOCK_MOVED = 0.10  # the highest clocks of two runs differ by more than this share
LEAST_CHANGE = 0.01  # a drift of less is of no account
CLOCKS = {"gpu_clock": "the GPU's clock", "cpu_clock": "the CPU's fastest clock"}


@dataclass(frozen=True)
class Results:
    """What `measure` gathered: its records, and why it stopped."""

    records: tuple[Record, ...]
    stopped: str

    @property
    def frame(self):
        """One row a counted run, as a DataFrame (`frames.frame`); failed runs are in it."""
        return frames.frame(r for r in self.records if r.kind == "measure")

    def traces(self, **wanted) -> list[Trace]:
        """The traces of the counted runs whose condition has these values."""
        return [
            r.to_trace()
            for r in self.records
            if r.kind == "measure"
            and r.status == "ok"
            and all(r.condition.get(k) == v for k, v in wanted.items())
        ]


def wide(found: Iterable[Record], width: float, quantity: str) -> list[str]:
    """The conditions whose interval of `quantity` is wider than `width` of its median."""
    values = defaultdict(list)
    for r in found:
        if r.kind == "measure" and r.status == "ok":
            label = f"{r.condition['strategy']} {r.condition['level']}"
            value = _number(r.metrics, quantity)
            values[label, _condition(r)] += [] if value is None else [value]
    return [label for (label, _), v in values.items() if not stats.narrow_enough(v, width)]


def _number(metrics: dict, quantity: str) -> float | None:
    """`duration_s` or `ttft_ms.median`; ValueError for what is no number in the metrics."""
    value = metrics
    for part in quantity.split("."):
        value = value.get(part, "no such entry") if isinstance(value, dict) else value
    if isinstance(value, dict | str):
        raise ValueError(
            f"{quantity!r} is no number in the metrics: use one such as 'output_tokens_per_s' or"
            " 'ttft_ms.median'"
        )
    return value


def with_warnings(found: Sequence[Record]) -> list[Record]:
    """The records, in order of time, with the warnings that only a whole series can show.

    Clocks that moved between the runs of a condition, and throughput that drifted: from the first
    half of a condition's repeats to the second, or, where the repeats are too few for that, over
    the rounds of all conditions together. The store is never rewritten: call this on what is read.
    """
    series = _series(found)
    noticed = [(s, text) for s in series for text in _clocks([found[i] for i in s])]
    for s in series:
        if text := stats.drift(_speeds(found, s)):
            noticed.append((s, f"throughput, {text}"))
    for rounds in _few(found, series):
        if text := _trend([_speeds(found, s) for s in rounds]):
            noticed.append((sum(rounds, []), f"throughput, {text}"))
    warned = defaultdict(list)
    for members, text in noticed:
        for i in members:
            warned[i].append(f"unstable: {text}")
    return [replace(r, warnings=_once([*r.warnings, *warned[i]])) for i, r in enumerate(found)]


def _once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _series(found: Sequence[Record]) -> list[list[int]]:
    """The positions of each condition's counted runs."""
    groups = defaultdict(list)
    for i, r in enumerate(found):
        if r.kind == "measure" and r.status == "ok" and r.metrics.get("output_tokens_per_s"):
            groups[_condition(r)].append(i)
    return list(groups.values())


def _condition(record: Record) -> str:
    """What the runs of one condition in one study share."""
    return records.key(record.experiment, record.run_id, record.condition, 0)


def _speeds(found: Sequence[Record], members: Iterable[int]) -> list[float]:
    return [found[i].metrics["output_tokens_per_s"] for i in members]


def _few(found: Sequence[Record], series: Iterable[list[int]]) -> list[list[list[int]]]:
    """The series too short for `stats.drift`, those that ran in the same rounds together."""
    groups = defaultdict(list)
    for members in series:
        if len(members) < stats.DRIFT_LEAST:
            first = found[members[0]]
            groups[first.experiment, first.run_id, len(members)].append(members)
    return list(groups.values())


def _trend(speeds: Sequence[Sequence[float]]) -> str | None:
    """A warning if conditions move with the rounds. speeds: (conditions, rounds), 3 at least.

    Page's test ranks the rounds within each condition, so that conditions of any speed pool. Half
    of the level goes to either direction, as in `stats.drift`, and a change below 1 % is no matter.
    """
    if len(speeds) < 3 or len(speeds[0]) < 3:
        return None
    from scipy.stats import page_trend_test

    change = statistics.median(row[-1] / row[0] - 1 for row in speeds)
    forward = page_trend_test(speeds if change > 0 else [row[::-1] for row in speeds])
    if abs(change) <= LEAST_CHANGE or forward.pvalue >= stats.DRIFT_LEVEL / 2:
        return None
    return f"drift: {change:+.1%} from the first round to the last, over {len(speeds)} conditions"


def _clocks(runs: Sequence[Record]) -> list[str]:
    """Which clocks moved. A run counts with its highest reading: it begins with an idle clock."""
    found = []
    for channel, name in CLOCKS.items():
        peaks = [r.memory[channel]["max"] for r in runs if "max" in r.memory.get(channel, {})]
        if peaks and max(peaks) - min(peaks) > CLOCK_MOVED * statistics.median(peaks):
            found.append(f"{name} moved between {min(peaks):,.0f} and {max(peaks):,.0f} MHz")
    return found

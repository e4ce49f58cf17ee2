"""What the records of one measurement show together."""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from llmperf import stats
from llmperf.decoding.trace import Trace
from llmperf.measure import frames
from llmperf.measure.records import Record, digest


@dataclass(frozen=True)
class Results:
    """What `measure` gathered."""

    records: tuple[Record, ...]

    @property
    def frame(self):
        """One row a measured or failed run, as a DataFrame (`frames.frame`)."""
        return frames.frame(r for r in self.records if r.kind in ("measure", "failed"))

    def traces(self, kind: str = "measure", **wanted) -> list[Trace]:
        """The traces of the ok runs of this kind whose condition has these values."""
        return [
            Trace.from_dict(r.trace)
            for r in self.records
            if r.kind == kind
            and r.status == "ok"
            and all(r.condition.get(k) == v for k, v in wanted.items())
        ]

    def twin(self, quantity: str = "output_tokens_per_s") -> stats.SpeedComparison:
        """The same condition twice, paired by round: anything but "cannot tell" is a false alarm.

        Of runs measured with `twin=True`.
        """
        second = [replace(r, kind="measure") for r in self.records if r.kind == "twin"]
        twins = {digest(r.condition) for r in second}
        first = [r for r in self.records if _counted(r) and digest(r.condition) in twins]
        return stats.compare_speeds(first, second, quantity)


def paired(arms: Mapping[str, Callable[[], Trace]], rounds: int) -> dict[str, list[float]]:
    """Output tokens/s of every arm in every round; a round has each once, in shuffled order.

    Entries i of two arms ran in one round, so `stats.ratio_interval(..., paired=True)` may compare
    them. A first round is not counted.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: it must be at least 1")
    order, speeds = random.Random(0), {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name in order.sample(list(arms), len(arms)):
            trace = arms[name]()
            speeds[name].append(trace.output_tokens / trace.duration_s)
    return {name: values[1:] for name, values in speeds.items()}


def _counted(record: Record) -> bool:
    return record.counts and bool(record.metrics.get("output_tokens_per_s"))


def with_warnings(found: Sequence[Record]) -> list[Record]:
    """The records, with a warning in each counted one when throughput drifted, over all conditions
    together. The store is never rewritten: call this on what is read."""
    series = defaultdict(list)  # condition → tokens/s of its counted runs, in order of time
    for r in filter(_counted, found):
        place = digest(r.experiment, r.run_id, r.condition)
        series[place].append(r.metrics["output_tokens_per_s"])
    text = stats.drift(list(series.values()))
    if not text:
        return list(found)
    said = f"unstable: throughput has {text}"
    return [
        replace(r, warnings=[*r.warnings, said]) if _counted(r) and said not in r.warnings else r
        for r in found
    ]

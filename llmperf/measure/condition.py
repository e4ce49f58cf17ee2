"""One point of an experiment: what is run, described so that two records can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from llmperf import decoding, strategies
from llmperf.decoding import requests as workload
from llmperf.decoding.requests import PUBLISHED, Sampling, Workload
from llmperf.decoding.trace import Trace
from llmperf.measure import load, metrics, records
from llmperf.models import Model

MOST_TOKENS = 10_000_000  # of all requests together: they are built before the run


@dataclass(frozen=True)
class Condition:
    """A model, a strategy, and `level` requests in all. Raises ValueError for invalid values."""

    model: Model
    strategy: str = "sequential"
    level: int = 1
    loop: str = decoding.DEFAULT_LOOP
    prompt_tokens: int | tuple[int, ...] = 32  # several lengths are cycled through
    new_tokens: int | tuple[int, ...] = 32
    sampling: Sampling = PUBLISHED
    options: Mapping = field(default_factory=dict)  # the strategy's options
    seed: int = 0
    arrivals: Mapping | None = None  # as `load.arrival_times` takes them; None: all at once
    slo: Mapping | None = None  # upper limits in ms, see `metrics.summarize`

    def __post_init__(self):
        strategies.check(self.strategy, self.model, self.level, self.options)
        decoding.check_loop(self.loop)
        metrics.check_slo(self.slo or {})
        longest = sum(max(workload.several(n)) for n in (self.prompt_tokens, self.new_tokens))
        if self.level * longest > MOST_TOKENS:
            raise ValueError(
                f"{self.level:,} requests of up to {longest:,} tokens are too many: use at most"
                f" {MOST_TOKENS:,} tokens in all"
            )
        most = self.model.shape.max_positions
        for request in self.workload.requests:
            workload.check_length(request, most, "the model has {} positions")

    @cached_property
    def workload(self) -> Workload:
        """The requests: the same for every strategy of equal level, lengths and seed."""
        work = workload.build(
            self.model.tokenizer,
            self.level,
            self.prompt_tokens,
            self.new_tokens,
            seed=self.seed,
            sampling=self.sampling,
        )
        return load.arriving(work, **self.arrivals) if self.arrivals else work

    def describe(self) -> dict:
        """As JSON-ready values: what a record keeps, and what makes two records comparable."""
        m, limits = self.model, dict(self.slo or {})
        loaded = {"arrivals": dict(self.arrivals), "slo": limits} if self.arrivals else {}
        return loaded | {
            "strategy": self.strategy,
            "level": self.level,
            "loop": self.loop,
            "options": dict(self.options),
            "model": m.name,
            "dtype": m.dtype,
            "weights": m.weights,
            "quantization": m.quantization,
            "device": m.device.split(":")[0],
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "sampling": asdict(self.sampling),
            "stop": {"min_tokens": None},  # forced lengths; kept for the digests of old records
            "seed": self.seed,
        }

    @cached_property
    def key(self) -> str:
        """A short digest of `describe()`, equal for conditions that are the same."""
        return records.digest(self.describe())

    @property
    def runner(self) -> strategies.Strategy:
        """The strategy itself."""
        return strategies.STRATEGIES[self.strategy]

    @property
    def rows_per_step(self) -> int:
        """Requests that share one pass over the weights, at the most."""
        return self.runner.rows_per_step(self.level, self.options)

    def ready(self) -> list[int]:
        """Start the processes that a run needs; the ids of other processes, idle in this run."""
        return self.runner.ready(self.model, self.level, self.options)

    def run(self, work: Workload | None = None, on_step=None, watch: bool = False) -> Trace:
        """Run once, all device work finished before the clock is read. `watch`: see `measure`."""
        options = {**self.options, "loop": self.loop, "on_step": on_step}
        options |= {"watch": True} if watch else {}
        return self.runner(self.model, work or self.workload, options)

    def reference(self, level: int) -> Condition:
        """`level` such requests one after another, whose tokens are compared with this run's."""
        plain = {"strategy": "sequential", "options": {}, "arrivals": None, "slo": None}
        return replace(self, level=level, **plain)

    def summarize(self, trace: Trace) -> dict:
        """The metrics of a run of it; under arriving load from the scheduled times."""
        return metrics.summarize(trace, self.slo, "scheduled" if self.arrivals else "submitted")

    def shortened(self, new_tokens: int) -> Workload:
        """For a warm-up, as many of the requests as run at the same time (all, if their lengths
        differ), with at most `new_tokens` each; of arriving ones a few, all at once."""
        few = self.rows_per_step * self.runner.servers(self.level, self.options)
        if self.arrivals:
            few = self.options.get("workers", 0)
        elif not (isinstance(self.prompt_tokens, int) and isinstance(self.new_tokens, int)):
            few = self.level
        short = [
            replace(r, max_new_tokens=min(r.max_new_tokens, new_tokens), arrival_s=0.0)
            for r in self.workload.requests[: max(2, few)]
        ]
        return replace(self.workload, requests=tuple(short))

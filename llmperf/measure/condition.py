"""One point of an experiment: what is run, described so that two records can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from llmperf import decoding, strategies
from llmperf.decoding import requests as workload
from llmperf.decoding.requests import Stop, Workload
from llmperf.decoding.sampling import PUBLISHED, Sampling
from llmperf.decoding.trace import Trace
from llmperf.measure import metrics, records
from llmperf.models import Model


@dataclass(frozen=True)
class Condition:
    """A model, a strategy, and `level` requests in flight. Raises ValueError for what cannot be."""

    model: Model
    strategy: str = "sequential"
    level: int = 1
    loop: str = decoding.DEFAULT_LOOP
    prompt_tokens: int | tuple[int, ...] = 32  # several lengths are cycled through
    new_tokens: int | tuple[int, ...] = 32
    sampling: Sampling = PUBLISHED
    stop: Stop = field(default_factory=Stop)
    options: Mapping = field(default_factory=dict)  # the strategy's options
    seed: int = 0

    def __post_init__(self):
        strategies.check(self.strategy, self.model, self.level, self.options)
        decoding.check_loop(self.loop)
        workload.check_fits(self.workload, self.model.shape.max_positions)

    @cached_property
    def workload(self) -> Workload:
        """The requests: the same for every strategy of equal level, lengths and seed."""
        return workload.build(
            self.model.tokenizer,
            self.level,
            self.prompt_tokens,
            self.new_tokens,
            seed=self.seed,
            sampling=self.sampling,
            stop=self.stop,
        )

    def describe(self) -> dict:
        """As JSON-ready values: what a record keeps, and what makes two records comparable."""
        m = self.model
        return {
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
            "stop": {"min_tokens": self.stop.min_tokens},
            "seed": self.seed,
        }

    @cached_property
    def key(self) -> str:
        """A short digest of `describe()`, equal for conditions that are the same."""
        return records.key("", "", self.describe(), 0)

    @property
    def rows_per_step(self) -> int:
        """Requests that share one pass over the weights, at the most."""
        return strategies.STRATEGIES[self.strategy].rows_per_step(self.level, self.options)

    def ready(self) -> list[int]:
        """Start the processes that a run needs; the ids of other processes, idle in this run."""
        return strategies.ready(self.strategy, self.model, self.level, self.options)

    def run(self, work: Workload | None = None, on_step=None) -> Trace:
        """Run once, all device work finished before the clock is read."""
        options = {**self.options, "loop": self.loop, "on_step": on_step}
        return strategies.STRATEGIES[self.strategy](self.model, work or self.workload, options)

    def reference(self, level: int) -> Condition:
        """`level` such requests one after another, whose tokens are compared with this run's."""
        return replace(self, strategy="sequential", options={}, level=level)

    def summarize(self, trace: Trace) -> dict:
        """The metrics of a run of it."""
        return metrics.summarize(trace)

    def shortened(self, new_tokens: int) -> Workload:
        """The same requests with at most `new_tokens` each, for a warm-up."""
        short = [
            replace(r, max_new_tokens=min(r.max_new_tokens, new_tokens))
            for r in self.workload.requests
        ]
        return replace(self.workload, requests=tuple(short))

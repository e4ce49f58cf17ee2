"""What others must know of a strategy: each strategy's file declares one `Strategy`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Trace
from llmperf.models import Model
from llmperf.strategies import served

Check = tuple[Callable[[object], bool], str]  # (whether a value can be, what it must be)
Count = Callable[[int, Mapping], int]  # (level, options) → a number
ONE: Count = lambda level, options: 1  # noqa: E731
RUN_OPTIONS = ("loop", "on_step")  # every run gets these from its condition
IGNORED_LOOPS = (None, "cached", "compiled")  # accepted by a foreign engine, which ignores them


@dataclass(frozen=True)
class Strategy:
    """A strategy decides only when and where a request runs. `level` is the number of requests.

    `run(model, workload, options) -> Trace` does the work; calling the Strategy checks first.
    """

    name: str
    run: Callable[[Model, Workload, Mapping], Trace]
    words: Callable[[int, Mapping], str]  # (level, options) → the name in a sentence
    style: int  # index of colour and marker in figures
    options: Mapping[str, Check] = field(default_factory=dict)
    defaults: Mapping = field(default_factory=dict)  # of options, where they depend on nothing else
    refuse: Callable[[Model, int, Mapping], None] | None = None  # what no single option shows
    rows_per_step: Count = ONE  # in one pass over the weights
    processes: Count = ONE  # that hold the model here; 0: another machine
    threads: Count = ONE  # that decode at the same time in one process
    streams: Count = ONE  # of CUDA, on which these threads decode
    interleaved_batches: Count = ONE  # that take turns, each with its own buffers
    foreign: bool = False  # another engine: its decoding loop and random numbers are its own
    joins: bool = False  # a request enters the running batch at its next step
    served: bool = False  # inference runs in the kept server's processes

    def check(self, model: Model, level: int, options: Mapping) -> None:
        """Raise ValueError, before any work, for unknown options or invalid values."""
        for name in options.keys() - set(RUN_OPTIONS):
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise ValueError(f"{self.name} has no option {name!r}: its options are {known}")
            good, what = self.options[name]
            if not good(options[name]):
                raise ValueError(f"{name} is {options[name]!r}: it must be {what}")
        if self.foreign and options.get("loop") not in IGNORED_LOOPS:
            raise ValueError(f"{self.name} has its own decoding loop: leave loop at its default")
        if self.refuse:
            self.refuse(model, level, self.with_defaults(options))

    def with_defaults(self, options: Mapping) -> dict:
        """The options, and the defaults of those that are not given."""
        return {**self.defaults, **options}

    def servers(self, level: int, options: Mapping) -> int:
        """Steps that are computed at the same time, here or in the kept server."""
        return self.threads(level, options) * max(1, self.processes(level, options))

    def ready(self, model: Model, level: int, options: Mapping) -> list[int]:
        """Start what a run needs, so that no measurement sees it being started.

        Gives the process ids of workers that stay idle in it: they are not part of its memory.
        """
        processes = self.processes(level, options) if self.served else 0
        weights = self.with_defaults(options).get("weights", "own")
        return served.ensure_started(model, processes, weights)

    def __call__(self, model: Model, workload: Workload, options: Mapping) -> Trace:
        """Check the options and run. The trace ends when all work is done."""
        self.check(model, len(workload.requests), options)
        return self.run(model, workload, self.with_defaults(options))


COUNT: Check = (lambda v: type(v) is int and v >= 1, "a whole number, at least 1")
TEXT: Check = (lambda v: isinstance(v, str) and v != "", "a text")


def choice(*allowed: str) -> Check:
    """A check for one of `allowed`."""
    return (lambda v: v in allowed), " or ".join(allowed)


def number(low: float, high: float) -> Check:
    """A check for a number from `low` to `high`."""
    return (lambda v: type(v) in (int, float) and low <= v <= high), f"{low:g} to {high:g}"


def capped_by_level(option: str, default: int | None = None) -> Count:
    """A count: the value of `option` (default: the level), never more than the level."""
    return lambda level, options: min(options.get(option, default or level), level)


def in_words(
    what: str, *shown: str, single: str = "", count: Count = lambda level, options: level
) -> Callable[[int, Mapping], str]:
    """Words such as `4 threads (intra_op 1)` from `{n} threads`; `shown` options follow.

    `count` gives n, `single` stands for 1; where there are more requests than that, it is said.
    """

    def words(level: int, options: Mapping) -> str:
        n = count(level, options)
        further = [f"{level} requests"] * ("{n}" in what and n < level)
        further += [f"{name} {options[name]}" for name in shown if name in options]
        name = single if single and n == 1 else what.format(n=n)
        return name + (f" ({', '.join(further)})" if further else "")

    return words

"""What others must know of a strategy: each strategy's file declares one `Strategy`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmperf.decoding.requests import Workload
    from llmperf.decoding.trace import Trace
    from llmperf.models import Model

Check = Callable[[str, object, int], None]  # (option, its value, level); raises ValueError
Count = Callable[[int, Mapping], int]  # (level, options) → a number
RUN_OPTIONS = ("loop", "on_step")  # every run gets these from its condition
OWN_LOOP = (None, "cached", "compiled")  # values of `loop` that a foreign engine accepts: defaults


def _single(level: int, options: Mapping) -> int:
    """The count of a strategy that needs no other: one process, one thread, one row."""
    return 1


@dataclass(frozen=True)
class Strategy:
    """A strategy decides only when and where a request runs. `level` is the requests in flight.

    `run(model, workload, options) -> Trace` does the work; calling the Strategy checks first.
    """

    name: str
    run: Callable[[Model, Workload, Mapping], Trace]
    words: Callable[[int, Mapping], str]  # (level, options) → the name in a sentence
    style: int  # index of colour and marker in figures
    options: Mapping[str, Check] = field(default_factory=dict)
    refuse: Callable[[Model, int, Mapping], None] | None = None  # what no single option shows
    ready: Callable[[Model, int, Mapping], list[int]] | None = None  # start processes before a run
    rows_per_step: Count = _single  # requests in one pass over the weights, at most
    processes: Count = _single  # that hold the model here; 0: another machine
    threads: Count = _single  # that decode at the same time in one process
    foreign: bool = False  # another engine: its decoding loop and random numbers are its own
    checks_memory: bool = False  # `refuse` says no to what cannot fit

    def check(self, model: Model, level: int, options: Mapping) -> None:
        """Raise ValueError, before any work, for options that cannot be."""
        for name, value in options.items():
            if name in self.options:
                self.options[name](name, value, level)
            elif name not in RUN_OPTIONS:
                known = ", ".join(self.options) or "none"
                raise ValueError(f"{self.name} has no option {name!r}: its options are {known}")
        if self.foreign and options.get("loop") not in OWN_LOOP:
            raise ValueError(f"{self.name} has its own decoding loop: leave loop at its default")
        if self.refuse:
            self.refuse(model, level, options)

    def __call__(self, model: Model, workload: Workload, options: Mapping) -> Trace:
        """Check the options and run. The trace ends when all work is done."""
        self.check(model, len(workload.requests), options)
        return self.run(model, workload, options)


def count(name: str, value: object, level: int = 0) -> None:
    """Check a whole number, at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}: it must be a whole number, at least 1")


def workers(name: str, value: object, level: int) -> None:
    """Check a number of workers: at most one for each request."""
    count(name, value)
    if value > level:
        why = f"but there are only {level} requests: use at most {level}"
        raise ValueError(f"{name} is {value}, {why}")


def choice(*allowed: object) -> Check:
    """A check for one of `allowed`."""

    def check(name: str, value: object, level: int = 0) -> None:
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}: choose {' or '.join(map(str, allowed))}")

    return check


def number(low: float, high: float = float("inf"), kind: type = float) -> Check:
    """A check for a finite number (whole, if `kind` is int) from `low` to `high`."""
    what = "whole number" if kind is int else "number"
    limits = f"of at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"

    def check(name: str, value: object, level: int = 0) -> None:
        types = int if kind is int else (int, float)
        real = isinstance(value, types) and not isinstance(value, bool)
        if not (real and low <= value <= high and value != float("inf")):
            raise ValueError(f"{name} is {value!r}: it must be a {what} {limits}")

    return check


def text(name: str, value: object, level: int = 0) -> None:
    """Check a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {value!r}: it must be a text")


def at_most(option: str, default: int | None = None) -> Count:
    """A count: the value of `option` (default: the level), never more than the level."""
    return lambda level, options: min(options.get(option, default or level), level)


def in_words(what: str, *shown: str, single: str = "") -> Callable[[int, Mapping], str]:
    """Words such as `4 threads (intra_op 1)` from `{level} threads`; `shown` options follow.

    `single` stands for a level of 1, such as `1 thread`.
    """

    def words(level: int, options: Mapping) -> str:
        further = [f"{name} {options[name]}" for name in shown if name in options]
        name = single if single and level == 1 else what.format(level=level)
        return name + (f" ({', '.join(further)})" if further else "")

    return words

"""One file a strategy, each `run(model, workload, options) -> Trace`; this table lists them.

A strategy decides only when and where a request runs. `level` is the number of requests in flight.
Each has `check(model, level, options)` too, which refuses bad options before any work. What
`processes` and `dynamic` keep alive from run to run lives inside a `session`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Trace
from llmperf.models import Model
from llmperf.strategies import (
    batch,
    continuous,
    coroutine,
    dynamic,
    endpoint,
    peer,
    processes,
    sequential,
    threads,
)

_MODULES = {
    "sequential": sequential,
    "batch": batch,
    "coroutine": coroutine,
    "threads": threads,
    "processes": processes,
    "dynamic": dynamic,
    "continuous": continuous,
    "endpoint": endpoint,
    "peer": peer,
}
STRATEGIES: dict[str, Callable[[Model, Workload, Mapping], Trace]] = {
    name: module.run for name, module in _MODULES.items()
}


def check(
    name: str, model: Model | None = None, level: int = 1, options: Mapping | None = None
) -> None:
    """Raise ValueError for a strategy that there is not, or, with a model, for its options."""
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}: choose {', '.join(STRATEGIES)}")
    if level < 1:
        raise ValueError(f"{name} with {level} requests: use at least 1")
    if model is not None:
        _MODULES[name].check(model, level, options or {})


@contextmanager
def session() -> Iterator[None]:
    """Inside, a strategy may keep what is dear to start; on leaving, nothing is left."""
    with processes.session(), dynamic.session():
        yield


def ready(name: str, model: Model, level: int, options: Mapping) -> list[int]:
    """Start what a run of this condition needs, so that no measurement sees it being started.

    Gives the process ids of workers that stay idle in it: they are not part of its memory.
    """
    idle: list[int] = []
    for module in (processes, dynamic):
        if _MODULES[name] is module:
            idle += module.ready(model, level, options)
        else:
            idle += module.rest(model)
    return idle

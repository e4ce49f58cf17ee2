"""Requests that wait are grouped into a batch: I/O and CPU work here, inference in a process.

The publication recommends it in its summary and did not measure it.
"""

from collections.abc import Mapping

from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Trace
from llmperf.models import Model
from llmperf.strategies import served
from llmperf.strategies.strategy import Strategy, at_most, count, in_words, number

MAX_BATCH = 8
OPTIONS = {
    "max_batch": count,
    "max_queue": count,
    "processes": count,
    "concurrency": count,
    "deadline_s": number(1e-3),
}


def run(model: Model, workload: Workload, options: Mapping, batching: str = "groups") -> Trace:
    """The server with `max_batch` rows.

    Options: `max_batch` (default 8), `window_s` (0.002: how long an idle process waits for more),
    `max_queue` (default: all requests), `processes` (1), `concurrency` (at most so many in flight:
    a closed loop), `deadline_s` (of a request), `loop`.
    """
    rows = options.get("max_batch", MAX_BATCH)
    processes = options.get("processes", 1)
    return served.run(model, workload, options, processes=processes, rows=rows, batching=batching)


def ready(model: Model, level: int, options: Mapping) -> list[int]:
    """Have the processes of a run loaded; the ids of those that it will not use."""
    return served.ready(model, options.get("processes", 1))


def refuse(model: Model, level: int, options: Mapping) -> None:
    """Raise ValueError when the processes cannot fit what is free."""
    served.check_memory(model, options.get("processes", 1))


STRATEGY = Strategy(
    "dynamic",
    run,
    in_words("dynamic batching", *OPTIONS, "window_s"),
    style=3,
    options=OPTIONS | {"window_s": number(0, 59)},
    refuse=refuse,
    ready=ready,
    rows_per_step=at_most("max_batch", MAX_BATCH),
    processes=lambda level, options: options.get("processes", 1),
    checks_memory=True,
)

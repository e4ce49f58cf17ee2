"""Requests that wait are grouped into a batch: I/O and CPU work here, inference in a process.

The publication recommends it in its summary, first and second points, and did not measure it.
"""

from collections.abc import Mapping

from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Trace
from llmperf.models import Model
from llmperf.strategies import served
from llmperf.strategies.server import ROWS
from llmperf.strategies.strategy import COUNT, Strategy, capped_by_level, in_words, number

OPTIONS = {
    "max_batch": COUNT,
    "max_queue": COUNT,
    "processes": COUNT,
    "concurrency": COUNT,
    "deadline_s": number(1e-3, 1e6),
}


def run(model: Model, workload: Workload, options: Mapping, batching: str = "groups") -> Trace:
    """Options: `max_batch` (default 8) and those of `Server.run`."""
    how = dict(options)
    return served.run(model, workload, rows=how.pop("max_batch"), batching=batching, **how)


STRATEGY = Strategy(
    "dynamic",
    run,
    in_words("dynamic batching", *OPTIONS, "window_s"),
    style=3,
    options=OPTIONS | {"window_s": number(0, 59)},
    defaults={"max_batch": ROWS},
    rows_per_step=capped_by_level("max_batch", ROWS),
    processes=lambda level, options: options.get("processes", 1),
    served=True,
)

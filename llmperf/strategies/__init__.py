"""One file a strategy, each `run(model, workload, options) -> Trace`; this table lists them.

A strategy decides only when and where a request runs. `level` is the number of requests in flight.
"""

from collections.abc import Callable, Mapping

from llmperf.models import Model
from llmperf.strategies import batch, sequential
from llmperf.trace import Trace
from llmperf.workload import Workload

STRATEGIES: dict[str, Callable[[Model, Workload, Mapping], Trace]] = {
    "sequential": sequential.run,
    "batch": batch.run,
}


def check(name: str) -> None:
    """Raise ValueError for a strategy that there is not."""
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}: choose {', '.join(STRATEGIES)}")

"""Requests that start together as one batch: the publication's "Batch Inference"."""

from collections.abc import Mapping

from llmperf import decoding
from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Recorder, Trace
from llmperf.models import Model
from llmperf.strategies import run_control
from llmperf.strategies.strategy import COUNT, Strategy, capped_by_level, in_words


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """All requests in one batch, or in batches of `batch_size` one after another.

    Options: `batch_size` (default: all), `loop`, `on_step`.
    """
    how = run_control.decode_arguments(workload, options)
    recorder = Recorder(workload.requests)
    requests = tuple(run_control.in_order(workload.requests))
    size = options.get("batch_size", len(requests))
    longest = max(r.length for r in requests)
    how["room"] = min(size, len(requests)), longest  # of all batches, the last one too
    for start in range(0, len(requests), size):
        rows = requests[start : start + size]
        run_control.wait_for_arrival(rows[-1], recorder)  # the last one to arrive
        decoding.run(model, rows, recorder, **how)
    return recorder.trace()


STRATEGY = Strategy(
    "batch",
    run,
    in_words("batches of {n}", count=capped_by_level("batch_size")),
    style=0,
    options={"batch_size": COUNT},
    rows_per_step=capped_by_level("batch_size"),
)

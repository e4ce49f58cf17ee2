"""One left-padded batch: the publication's "Batch Inference"."""

from collections.abc import Mapping

from llmperf import decoding
from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Recorder, Trace
from llmperf.models import Model
from llmperf.strategies import shared
from llmperf.strategies.strategy import Strategy, at_most, count, in_words


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """All requests in one batch, or in batches of `batch_size` one after another.

    Options: `loop` (default cached), `batch_size` (default: all), `on_step`.
    """
    recorder = Recorder(workload.requests)
    requests = tuple(shared.in_order(workload.requests))
    size = options.get("batch_size", len(requests))
    for start in range(0, len(requests), size):
        rows = requests[start : start + size]
        shared.wait_for_arrival(rows[-1], recorder)  # the last one to arrive
        decoding.run(
            model,
            rows,
            recorder,
            loop=options.get("loop", "cached"),
            sampling=workload.sampling,
            stop=workload.stop,
            on_step=options.get("on_step"),
        )
    return recorder.trace()


STRATEGY = Strategy(
    "batch",
    run,
    in_words("batches of {level}", "batch_size"),
    style=0,
    options={"batch_size": count},
    rows_per_step=at_most("batch_size"),
)

"""One left-padded batch: the publication's "Batch Inference"."""

from collections.abc import Mapping

from llmperf import decoding
from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Recorder, Trace
from llmperf.models import Model
from llmperf.strategies import shared


def check(model: Model, level: int, options: Mapping) -> None:
    """Raise ValueError, before any work, for options that cannot be."""
    shared.check_options("batch", options, ("batch_size",))
    shared.check_count("batch_size", options.get("batch_size", level))


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """All requests in one batch, or in batches of `batch_size` one after another.

    Options: `loop` (default cached), `batch_size` (default: all), `on_step`.
    """
    check(model, len(workload.requests), options)
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

"""One left-padded batch: the publication's "Batch Inference"."""

from collections.abc import Mapping

from llmperf import decoding
from llmperf.models import Model
from llmperf.trace import Recorder, Trace
from llmperf.workload import Workload


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """All requests in one batch, or in batches of `batch_size` one after another.

    Options: `loop` (default cached), `batch_size` (default: all), `on_step`.
    """
    recorder = Recorder(workload.requests)
    requests = workload.requests
    size = options.get("batch_size", len(requests))
    for start in range(0, len(requests), size):
        decoding.run(
            model,
            requests[start : start + size],
            recorder,
            loop=options.get("loop", "cached"),
            sampling=workload.sampling,
            stop=workload.stop,
            on_step=options.get("on_step"),
        )
    return recorder.trace()

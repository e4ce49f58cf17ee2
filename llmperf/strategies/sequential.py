"""One request after another: the publication's "1" rows, and what all others are compared with."""

from collections.abc import Mapping

from llmperf import decoding
from llmperf.models import Model
from llmperf.trace import Recorder, Trace
from llmperf.workload import Workload


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """All requests are there from the start; each waits until those before it have ended.

    Options: `loop` (default cached), `on_step` (called after each token), `on_request`.
    """
    recorder = Recorder(workload.requests)
    for request in workload.requests:
        decoding.run(
            model,
            [request],
            recorder,
            loop=options.get("loop", "cached"),
            sampling=workload.sampling,
            stop=workload.stop,
            on_step=options.get("on_step"),
        )
    return recorder.trace()

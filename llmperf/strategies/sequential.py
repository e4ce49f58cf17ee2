"""One request after another: the publication's "1" rows, and what all others are compared with."""

from collections.abc import Mapping

from llmperf import decoding
from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Recorder, Trace
from llmperf.models import Model
from llmperf.strategies import shared
from llmperf.strategies.strategy import Strategy, in_words


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """In the order of arrival; each waits until those before it have ended.

    Options: `loop` (default cached), `on_step` (called after each token).
    """
    recorder = Recorder(workload.requests)
    for request in shared.in_order(workload.requests):
        shared.wait_for_arrival(request, recorder)
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


STRATEGY = Strategy("sequential", run, in_words("one request after another"), style=6)

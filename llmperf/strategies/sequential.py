"""One request after another: the publication's "1" rows, and what all others are compared with."""

from collections.abc import Mapping

from llmperf import decoding
from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Recorder, Trace
from llmperf.models import Model
from llmperf.strategies import run_control
from llmperf.strategies.strategy import Strategy, in_words


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """In the order of arrival; each waits until those before it have ended.

    Options: `loop`, `on_step` (called after each token).
    """
    how = run_control.decode_arguments(workload, options)
    recorder = Recorder(workload.requests)
    for request in run_control.in_order(workload.requests):
        run_control.wait_for_arrival(request, recorder)
        decoding.run(model, [request], recorder, **how)
    return recorder.trace()


STRATEGY = Strategy("sequential", run, in_words("one request after another"), style=6)

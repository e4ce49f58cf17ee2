"""Continuous batching: requests join and leave the running batch at every step."""

from collections.abc import Mapping
from dataclasses import replace

from llmperf.decoding.requests import Workload
from llmperf.decoding.trace import Trace
from llmperf.models import Model
from llmperf.strategies import dynamic
from llmperf.strategies.strategy import in_words


def run(model: Model, workload: Workload, options: Mapping) -> Trace:
    """The server of `dynamic` over `decoding.Slots`; prompts are prefilled in pieces.

    Options: those of `dynamic` without `window_s`. Each request draws from its own random stream,
    so its tokens are those of `sequential` whatever joins or leaves.
    """
    return dynamic.run(model, workload, options, batching="slots")


STRATEGY = replace(
    dynamic.STRATEGY,
    name="continuous",
    run=run,
    words=in_words("continuous batching", *dynamic.OPTIONS),
    style=5,
    options=dynamic.OPTIONS,
    joins=True,
)

"""Continuous batching: requests join and leave the running batch at every step.

The server of `dynamic` over `decoding.Slots`; prompts are prefilled in pieces. Options: those of
`dynamic` without `window_s`. Each request draws from its own random stream, so its tokens are those
of `sequential` whatever joins or leaves.
"""

from dataclasses import replace
from functools import partial

from llmperf.strategies import dynamic
from llmperf.strategies.strategy import in_words

STRATEGY = replace(
    dynamic.STRATEGY,
    name="continuous",
    run=partial(dynamic.run, batching="slots"),
    words=in_words("continuous batching", *dynamic.OPTIONS),
    style=5,
    options=dynamic.OPTIONS,
    joins=True,
)

"""The table of strategies: to add one, write its file and list it here."""

from collections.abc import Mapping

from llmperf.models import Model
from llmperf.strategies import (
    batch,
    continuous,
    coroutine,
    dynamic,
    endpoint,
    peer,
    processes,
    sequential,
    threads,
)
from llmperf.strategies.strategy import Strategy

_FILES = (
    sequential, batch, coroutine, threads, processes, dynamic, continuous, endpoint, peer,
)  # fmt: skip
STRATEGIES: dict[str, Strategy] = {file.STRATEGY.name: file.STRATEGY for file in _FILES}


def check(name: str, model: Model, level: int = 1, options: Mapping | None = None) -> None:
    """Raise ValueError for an unknown strategy, or for options that cannot be."""
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}: choose {', '.join(STRATEGIES)}")
    if level < 1:
        raise ValueError(f"{name} with {level} requests: use at least 1")
    STRATEGIES[name].check(model, level, options or {})

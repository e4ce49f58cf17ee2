"""The table of strategies: to add one, write its file and list it here."""

from __future__ import annotations

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
    served,
    threads,
)
from llmperf.strategies.served import session
from llmperf.strategies.strategy import Strategy

__all__ = ["STRATEGIES", "check", "get", "ready", "session"]

_FILES = (
    sequential, batch, coroutine, threads, processes, dynamic, continuous, endpoint, peer,
)  # fmt: skip
STRATEGIES: dict[str, Strategy] = {file.STRATEGY.name: file.STRATEGY for file in _FILES}


def get(name: str) -> Strategy:
    """The strategy of that name. Raises ValueError when there is none."""
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}: choose {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def check(
    name: str, model: Model | None = None, level: int = 1, options: Mapping | None = None
) -> None:
    """Raise ValueError for an unknown strategy, or, with a model, for options that cannot be."""
    found = get(name)
    if level < 1:
        raise ValueError(f"{name} with {level} requests: use at least 1")
    if model is not None:
        found.check(model, level, options or {})


def ready(name: str, model: Model, level: int, options: Mapping) -> list[int]:
    """Start what a run of this condition needs, so that no measurement sees it being started.

    Gives the process ids of workers that stay idle in it: they are not part of its memory.
    """
    known = get(name)
    return known.ready(model, level, options) if known.ready else served.ready(model, 0)

"""The table of strategies: to add one, write its file and list it here."""

from collections.abc import Mapping
from importlib import import_module

from llmperf.models import Model
from llmperf.strategies.strategy import Strategy

FILES = "sequential batch coroutine threads processes dynamic continuous endpoint peer"
STRATEGIES: dict[str, Strategy] = {
    name: import_module(f"llmperf.strategies.{name}").STRATEGY for name in FILES.split()
}


def check(name: str, model: Model, level: int = 1, options: Mapping | None = None) -> None:
    """Raise ValueError for an unknown strategy, too few requests, or invalid options."""
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}: choose {', '.join(STRATEGIES)}")
    if level < 1:
        raise ValueError(f"{name} with {level} requests: use at least 1")
    STRATEGIES[name].check(model, level, options or {})

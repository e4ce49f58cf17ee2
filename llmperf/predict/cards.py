"""Cards by name, for predictions: memory, bandwidth and arithmetic from the data sheets."""

import csv
import re
from dataclasses import dataclass, replace
from functools import cache

from llmperf import REFERENCE

ALIASES = {"h100 hbm3": "h100 sxm5", "h200": "h200 sxm"}  # as the driver names them → as sold
NOISE = re.compile(r"\b(nvidia|geforce|tesla|gpu|\d+\s*gb)\b")


@dataclass(frozen=True)
class Card:
    """A card's data sheet; None where not given."""

    name: str
    memory_gib: float
    bandwidth_bytes_s: float | None = None


@cache
def known_cards() -> tuple[Card, ...]:
    """The cards of `data/reference/gpu_specs.csv`."""
    with (REFERENCE / "gpu_specs.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Card(row["gpu"], float(row["memory_gb"]), float(row["bandwidth_gb_s"]) * 1e9)
            for row in csv.DictReader(file)
        )


def _words(name: str) -> frozenset[str]:
    plain = " ".join(NOISE.sub(" ", name.lower()).split())
    return frozenset(ALIASES.get(plain, plain).split())


def card(name: str, memory_gib: float | None = None) -> Card:
    """The card of that name, as people or the driver write it; all words must agree.

    An unknown card needs its `memory_gib`; without it, ValueError names the known ones.
    """
    for known in known_cards():
        if _words(known.name) == _words(name):
            return replace(known, memory_gib=memory_gib or known.memory_gib)
    if memory_gib:
        return Card(name, memory_gib)
    raise ValueError(
        f"unknown card {name!r}: give its memory in GiB as memory_gib=..., or one of "
        f"{', '.join(known.name for known in known_cards())}"
    )

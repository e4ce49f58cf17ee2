"""Cards by name, for predictions: memory, bandwidth and arithmetic from the data sheets."""

import csv
import re
from dataclasses import dataclass

from llmperf import REFERENCE

ALIASES = {"h100 hbm3": "h100 sxm5", "h200": "h200 sxm"}  # as the driver names them → as sold
NOISE = re.compile(r"\b(nvidia|geforce|tesla|gpu|\d+\s*gb)\b")


@dataclass(frozen=True)
class Card:
    """A card's data sheet; None where not given."""

    name: str
    memory_gib: float
    bandwidth_bytes_s: float | None = None


def _rows() -> list[dict]:
    with (REFERENCE / "gpu_specs.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def card_names() -> tuple[str, ...]:
    return tuple(row["gpu"] for row in _rows())


def _words(name: str) -> frozenset[str]:
    plain = " ".join(NOISE.sub(" ", name.lower()).split())
    return frozenset(ALIASES.get(plain, plain).split())


def card(name: str, memory_gib: float | None = None) -> Card:
    """The card of that name, as people or the driver write it; all words must agree.

    An unknown card needs its `memory_gib`; without it, ValueError names the known ones.
    """
    for row in _rows():
        if _words(row["gpu"]) == _words(name):
            size = memory_gib or float(row["memory_gb"])
            return Card(row["gpu"], size, float(row["bandwidth_gb_s"]) * 1e9)
    if memory_gib:
        return Card(name, memory_gib)
    raise ValueError(
        f"unknown card {name!r}: give its memory in GiB as memory_gib=..., or one of "
        f"{', '.join(card_names())}"
    )

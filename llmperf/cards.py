"""Cards by name: memory, bandwidth and arithmetic from their data sheets."""

import csv
import re
from dataclasses import dataclass
from functools import lru_cache

from llmperf.shapes import REFERENCE

GIB = 2**30
# Words in a driver's name for a card that say nothing about which card it is.
_NOISE = {"nvidia", "geforce", "gpu", "hbm3", "hbm3e", "sxm"}


@dataclass(frozen=True)
class Card:
    """A card's data sheet. `memory_gib` in GiB; `fp16_flops_s` dense."""

    name: str
    memory_gib: float
    bandwidth_bytes_s: float | None = None
    fp16_flops_s: float | None = None


@lru_cache(maxsize=1)
def cards() -> tuple[Card, ...]:
    """All cards of `gpu_specs.csv`."""
    with (REFERENCE / "gpu_specs.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Card(
                row["gpu"],
                float(row["memory_gb"]),
                float(row["bandwidth_gb_s"]) * 1e9,
                float(row["fp16_dense_tflops"]) * 1e12,
            )
            for row in csv.DictReader(file)
        )


def card(name: str, memory_gib: float | None = None) -> Card:
    """The card of that name, as people or the driver write it.

    An unknown card needs its `memory_gib`; without it, ValueError names the known ones.
    """
    for known in cards():
        if _same(known.name, name):
            return known
    if memory_gib:
        return Card(name, memory_gib)
    raise ValueError(
        f"unknown card {name!r}: give its memory in GiB as memory_gib=..., or one of "
        f"{', '.join(c.name for c in cards())}"
    )


def _same(known: str, asked: str) -> bool:
    wanted, words = _words(known), _words(asked)
    if "h100" in words and "pcie" not in words:
        words.add("sxm5")  # the driver calls it 'NVIDIA H100 80GB HBM3'
    return wanted == words


def _words(name: str) -> set[str]:
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    return {w for w in words if w not in _NOISE and not re.fullmatch(r"\d+gb", w)}

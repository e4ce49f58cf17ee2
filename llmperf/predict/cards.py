"""Cards by name, for predictions: memory, bandwidth and arithmetic from the data sheets."""

import csv
from dataclasses import dataclass

from llmperf.machine import card_specs


@dataclass(frozen=True)
class Card:
    """A card's data sheet: memory in GiB, bytes/s, dense fp16 FLOP/s; None where not given."""

    name: str
    memory_gib: float
    bandwidth_bytes_s: float | None = None
    fp16_flops_s: float | None = None


def card_names() -> tuple[str, ...]:
    """The cards of `gpu_specs.csv`."""
    with card_specs.SPECS.open(encoding="utf-8", newline="") as file:
        return tuple(row["gpu"] for row in csv.DictReader(file))


def card(name: str, memory_gib: float | None = None) -> Card:
    """The card of that name, as people or the driver write it.

    An unknown card needs its `memory_gib`; without it, ValueError names the known ones.
    """
    row = card_specs.find(name)
    if row:
        bandwidth, flops = float(row["bandwidth_gb_s"]), float(row["fp16_dense_tflops"])
        size = memory_gib or float(row["memory_gb"])
        return Card(row["gpu"], size, bandwidth * 1e9, flops * 1e12)
    if memory_gib:
        return Card(name, memory_gib)
    raise ValueError(
        f"unknown card {name!r}: give its memory in GiB as memory_gib=..., or one of "
        f"{', '.join(card_names())}"
    )

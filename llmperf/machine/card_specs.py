"""What the data sheet of a card promises, from `data/reference/gpu_specs.csv`."""

import csv
import re

from llmperf import REFERENCE
from llmperf.machine import gpu
from llmperf.machine.run_tool import ask

SPECS = REFERENCE / "gpu_specs.csv"
ALIASES = {"h100 hbm3": "h100 sxm5", "h200": "h200 sxm"}  # as the driver names them → as sold
NOISE = re.compile(r"\b(nvidia|geforce|tesla|gpu|\d+\s*gb)\b")


def _words(name: str) -> frozenset[str]:
    plain = " ".join(NOISE.sub(" ", name.lower()).split())
    return frozenset(ALIASES.get(plain, plain).split())


def find(name: str, memory_bytes: int | None = None) -> dict | None:
    """The row of `gpu_specs.csv` for a card as the driver names it, or None.

    All words must agree, so that a 3060 Ti is no 3060 and a laptop card no desktop card; the
    memory size tells variants apart (a driver shows up to a tenth less than is sold).
    """
    with SPECS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            sold = float(row["memory_gb"]) * 2**30
            fits = memory_bytes is None or 0.88 * sold < memory_bytes < 1.05 * sold
            if _words(row["gpu"]) == _words(name) and fits:
                return row
    return None


def from_clocks(card: dict) -> float | None:
    """Bytes per second of the memory bus: width / 8 x clock x 2, for memory that clocks both edges.

    The driver reports GDDR6X as if it did, so this gives 1,008 GB/s for an RTX 4090.
    """
    bits, clock = card.get("memory_bus_bits"), card.get("clock_memory_max_mhz")
    return bits / 8 * clock * 1e6 * 2 if bits and clock else None


def describe_card(card: dict) -> dict:
    """Data-sheet figures of a card as `gpu.card` gives it; None where the card is not in the table.

    `read_bytes_per_s` and `fp16_flops_per_s` (dense, FP32 accumulate) from the table,
    `read_bytes_per_s_from_clocks` from what the driver says.
    """
    row = find(card["name"] or "", card.get("memory_total_bytes")) or {}
    return {
        "card": row.get("gpu"),
        "read_bytes_per_s": float(row["bandwidth_gb_s"]) * 1e9 if row else None,
        "fp16_flops_per_s": float(row["fp16_dense_tflops"]) * 1e12 if row else None,
        "read_bytes_per_s_from_clocks": from_clocks(card),
        "note": row.get("note"),
        "source": row.get("source"),
    }


def data_sheet(device: str) -> tuple[dict | None, str | None]:
    """`(figures, None)` for a torch device, or with the reason why some or all are None."""
    if not device.startswith("cuda"):
        return None, "no table of data sheets for processors: their memory differs by machine"

    def read() -> dict:
        with gpu.nvml() as pynvml:
            return gpu.card(pynvml, gpu.nvml_handle(pynvml, device))

    card, reason = ask(read, 20.0)
    if card is None:
        return None, reason
    figures = describe_card(card)
    if figures["card"] is None:
        return figures, f"{card['name']} is not in gpu_specs.csv"
    return figures, None

"""Does a run fit a card: the verdict with its arithmetic, and the largest setting that fits.

Cards are known by name, from their data sheets.
"""

import csv
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from llmperf import REFERENCE
from llmperf.machine import GIB
from llmperf.predict.ledger import Ledger, memory
from llmperf.predict.spec import RunSpec

SPILLS = ("windows", "wsl2")  # a full card takes system memory there instead of failing
MARGIN = 0.05  # of the card, where it must never run full
LEAST_MARGIN_GIB = 0.5
KNEE_DROP = 0.25  # of the best throughput
LARGEST_TRIED = {"rows": 65536, "processes": 256}
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


@dataclass(frozen=True)
class Fit:
    """`verdict`: fits, might fit (between the bounds), does not fit; and the sentence for it."""

    verdict: str
    sentence: str


class Largest(NamedTuple):
    """The largest number that surely fits, and that at best fits; 0 where none does."""

    surely: int
    at_best: int


def budget(platform: str, free_bytes: int, total_bytes: int) -> int:
    """Bytes that a run may use: what is free, less a margin on Windows and WSL2.

    A full card spills into system memory there, or takes the host down.
    """
    spills = platform in SPILLS
    margin = max(MARGIN * total_bytes, LEAST_MARGIN_GIB * GIB) if spills else 0
    if free_bytes <= margin:
        raise ValueError(
            f"{free_bytes / GIB:.2f} GiB free less a margin of {margin / GIB:.2f} GiB leaves "
            "nothing: close what uses the card"
        )
    return int(free_bytes - margin)


def judge(ledger: Ledger, budget_bytes: int) -> Fit:
    """Hold a ledger against a budget: of the whole card, when the ledger has a line for what is in
    use before the start."""
    largest_lines = sorted((line for line in ledger.lines if line.low), key=lambda x: -x.low)[:3]
    words = " + ".join(f"{line.name} {line.low / GIB:.2f}" for line in largest_lines)
    need = f"{words} + rest = {ledger.low / GIB:.2f} to {ledger.high / GIB:.2f} GiB"
    if ledger.low > budget_bytes:
        verdict = "does not fit"
    else:
        verdict = "fits" if ledger.high <= budget_bytes else "might fit"
    return Fit(verdict, f"{need}: {verdict} in {budget_bytes / GIB:.2f} GiB")


def largest(spec: RunSpec, name: str, budget_bytes: int, **known) -> Largest:
    """The largest `rows`, `processes` or `prompt_tokens` whose ledger fits.

    Tokens end at the model's positions. `known`: further arguments of `memory`.
    """
    most = LARGEST_TRIED.get(name) or max(1, spec.shape.max_positions - spec.new_tokens)

    def book(n: int) -> Ledger:
        return memory(replace(spec, **{name: n}), **known)

    numbers = range(1, most + 1)
    surely = bisect_right(numbers, budget_bytes, key=lambda n: book(n).high)
    return Largest(surely, bisect_right(numbers, budget_bytes, key=lambda n: book(n).low))


def advise(spec: RunSpec, card: Card) -> list[str]:
    """Does it fit this card, and if not, what would: one sentence each, the verdict first."""
    size, book = int(card.memory_gib * GIB), memory(spec)
    fit = judge(book, size)
    said = [f"{spec.shape.name} on {card.name}: {fit.sentence}."]
    if fit.verdict == "fits":
        return said
    rows, prompt = largest(spec, "rows", size), largest(spec, "prompt_tokens", size)
    if rows.at_best:
        said.append(f"Batch {rows.surely} surely fits, batch {rows.at_best} at best.")
    if prompt.at_best:
        said.append(
            f"At batch {spec.rows} a prompt of {prompt.surely} tokens surely fits, "
            f"{prompt.at_best} at best, with {spec.new_tokens} to generate."
        )
    if spec.quantization is None and spec.shape.quantization is None:
        for word in ("bnb-8", "awq"):
            smaller = judge(memory(replace(spec, quantization=word)), size)
            said.append(f"With {word} weights: {smaller.sentence}.")
    enough = [c for c in known_cards() if c.memory_gib * GIB >= book.high]
    if smallest := min(enough, key=lambda c: c.memory_gib, default=None):
        said.append(f"{smallest.name} ({smallest.memory_gib:g} GiB) surely holds it.")
    return said


def knee(
    levels: Sequence[int], throughput: Sequence[float], memory_bytes: Sequence[float]
) -> str | None:
    """A sentence on the first level a quarter slower than the best before it though memory grew.

    That is what spilling into system memory looks like; a plateau is not a knee.
    """
    points, best = list(zip(levels, throughput, memory_bytes, strict=True)), None
    for level, speed, size in points:
        if best and size > best[2] and speed < (1 - KNEE_DROP) * best[1]:
            return (
                f"from level {best[0]} to {level} memory grows by {(size - best[2]) / GIB:.2f} GiB"
                f" and throughput falls from {best[1]:.0f} to {speed:.0f} tokens/s: "
                "it probably spills into system memory"
            )
        best = (level, speed, size) if not best or speed > best[1] else best
    return None

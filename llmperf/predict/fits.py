"""What fits a card: refused beforehand, with the arithmetic, and the largest that does fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llmperf.machine import GIB
from llmperf.predict import cards
from llmperf.predict.cards import Card
from llmperf.predict.ledger import Ledger, memory
from llmperf.predict.spec import RunSpec

MARGIN = 0.05  # of the card, where it must never run full
LEAST_MARGIN_GIB = 0.5


class DoesNotFit(ValueError):
    """The run would not fit; the message has the arithmetic."""


@dataclass(frozen=True)
class Fit:
    """`verdict`: fits, might fit (between the bounds), does not fit; and the sentence for it."""

    verdict: str
    sentence: str


@dataclass(frozen=True)
class Largest:
    """The largest number that surely fits, and the largest that may; 0 where none does."""

    surely: int
    at_best: int


def budget(platform: str, free_bytes: int, total_bytes: int, given: int | None = None) -> int:
    """Bytes that a sweep may use: what is given, else what is free, less a margin where needed.

    On Windows and WSL2 a full card spills into system memory, or takes the host down, so 5 % of
    the card, at least 0.5 GiB, stays free there. Raises ValueError when that leaves nothing or
    more is given than is free.
    """
    careful = platform in ("windows", "wsl2")
    margin = max(MARGIN * total_bytes, LEAST_MARGIN_GIB * GIB) if careful else 0
    most = int(free_bytes - margin)
    if most <= 0:
        raise ValueError(
            f"{free_bytes / GIB:.2f} GiB free less a margin of {margin / GIB:.2f} GiB leaves "
            "nothing: close what uses the card"
        )
    if given is not None and not 0 < given <= free_bytes:
        raise ValueError(
            f"a budget of {given / GIB:.2f} GiB: give one above 0, up to the "
            f"{free_bytes / GIB:.2f} GiB that are free"
        )
    return most if given is None else given


def judge(ledger: Ledger, budget_bytes: int) -> Fit:
    """Hold a ledger against a budget (the whole card, when idle use is a line of the ledger)."""
    largest_lines = sorted((line for line in ledger.lines if line.low), key=lambda x: -x.low)[:3]
    words = " + ".join(f"{line.name} {line.low / GIB:.2f}" for line in largest_lines)
    need = f"{words} + rest = {ledger.low / GIB:.2f} to {ledger.high / GIB:.2f} GiB"
    if ledger.low > budget_bytes:
        verdict = "does not fit"
    else:
        verdict = "fits" if ledger.high <= budget_bytes else "might fit"
    return Fit(verdict, f"{need}: {verdict} in {budget_bytes / GIB:.2f} GiB")


def check_fits(ledger: Ledger, budget_bytes: int) -> Fit:
    """The verdict; raises DoesNotFit, with the arithmetic, when even the low bound is too much."""
    fit = judge(ledger, budget_bytes)
    if fit.verdict == "does not fit":
        raise DoesNotFit(fit.sentence)
    return fit


def largest(spec_of: Callable[[int], RunSpec], budget_bytes: int, ceiling: int, **known) -> Largest:
    """The largest n up to `ceiling` whose ledger fits; ledgers must grow with n.

    `known` is what `memory` takes beside the spec.
    """

    def most(bound: str) -> int:
        low, high = 0, ceiling + 1  # low fits (nothing always does), high does not
        while high - low > 1:
            middle = (low + high) // 2
            fits = getattr(memory(spec_of(middle), **known), bound) <= budget_bytes
            low, high = (middle, high) if fits else (low, middle)
        return low

    return Largest(most("high"), most("low"))


def largest_batch(spec: RunSpec, budget_bytes: int, ceiling: int = 65536, **known) -> Largest:
    """Rows that fit."""
    return largest(lambda n: replace(spec, rows=n), budget_bytes, ceiling, **known)


def longest_context(spec: RunSpec, budget_bytes: int, **known) -> Largest:
    """Tokens of prompt and answer that fit, up to the model's positions; new tokens as given."""
    new = spec.new_tokens
    ceiling = max(1, spec.shape.max_positions - new)
    found = largest(lambda n: replace(spec, prompt_tokens=n), budget_bytes, ceiling, **known)
    return Largest(*(n and n + new for n in (found.surely, found.at_best)))


def most_processes(spec: RunSpec, budget_bytes: int, ceiling: int = 256, **known) -> Largest:
    """Processes that fit, each with its own model and context."""
    return largest(lambda n: replace(spec, processes=n), budget_bytes, ceiling, **known)


def advise(spec: RunSpec, card: Card) -> list[str]:
    """Does it fit this card, and if not, what would: one sentence each, the verdict first."""
    size, book = int(card.memory_gib * GIB), memory(spec)
    fit = judge(book, size)
    said = [f"{spec.shape.name} on {card.name}: {fit.sentence}."]
    if fit.verdict == "fits":
        return said
    rows, tokens = largest_batch(spec, size), longest_context(spec, size)
    if rows.at_best:
        said.append(f"Batch {rows.surely} surely fits, batch {rows.at_best} at best.")
    if tokens.at_best:
        said.append(
            f"At batch {spec.rows} a context of {tokens.surely} tokens surely fits, "
            f"{tokens.at_best} at best."
        )
    if spec.quantization is None and spec.shape.quantization is None:
        for word in ("bnb-8", "awq"):
            smaller = judge(memory(replace(spec, quantization=word)), size)
            said.append(f"With {word} weights: {smaller.sentence}.")
    known = [cards.card(name) for name in cards.card_names()]
    enough = [c for c in known if c.memory_gib * GIB >= book.high]
    if smallest := min(enough, key=lambda c: c.memory_gib, default=None):
        said.append(f"{smallest.name} ({smallest.memory_gib:g} GiB) surely holds it.")
    return said


@dataclass(frozen=True)
class Knee:
    """Where throughput falls off while memory grows."""

    level: int
    sentence: str


def knee(
    levels: Sequence[int], throughput: Sequence[float], memory_bytes: Sequence[float],
    drop: float = 0.25,
) -> Knee | None:  # fmt: skip
    """The first level whose throughput is `drop` below the best before it though memory grew.

    That is what spilling into system memory looks like where the driver allows it; a plateau is
    not a knee. Raises ValueError for series of unequal length.
    """
    if not len(levels) == len(throughput) == len(memory_bytes):
        raise ValueError("levels, throughput and memory must have one entry each per level")
    best = 0
    for i in range(1, len(levels)):
        grew = memory_bytes[i] > memory_bytes[best]
        if grew and throughput[i] < (1 - drop) * throughput[best]:
            grown = (memory_bytes[i] - memory_bytes[best]) / GIB
            return Knee(
                levels[i],
                f"from level {levels[best]} to {levels[i]} memory grows by {grown:.2f} GiB and "
                f"throughput falls from {throughput[best]:.0f} to {throughput[i]:.0f} tokens/s: "
                "it probably spills into system memory",
            )
        best = i if throughput[i] > throughput[best] else best
    return None

"""What fits a card: refused beforehand, with the arithmetic, and the largest that does fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmperf.models.tensors import ModelShape
from llmperf.predict import cards
from llmperf.predict.cards import GIB, Card
from llmperf.predict.ledger import Ledger, memory

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
    parts = sorted((line for line in ledger.lines if line.low), key=lambda x: -x.low)[:3]
    words = " + ".join(f"{line.name} {line.low / GIB:.2f}" for line in parts)
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


def largest(ledger_of: Callable[[int], Ledger], budget_bytes: int, ceiling: int) -> Largest:
    """The largest n up to `ceiling` whose ledger fits; ledgers must grow with n."""
    return Largest(
        _bisect(lambda n: ledger_of(n).high <= budget_bytes, ceiling),
        _bisect(lambda n: ledger_of(n).low <= budget_bytes, ceiling),
    )


def _bisect(fits: Callable[[int], bool], ceiling: int) -> int:
    low, high = 0, ceiling + 1  # low fits (nothing always does), high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_batch(shape: ModelShape, budget_bytes: int, ceiling: int = 65536, **run) -> Largest:
    """Rows that fit; `run` is what `memory` takes."""
    return largest(lambda n: memory(shape, **{**run, "batch": n}), budget_bytes, ceiling)


def longest_context(shape: ModelShape, budget_bytes: int, **run) -> Largest:
    """Tokens of prompt and answer that fit, up to the model's positions; new tokens as in `run`."""
    new = run.get("new_tokens", 128)
    found = largest(
        lambda n: memory(shape, **{**run, "prompt_tokens": n}),
        budget_bytes,
        max(1, shape.max_positions - new),
    )
    return Largest(*(n and n + new for n in (found.surely, found.at_best)))


def most_processes(shape: ModelShape, budget_bytes: int, ceiling: int = 256, **run) -> Largest:
    """Processes that fit, each with its own model and context."""
    run = {**run, "strategy": "processes"}
    return largest(lambda n: memory(shape, **{**run, "workers": n}), budget_bytes, ceiling)


def advise(shape: ModelShape, card: Card, **run) -> list[str]:
    """Does it fit this card, and if not, what would: one sentence each, the verdict first."""
    size = int(card.memory_gib * GIB)
    fit = judge(memory(shape, **run), size)
    said = [f"{shape.name} on {card.name}: {fit.sentence}."]
    if fit.verdict == "fits":
        return said
    rows = largest_batch(shape, size, **run)
    tokens = longest_context(shape, size, **run)
    if rows.at_best:
        said.append(f"Batch {rows.surely} surely fits, batch {rows.at_best} at best.")
    if tokens.at_best:
        said.append(
            f"At batch {run.get('batch', 1)} a context of {tokens.surely} tokens surely fits, "
            f"{tokens.at_best} at best."
        )
    for word in ("bnb-8", "awq"):
        smaller = judge(memory(shape, **{**run, "quantization": word}), size)
        if run.get("quantization") is None and shape.quantization is None:
            said.append(f"With {word} weights: {smaller.sentence}.")
    return said + _cards_that_hold(memory(shape, **run).high)


def _cards_that_hold(size: int) -> list[str]:
    """The smallest known card that surely holds `size` bytes, if there is one."""
    known = [cards.card(name) for name in cards.names()]
    enough = [c for c in known if c.memory_gib * GIB >= size]
    smallest = min(enough, key=lambda c: c.memory_gib, default=None)
    return [f"{smallest.name} ({smallest.memory_gib:g} GiB) surely holds it."] if smallest else []


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

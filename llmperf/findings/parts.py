"""What every check is made of: the table of checks, and one setting's answer to a claim."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llmperf.findings.evidence import CANNOT_TELL, FAILS, HOLDS, Evidence, Figure, Setting, judge

ALIKE = 0.10  # "alike" and "no difference" mean within a tenth


@dataclass(frozen=True)
class Part:
    """What one setting says of a claim."""

    setting: Setting
    verdict: str
    points_to: str
    text: str
    figure: Figure | None = None


Check = Callable[[Evidence], Iterator[Part]]
CHECKS: dict[str, tuple[Check, str]] = {}  # id → (check, what a run must hold to be testable)


def check(id: str, needed: str):
    """Enter a function into the table, with what it needs."""

    def enter(function: Check) -> Check:
        CHECKS[id] = (function, needed)
        return function

    return enter


def part(s: Setting, figure: Figure | None, text: str, least=None, most=None) -> Iterator[Part]:
    """A part from one figure and the limits of the claim; nothing when there is no figure.

    `text` is a sentence with `{}` where the figure goes.
    """
    if figure is None:
        return
    verdict, points_to = judge(
        figure, float("-inf") if least is None else least, float("inf") if most is None else most
    )
    claimed = " to ".join(f"{x:g}" for x in (least, most) if x is not None)
    word = "" if None not in (least, most) else "at least " if most is None else "at most "
    basis = f"; {figure.basis}" if figure.basis else ""
    text = f"{text.format(figure.span)} (claimed: {word}{claimed}{basis})"
    yield Part(s, verdict, points_to, text, figure)


def both(first: Part | None, second: Part | None, of: Setting) -> Iterator[Part]:
    """One part of two conditions that must hold together."""
    parts = [p for p in (first, second) if p]
    if not parts:
        return
    verdicts, points = {p.verdict for p in parts}, {p.points_to for p in parts}
    missing = len(parts) < 2
    verdict = FAILS if FAILS in verdicts else HOLDS
    verdict = CANNOT_TELL if CANNOT_TELL in verdicts and verdict != FAILS else verdict
    verdict = CANNOT_TELL if missing and verdict == HOLDS else verdict
    text = "; ".join(p.text for p in parts)
    yield Part(of, verdict, FAILS if FAILS in points else HOLDS, text, parts[0].figure)


def only(parts: Iterator[Part]) -> Part | None:
    return next(parts, None)


def top_level(levels: set[int], at_most: int = 10) -> int | None:
    """The published 10 where it was run, else the largest below it; at least 2."""
    return max((n for n in levels if 2 <= n <= at_most), default=None)


def at_the_top(
    settings: Sequence[Setting], levels_of: Callable[[Setting], set[int]]
) -> Iterator[tuple[Setting, int]]:
    """Settings with their top level, only those that go highest: the claim is of ten, not two."""
    tops = [(s, top_level(levels_of(s))) for s in settings]
    highest = max((n for _, n in tops if n), default=None)
    yield from ((s, n) for s, n in tops if n is not None and n == highest)

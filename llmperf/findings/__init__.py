"""The published findings judged by records: holds, does not hold, cannot tell, not testable here.

`judge_all(records)` takes any records (this machine's, those of several, the published rows) and
gives one verdict a finding, each with its figures or with what would be needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llmperf.findings import platforms, space, speed  # noqa: F401  they fill the table of checks
from llmperf.findings.evidence import (
    CANNOT_TELL,
    FAILS,
    HOLDS,
    NOT_TESTABLE,
    Evidence,
    gather,
    unstable,
)
from llmperf.findings.parts import CHECKS, Part
from llmperf.findings.published_rows import published_records

__all__ = [
    "CANNOT_TELL",
    "FAILS",
    "HOLDS",
    "NOT_TESTABLE",
    "Finding",
    "Verdict",
    "findings",
    "judge_all",
    "published_records",
    "published_verdicts",
    "scorecard",
]

FILE = Path(__file__).resolve().parents[2] / "data" / "reference" / "findings.yaml"


@dataclass(frozen=True)
class Finding:
    """One conclusion of the publication: its words, its figure, and the test it is put to."""

    id: str
    claim: str
    figure: str
    test: str


@dataclass(frozen=True)
class Verdict:
    """What records say of a finding. `points_to` is the side of the bare value, without spread."""

    id: str
    claim: str
    verdict: str
    figures: str  # never empty: figures, or why there are none
    points_to: str | None = None
    needed: str | None = None  # what would make it testable, or would settle it
    value: float | None = None
    low: float | None = None
    high: float | None = None
    settings: tuple[str, ...] = ()  # machines, models and lengths that it rests on
    warnings: tuple[str, ...] = ()  # instability, and impossible runs that were left out

    def __str__(self) -> str:
        word = self.verdict
        if self.verdict == CANNOT_TELL and self.points_to:
            word += f" (the value alone: {self.points_to})"
        return "; ".join((f"{word}: {self.figures}", *self.warnings))


@cache
def findings() -> tuple[Finding, ...]:
    """The seventeen, in the order of the publication."""
    import yaml

    return tuple(Finding(**row) for row in yaml.safe_load(FILE.read_text(encoding="utf-8")))


def judge_all(records: Iterable) -> list[Verdict]:
    """One verdict a finding over these records (Record or dict), in the publication's order."""
    records = list(records)
    evidence = [gather(records), gather(records, across=True)]
    evidence.append(gather(records, across=True, impossible_too=True))
    return [_judge(finding, evidence) for finding in findings()]


def published_verdicts() -> list[Verdict]:
    """The findings judged by the publication's own rows."""
    return judge_all(published_records())


def scorecard(records: Iterable):
    """The findings as a DataFrame: claim, verdict here, figures, and what the published rows say.

    Index is the finding's id; there is no empty cell.
    """
    import pandas as pd

    rows = [
        {
            "finding": here.id,
            "claim": here.claim,
            "here": here.verdict,
            "figures": _cell(here),
            "published rows": _word(there),
        }
        for here, there in zip(judge_all(records), published_verdicts(), strict=True)
    ]
    return pd.DataFrame(rows).set_index("finding")


def _cell(v: Verdict) -> str:
    return ". ".join(x for x in (v.figures, *v.warnings, v.needed and f"To do: {v.needed}") if x)


def _word(v: Verdict) -> str:
    if v.verdict == CANNOT_TELL:
        return f"single runs; the value alone: {v.points_to}"
    return v.verdict


def _judge(finding: Finding, evidence: Sequence[Evidence]) -> Verdict:
    """By what one experiment holds, else by what several hold together."""
    function, needed = CHECKS[finding.id]
    *possible, everything = evidence
    for source in possible:
        if parts := list(function(source)):
            return _verdict(finding, parts, source, needed)
    why = f"these records cannot test it: {needed}"
    if list(function(everything)):
        why = f"the runs that would test it are faster than their machine can be: {needed} again"
    return Verdict(finding.id, finding.claim, NOT_TESTABLE, why, needed=needed)


def _verdict(finding: Finding, parts: list[Part], source: Evidence, needed: str) -> Verdict:
    verdict, points_to = _joined(parts)
    deciding = [p for p in parts if (p.verdict, p.points_to) == (verdict, points_to)]
    ordered = deciding + [p for p in parts if p not in deciding]
    first = ordered[0].figure
    settings = [p.setting for p in parts]
    noticed = (unstable(settings),) if unstable(settings) else ()
    return Verdict(
        finding.id,
        finding.claim,
        verdict,
        _text(ordered),
        points_to,
        f"{needed}, with 5 repeats or more" if verdict == CANNOT_TELL else None,
        *((first.value, first.low, first.high) if first else (None, None, None)),
        tuple(s.name for s in settings),
        noticed + _left_out(sum(source.impossible.get(s.key, 0) for s in settings)),
    )


def _joined(parts: list[Part]) -> tuple[str, str]:
    """One clear counterexample refutes a claim; an unclear setting does not weaken a clear one."""
    verdicts, points = {p.verdict for p in parts}, {p.points_to for p in parts}
    joined = next((v for v in (FAILS, HOLDS) if v in verdicts), CANNOT_TELL)
    return joined, FAILS if FAILS in points else HOLDS


def _text(parts: list[Part]) -> str:
    """The figures of the setting that decides first, then how the others answered."""
    first, *others = parts
    text = f"{first.text} ({first.setting.name})"
    for p in others[:2]:
        word = p.verdict if p.verdict != CANNOT_TELL else f"{p.verdict} (the value: {p.points_to})"
        text += f". Elsewhere {word}: {p.text} ({p.setting.name})"
    return text + (f". And {len(others) - 2} more settings" if len(others) > 2 else "")


def _left_out(impossible: int) -> tuple[str, ...]:
    if not impossible:
        return ()
    return (f"{impossible} runs left out: faster than their machine can be",)

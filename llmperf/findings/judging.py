"""The published claims, each judged at its own level, platform, device and length."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import pandas as pd
import yaml

from llmperf import REFERENCE
from llmperf.findings.checks import CANNOT_TELL, FAILS, HOLDS, SHAPES, Checked, Row
from llmperf.findings.published import published_records
from llmperf.measure import Record, frame
from llmperf.measure.records import PLACE, WORK

NOT_TESTABLE = "not testable here"
LIKE_CLAIM = {HOLDS: "as claimed", FAILS: "unlike the claim", CANNOT_TELL: CANNOT_TELL}


@dataclass(frozen=True)
class Claim:
    """One row of `findings.yaml`: a conclusion of the publication and how it is tested."""

    id: str
    claim: str
    figure: str  # as printed
    needs: str
    checks: Sequence[Mapping]
    level: int | None = None
    platforms: Sequence[str] = ()  # empty: any
    tokens: int | None = None
    device: str = "cuda"
    arriving: bool = False  # requests that arrive over time

    @property
    def at(self) -> str:
        """Where it stands: `Windows, a CUDA GPU, 10 at once, 256 tokens`."""
        where = [" and ".join(self.platforms), "a CUDA GPU" * (self.device == "cuda")]
        size = [f"{self.level} at once" * ((self.level or 1) > 1), f"{self.tokens} tokens"]
        return ", ".join(x for x in (*where, *(size if self.tokens else size[:1])) if x)


@dataclass(frozen=True)
class Part(Checked):
    """What one setting says of a claim, at level n."""

    setting: str
    n: int


@dataclass(frozen=True)
class Verdict:
    """What records say of a claim. `points_to` is the side of the bare value, without spread."""

    id: str
    claim: str
    at: str
    verdict: str
    figures: str  # never empty: figures, or what would make it testable
    here: str  # the same mechanism on this machine; never counts as the claim
    points_to: str | None = None

    @property
    def word(self) -> str:
        """The verdict; where it cannot be told, with the side of the bare value."""
        side = f" (the value alone: {self.points_to})" * (self.verdict == CANNOT_TELL)
        return self.verdict + side

    def __str__(self) -> str:
        here = f"; here: {self.here}" * (self.verdict not in (HOLDS, FAILS))
        return f"{self.word}: {self.figures}{here}"


@cache
def claims() -> tuple[Claim, ...]:
    """The seventeen, in the order of the publication."""
    text = (REFERENCE / "findings.yaml").read_text(encoding="utf-8")
    return tuple(Claim(**row) for row in yaml.safe_load(text)["claims"])


def judge_all(records: Iterable[Record], of: Sequence[Claim] = ()) -> list[Verdict]:
    """One verdict a claim (default: the published ones) over records of one machine or several."""
    kinds, states = ("measure", "failed", "watched"), ("ok", "oom")
    wanted = [r for r in records if r.kind in kinds and r.status in states and r.possible]
    rows = []
    for row, r in zip(frame(wanted).to_dict("records"), wanted, strict=True):
        card = (r.environment.get("gpus") or [{}])[0]
        row["card_bytes"] = card.get("memory_total_bytes")
        row["card_used_bytes"] = card.get("memory_used_bytes")
        ran = r.notes.get("loop")  # not always the one asked for
        row["loop"] = ran if isinstance(ran, str) else row.get("loop")
        if not row["foreign"]:
            rows.append({k: v for k, v in row.items() if v is not None and v == v})
    return [_judge(claim, rows) for claim in of or claims()]


@cache
def published_verdicts() -> list[Verdict]:
    """The claims judged by the publication's own rows."""
    return judge_all(published_records())


def scorecard(records: Iterable[Record]) -> pd.DataFrame:
    """The claims as a table: claim, where it stands, verdict, figures, what this machine shows, and
    what the published rows say. Index is the claim's id; there is no empty cell."""
    card = pd.DataFrame(map(vars, judge_all(records))).set_index("id").rename_axis("finding")
    card = card[["claim", "at", "verdict", "figures", "here"]]
    return card.assign(**{"published rows": [v.word for v in published_verdicts()]})


def _judge(claim: Claim, rows: Sequence[Row]) -> Verdict:
    strict, here = _by_setting(claim, rows, True), _by_setting(claim, rows, False)
    top = max((p.n for p in here), default=0)  # the claim is of ten: what ran highest says most
    shown = [f"{LIKE_CLAIM[p.verdict]}: {p.text} ({p.setting})" for p in here if p.n == top]
    seen = ". ".join(shown[:2]) or "nothing was measured of it"
    known = (claim.id, claim.claim, claim.at)
    if not strict:
        why = f"needs {claim.at}: {claim.needs}"
        return Verdict(*known, NOT_TESTABLE, why, seen)
    verdict, points_to = decided = _joined(strict)
    first, *others = sorted(strict, key=lambda p: (p.verdict, p.points_to) != decided)
    said = [f"{first.text} ({first.setting})"]
    said += [f"Elsewhere {p.verdict}: {p.text} ({p.setting})" for p in others[:2]]
    said += [f"And {len(others) - 2} more settings"] * (len(others) > 2)
    return Verdict(*known, verdict, ". ".join(said), seen, points_to)


def _by_setting(claim: Claim, rows: Sequence[Row], strict: bool) -> list[Part]:
    """One Part per setting and experiment; if there is none, per setting over all experiments.
    `strict`: only rows on the claim's device and platforms, with its number of new tokens."""
    rows = [
        r
        for r in rows
        if claim.arriving == ("arrivals" in r)
        and (not strict or r.get("device") == claim.device)
        and (not strict or not claim.platforms or r["os"] in claim.platforms)
        and (not strict or claim.tokens in (None, r.get("new_tokens")))
    ]
    across = len(claim.platforms) > 1  # a claim that compares platforms
    columns = [name for name in (*WORK, *PLACE) if name != "os" or not across]
    for by in (["experiment", *columns], columns):
        groups: dict[tuple, list[Row]] = {}
        for r in rows:
            groups.setdefault(tuple(r.get(name) for name in by), []).append(r)
        if found := [p for group in groups.values() if (p := _part(claim, group, strict))]:
            return found
    return []


def _part(claim: Claim, rows: Sequence[Row], strict: bool) -> Part | None:
    """All checks of a claim over one setting, at the claim's level; if not `strict`, at the highest
    measured one up to it."""
    levels = {r["level"] for r in rows}
    if not claim.level:
        levels |= {1}
    elif strict:
        levels &= {claim.level}
    else:  # a single request shows nothing of a claim about several
        levels = {n for n in levels if min(2, claim.level) <= n <= claim.level}
    for n in sorted(levels, reverse=True):
        found = [SHAPES[check["check"]](rows, check, n, strict) for check in claim.checks]
        if all(found):
            text = "; ".join(x.text for x in found)
            return Part(*_joined(found), text, f"{rows[0]['setting']}, level {n}", n)
    return None


def _joined(found: Sequence[Checked]) -> tuple[str, str]:
    """(verdict, points_to) of all checks: one FAILS decides, then one CANNOT_TELL, else HOLDS."""
    verdicts, points = {x.verdict for x in found}, {x.points_to for x in found}
    verdict = next((v for v in (FAILS, CANNOT_TELL) if v in verdicts), HOLDS)
    return verdict, FAILS if FAILS in points else HOLDS

"""The answer of a study in five lines, every number from its records; and as a card to share."""

from __future__ import annotations

import html
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from llmperf import findings
from llmperf.measure import Record
from llmperf.strategies import STRATEGIES

OTHERS = "unstable: other"  # how `machine.busy` begins in a record
SAME = ("model", "dtype", "quantization", "device")
LOAD_PER_S = 1.0  # requests a second that the recommendation is for
CARD_PX = (1200, 630)
CARD_STYLE = (
    "margin:0;width:1200px;height:630px;box-sizing:border-box;padding:48px 60px;color:#1b1f24;"
    "background:#fff;font:26px/1.4 system-ui,sans-serif;border:1px solid #d0d7de;overflow:hidden"
)


@dataclass(frozen=True)
class Answer:
    """`lines`: ceilings, one request, the best strategy, what to run, the scorecard."""

    lines: tuple[str, ...]
    machine: str


def load(folder: Path | str) -> tuple[Record, ...]:
    """The records of a run's folder. Raises ValueError when it has none."""
    return findings.load_runs([Path(folder) / "records.jsonl"])[0].records


def of_run(folder: Path | str) -> Answer:
    """The answer from the records of a run's folder. Raises ValueError when it has none."""
    (run,) = findings.load_runs([Path(folder) / "records.jsonl"])
    counted = [r for r in run.records if r.kind == "measure" and r.status == "ok"]
    if not counted:
        raise ValueError("no run ended ok")
    best = _fastest(counted)
    one = _fastest_alone(counted, best[0].condition)
    lines = (_ceilings(one), _alone(one), _best(best, counted), _run(counted), _score(run.records))
    return Answer(lines, run.caption)


def of_notebook(folder: Path, stem: str) -> str:
    """What the records of one notebook say. Raises ValueError when it has none."""
    rows = [r for r in load(folder) if stem.startswith(r.experiment) and r.kind == "measure"]
    timed = [r for r in rows if r.metrics.get("output_tokens_per_s")]
    return findings.headline(timed) if timed else ""


def _speed(records: Sequence[Record]) -> float:
    return median(r.metrics.get("output_tokens_per_s") or 0 for r in records)


def _groups(records: Sequence[Record]) -> list[list[Record]]:
    groups: dict[str, list[Record]] = {}
    for r in records:
        groups.setdefault(str(sorted(r.condition.items(), key=str)), []).append(r)
    return list(groups.values())


def _fastest(records: Sequence[Record]) -> list[Record]:
    """The runs of the condition with the most tokens/s; another engine is no strategy."""
    own = [r for r in records if not STRATEGIES[r.condition["strategy"]].foreign]
    return max(_groups(own or records), key=_speed)


def _fastest_alone(records: Sequence[Record], best: Mapping) -> list[Record]:
    """The runs of one request at a time, of the model and dtype of the best, with most tokens/s."""
    alike = [r for r in records if all(r.condition.get(k) == best.get(k) for k in SAME)]
    alone = [r for r in alike if r.condition["strategy"] == "sequential"]
    least = min(r.condition["level"] for r in alike)
    return _fastest(alone or [r for r in alike if r.condition["level"] == least])


def _ceilings(runs: Sequence[Record]) -> str:
    found, dtype = runs[0].prediction, runs[0].condition.get("dtype")
    if not found.get("read_bytes_per_s"):
        return "This machine's ceilings are not in these records."
    text = f"This machine reads {found['read_bytes_per_s'] / 1e9:.3g} GB/s"
    if found.get("flops_per_s"):
        text += f" and computes {found['flops_per_s'] / 1e12:.2g} TFLOP/s in {dtype}"
    return f"{text}."


def _alone(runs: Sequence[Record]) -> str:
    c, found = runs[0].condition, runs[0].prediction
    how = f"{c.get('model')} in {c.get('quantization') or c.get('dtype')}, {c.get('loop')}"
    text = f"One request gets {_speed(runs):.3g} tokens/s ({how})"
    if found.get("bound_tpot_ms"):
        text += f" of at most {1e3 / found['bound_tpot_ms']:.3g}; its limit is {found['limit']}"
    return f"{text}."


def _best(runs: Sequence[Record], records: Sequence[Record]) -> str:
    c = runs[0].condition
    known, how = STRATEGIES[c["strategy"]], (c["level"], c.get("options") or {})
    counts = (known.rows_per_step(*how), known.processes(*how), known.threads(*how))
    why = next(
        (f", because {text.format(n)}" for text, n in zip(BECAUSE, counts, strict=True) if n > 1),
        "",
    )
    return findings.headline(records).rstrip(".") + f"{why}."


BECAUSE = (  # by what grows with the strategy
    "one pass over the weights serves {} requests",
    "{} processes compute at the same time",
    "{} threads compute at the same time",
)


def _run(records: Sequence[Record]) -> str:
    try:
        found = str(findings.recommend(records, LOAD_PER_S)).splitlines()[0]
    except ValueError as error:
        return f"What to run: {error}."
    return f"At {LOAD_PER_S:g} request/s: {found}"


def _score(records: Sequence[Record]) -> str:
    count = Counter(v.verdict for v in findings.judge_all(records))
    said = ", ".join(f"{n} {word}" for word, n in count.most_common())
    return f"Of {sum(count.values())} published findings here: {said}."


def not_ok(records: Sequence[Record]) -> str | None:
    """A line that counts the records that are not ok, or None. A failure that was measured again
    with success does not count, and neither does a run that was refused beforehand."""
    good = {(r.experiment, str(r.condition), r.repeat) for r in records if r.status == "ok"}
    bad = [
        r
        for r in records
        if r.status in ("error", "oom") and (r.experiment, str(r.condition), r.repeat) not in good
    ]
    if not bad:
        return None
    kinds = ", ".join(f"{n} {word}" for word, n in Counter(r.status for r in bad).items())
    return (
        f"{len(bad)} records are not ok ({kinds}); the first: {bad[0].experiment}: {bad[0].reason}"
    )


def unfit(records: Sequence[Record]) -> str | None:
    """Why this run cannot become a reference: another program was busy; None when none was."""
    counted = [r for r in records if r.kind == "measure"]
    busy = [w for r in counted for w in r.warnings if w.startswith(OTHERS)]
    if not busy:
        return None
    return f"Not fit as a reference, {len(busy)} of {len(counted)} runs: {busy[0]}"


def measured_share(records: Sequence[Record], seconds: float) -> str:
    """How much of the study's time was runs that count."""
    took = sum(r.metrics.get("duration_s") or 0 for r in records if r.kind == "measure")
    return f"Measured runs took {took:.0f} of {seconds:.0f} s ({took / max(seconds, 1e-9):.0%})."


def write_card(folder: Path | str, found: Answer) -> tuple[Path, Path]:
    """`card.png` and `card.html`, 1200 x 630 pixels, in a run's folder."""
    from matplotlib.figure import Figure

    folder = Path(folder)
    fig = Figure(figsize=(CARD_PX[0] / 100, CARD_PX[1] / 100), dpi=100, facecolor="white")
    y = 0.92
    for size, columns, text in _card_text(found):
        lines = textwrap.wrap(text, columns)
        fig.text(0.05, y, "\n".join(lines), fontsize=size, va="top", color="#1b1f24", wrap=False,
                 linespacing=1.35)  # fmt: skip
        y -= (len(lines) * size * 1.5 + 12) / (CARD_PX[1] * 0.72)
    fig.savefig(folder / "card.png")
    body = "".join(
        f"<p style='font-size:{size * 1.38:.0f}px;margin:0 0 14px'>{html.escape(text)}</p>"
        for size, _, text in _card_text(found)
    )
    page = f"<!doctype html><meta charset='utf-8'><title>llmperf</title><body style='{CARD_STYLE}'>"
    (folder / "card.html").write_text(page + body + "</body>", encoding="utf-8")
    return folder / "card.png", folder / "card.html"


def _card_text(found: Answer) -> list[tuple[int, int, str]]:
    """Size in points, characters a line, and text, from top to bottom."""
    ceilings, alone, best, run, score = found.lines
    large = [(22, 66, text) for text in (ceilings, alone, best)]
    return [*large, (15, 98, run), (15, 98, score), (12, 120, f"llmperf on {found.machine}")]

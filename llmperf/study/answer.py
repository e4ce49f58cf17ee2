"""The answer of a study in five lines, every number from its records; and as a card to share."""

from __future__ import annotations

import html
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from llmperf import findings
from llmperf.findings import Run
from llmperf.measure import Record
from llmperf.strategies import STRATEGIES

SAME = ("model", "dtype", "quantization", "device")
LOAD_PER_S = 1.0  # requests a second that the recommendation is for
CARD_STYLE = (
    "margin:0;width:1200px;height:630px;box-sizing:border-box;padding:48px 60px;overflow:hidden;"
    "font:26px/1.4 sans-serif"
)
BECAUSE = (  # by what grows with a strategy: rows of a step, processes, threads
    "one pass over the weights serves {} requests",
    "{} processes compute at the same time",
    "{} threads compute at the same time",
)


@dataclass(frozen=True)
class Answer:
    """`lines`: ceilings, one request, the best strategy, what to run, the scorecard."""

    lines: tuple[str, ...]
    run: Run


def load(folder: Path | str) -> Run:
    """The run in a study's folder. Raises ValueError when it has no records."""
    return findings.load_runs([Path(folder) / "records.jsonl"])[0]


def of_run(folder: Path | str) -> Answer:
    """The answer from the records of a study's folder. Raises ValueError when it has none."""
    run = load(folder)
    counted = [r for r in run.records if _speed([r])]
    if not counted:
        raise ValueError("no run ended ok")
    best = _fastest(counted)
    alike = [
        r for r in counted if all(r.condition.get(k) == best[0].condition.get(k) for k in SAME)
    ]
    alone = [r for r in alike if max(_at_once(r.condition)) == 1]
    least = min(r.condition["level"] for r in alike)
    single = _fastest(alone or [r for r in alike if r.condition["level"] == least])
    count = Counter(v.verdict for v in findings.judge_all(run.records))
    what = str(findings.recommend(counted, LOAD_PER_S)).splitlines()[0]
    lines = (
        _ceilings(single[0].prediction, single[0].condition),
        _alone(single),
        findings.headline(counted).rstrip(".") + _why(best[0].condition) + ".",
        f"At {LOAD_PER_S:g} request/s: {what[:1].lower()}{what[1:]}",
        f"Of {sum(count.values())} published findings here:"
        f" {', '.join(f'{n} {word}' for word, n in count.most_common())}.",
    )
    return Answer(lines, run)


def of_notebook(run: Run, stem: str) -> str:
    """What the records of one notebook say; empty when it has none."""
    rows = [r for r in run.records if stem.startswith(r.experiment) and _speed([r])]
    return findings.headline(rows) if rows else ""


def _speed(records: Sequence[Record]) -> float:
    """Median tokens/s; 0 for records that do not count."""
    ok = [r for r in records if (r.kind, r.status) == ("measure", "ok")]
    return median([r.metrics.get("output_tokens_per_s") or 0 for r in ok] or [0])


def _fastest(records: Sequence[Record]) -> list[Record]:
    """The runs of the condition with the most tokens/s; another engine is no strategy."""
    groups = defaultdict(list)
    for r in records:
        foreign = STRATEGIES[r.condition["strategy"]].foreign
        groups[foreign, str(sorted(r.condition.items(), key=str))].append(r)
    ours = [rows for (foreign, _), rows in groups.items() if not foreign]
    return max(ours or groups.values(), key=_speed)


def _ceilings(found: Mapping, condition: Mapping) -> str:
    if not found.get("read_bytes_per_s"):
        return "This machine's ceilings are not in these records."
    text = f"This machine reads {found['read_bytes_per_s'] / 1e9:.3g} GB/s"
    flops, dtype = found.get("flops_per_s"), condition.get("dtype")
    return text + (f" and computes {flops / 1e12:.2g} TFLOP/s in {dtype}." if flops else ".")


def _alone(runs: Sequence[Record]) -> str:
    c, found = runs[0].condition, runs[0].prediction
    how = f"{c.get('model')} in {c.get('quantization') or c.get('dtype')}, {c.get('loop')}"
    text = f"One request gets {_speed(runs):.3g} tokens/s ({how})"
    if not found.get("bound_tpot_ms"):
        return f"{text}."
    return f"{text} of at most {1e3 / found['bound_tpot_ms']:.3g}; its limit is {found['limit']}."


def _at_once(condition: Mapping) -> tuple[int, int, int]:
    """Rows of a step, processes and threads of a condition."""
    known = STRATEGIES[condition["strategy"]]
    how = (condition["level"], condition.get("options") or {})
    return known.rows_per_step(*how), known.processes(*how), known.threads(*how)


def _why(condition: Mapping) -> str:
    """What the strategy does more of at the same time; nothing for one request at a time."""
    counts = zip(BECAUSE, _at_once(condition), strict=True)
    texts = [text.format(n) for text, n in counts if n > 1]
    return f", because {texts[0]}" if texts else ""


def not_ok(records: Sequence[Record]) -> str | None:
    """A line that counts the records that are not ok, or None. A failure that was measured again
    with success does not count, and neither does a run that was refused beforehand."""
    good = {(r.experiment, str(r.condition), r.repeat) for r in records if r.status == "ok"}
    failed = [r for r in records if r.status in ("error", "oom")]
    bad = [r for r in failed if (r.experiment, str(r.condition), r.repeat) not in good]
    if not bad:
        return None
    kinds = ", ".join(f"{n} {word}" for word, n in Counter(r.status for r in bad).items())
    first = f"{bad[0].experiment}: {bad[0].reason}"
    return f"{len(bad)} records are not ok ({kinds}); the first: {first}"


def write_card(folder: Path | str, found: Answer) -> tuple[Path, Path]:
    """`card.png` and `card.html`, 1200 x 630 pixels, in a study's folder."""
    png, page = Path(folder) / "card.png", Path(folder) / "card.html"
    fig, y = Figure(figsize=(12, 6.3), dpi=100, facecolor="white"), 0.92
    paragraphs = ""
    texts = (*found.lines, f"llmperf on {found.run.caption}")
    for points, text in zip((22, 22, 22, 15, 15, 12), texts, strict=True):
        lines = textwrap.wrap(text, 1450 // points)
        fig.text(0.05, y, "\n".join(lines), fontsize=points, va="top", linespacing=1.35)
        y -= (len(lines) * points * 1.5 + 12) / 450
        paragraphs += f"<p style='font-size:{points * 1.38:.0f}px'>{html.escape(text)}</p>"
    fig.savefig(png)
    head = f"<!doctype html><meta charset='utf-8'><title>llmperf</title><body style='{CARD_STYLE}'>"
    page.write_text(f"{head}{paragraphs}</body>", encoding="utf-8")
    return png, page

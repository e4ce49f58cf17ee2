"""The answer of a study in six lines, every number from its records; and as a card to share."""

import base64
import html
import io
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.image import imread

from llmperf import findings, models, predict
from llmperf.findings import Run
from llmperf.machine import GIB, significant
from llmperf.measure import Record
from llmperf.show import plots, side_by_side

LOAD_PER_S, ANSWER_TOKENS = 1.0, 64  # what the recommendation is for, as in notebook 11
MEMORY = "07-vram"  # the notebook that measures it: its process holds one model
LARGER = "llama-3.1-8b", "bf16", "int4"  # a model that many ask for; its speed is arithmetic
BUSY_SHARE = 0.2  # the answer warns if other programs ran beside at least this share of the runs
CARD_TEXT = 0.93  # of the card's height, for the lines
CARD_STYLE = (
    "margin:0;width:1200px;height:630px;box-sizing:border-box;padding:48px 60px;overflow:hidden;"
    "font:16px/1.35 sans-serif"
)


def load(folder: Path | str) -> Run:
    """The run in a study's folder, also a packed one. Raises ValueError when it has no records."""
    return findings.load_runs([folder])[0]


def of_run(run: Run) -> tuple[str, ...]:
    """The answer in six lines: ceilings, one request, the best strategy, memory, what to run,
    scorecard.

    Raises ValueError when no record counts.
    """
    table = findings.options(run.records)
    if table.empty:
        raise ValueError("no run ended ok")
    best = table.loc[table.output_tokens_per_s.idxmax()]
    alone = findings.one_at_a_time(table, best)
    verdicts = findings.judge_all(run.records)
    judged = _tally(v.verdict for v in verdicts)
    scored = f"Of {len(verdicts)} published findings here: {judged}."
    untested = (v.here for v in verdicts if v.verdict == findings.NOT_TESTABLE and ":" in v.here)
    if seen := _tally(here.partition(":")[0] for here in untested):
        scored += f" What this machine shows of them, at smaller levels or without a GPU: {seen}."
    what = str(findings.recommend(table, LOAD_PER_S, new_tokens=ANSWER_TOKENS)).splitlines()[0]
    option = best if alone is None else alone
    return (
        _ceilings(option) + _others(run.records),
        "One request alone was not measured here." if alone is None else _single(alone),
        findings.headline(table).rstrip(".") + _why(best, alone) + ".",
        _memory(run.records) + _larger(option),
        f"At {LOAD_PER_S:g} request/s: {what[:1].lower()}{what[1:]}",
        scored,
    )


def _tally(words: Iterable[str]) -> str:
    """`11 not testable here, 4 as claimed`."""
    return ", ".join(f"{n} {word}" for word, n in Counter(words).most_common())


def of_notebook(run: Run, stem: str) -> str:
    """What the records of one notebook say; empty when it has none."""
    rows = [r for r in run.records if stem.startswith(r.experiment) and r.counts]
    if rows and stem == MEMORY:
        return _memory(rows)
    return findings.headline(findings.options(rows)) if rows else ""


def _ceilings(option: pd.Series) -> str:
    """What the machine can do."""
    if pd.isna(option.read_bytes_per_s):
        return "This machine's ceilings are not in these records."
    text = f"This machine reads {significant(option.read_bytes_per_s / 1e9)} GB/s"
    if pd.notna(option.flops_per_s):
        tera = significant(option.flops_per_s / 1e12, 2)
        text += f" and computes {tera} TFLOP/s in {option['dtype']}"
    return f"{text}."


def _others(records: Sequence[Record]) -> str:
    """A warning where other programs ran beside many of the runs."""
    runs = [r for r in records if r.counts]
    busy = [w for r in runs for w in r.warnings if w.startswith("unstable: ")]
    if len(busy) < BUSY_SHARE * len(runs):
        return ""
    seen = sorted(busy)[len(busy) // 2].partition(": ")[2]
    return f" Other programs ran at the same time ({seen}): measure again before you use this."


def _single(alone: pd.Series) -> str:
    """What one request gets, and what bounds it."""
    how = f"{findings.public_model(str(alone.model))} in {alone.precision}, {alone.loop}"
    text = f"One request gets {significant(alone.output_tokens_per_s)} tokens/s ({how})"
    if alone.tpot_ms > 0:
        text += f"; after its first token {significant(1e3 / alone.tpot_ms)}"
        limit = "arithmetic" if alone.limit == "arithmetic" else "bandwidth"  # not launches, Python
        if alone.tpot_ms < alone.bound_tpot_ms:
            text += f", more than the {significant(1e3 / alone.bound_tpot_ms)} that {limit} allowed"
            text += " as the runs began: the speed of this machine changes"
        elif pd.notna(alone.bound_tpot_ms):
            text += f", {alone.bound_tpot_ms / alone.tpot_ms:.0%} of the"
            text += f" {significant(1e3 / alone.bound_tpot_ms)} that {limit} allows"
    return f"{text}."


def _why(best: pd.Series, alone: pd.Series | None) -> str:
    """What the option does more of at the same time; nothing for one request at a time."""
    if best["rows"] > 1:
        text = f", because one pass over the weights serves {best['rows']} requests"
        if alone is not None and best.tpot_ms > 0 and alone.tpot_ms > 0:
            text += f" and takes {best.tpot_ms / alone.tpot_ms:.1f} times as long as for one"
        return text
    if best.servers > 1:
        return f", because {best.servers} requests are computed at the same time"
    return ""


def _memory(records: Sequence[Record]) -> str:
    """What one request takes, and the most together."""
    runs = [r for r in records if r.counts and r.experiment == MEMORY]
    rows = findings.options(runs)
    if rows.empty or rows.memory_gib.isna().any():
        return "Memory was not measured here: notebook 07 does."
    rows = rows.sort_values("level")
    one, most = rows.iloc[0], rows.iloc[-1]
    takes = ["one request" if n == 1 else f"{n} together" for n in (one.level, most.level)]
    text = f"Memory in {one.precision}: {takes[0]} {one.memory_gib:.2f} GiB"
    if held := runs[0].prediction.get("weights_bytes"):
        text += f" ({held / GIB:.2f} of it weights)"
    if most.level > one.level:
        text += f", {takes[1]} {most.memory_gib:.2f}"
    return f"{text}."


def _larger(option: pd.Series) -> str:
    """The arithmetic for a larger model, at the bandwidth of this machine."""
    if pd.isna(option.read_bytes_per_s):
        return ""
    name, *how = LARGER
    spec = predict.RunSpec(models.shape_of(name), *how)
    step = predict.decode_bound(spec, ANSWER_TOKENS, option.read_bytes_per_s)
    held = predict.weights_bytes(spec.shape, *how) / GIB
    text = f" By arithmetic the weights of {name} in {how[1]} take {held:.1f} GiB"
    return f"{text}, and one request would get at most {significant(1 / step.seconds, 2)} tokens/s."


def failures(records: Sequence[Record]) -> list[Record]:
    """The records with status error or oom: a resume measures these runs again."""
    return [r for r in records if r.status in ("error", "oom")]


def write_card(folder: Path | str, run: Run, answer: Sequence[str]) -> tuple[Path, Path]:
    """`card.png` and `card.html`, 1200 x 630 pixels, in a study's folder: the lines of the answer,
    and the tokens/s of every strategy as a plot."""
    png, page = Path(folder) / "card.png", Path(folder) / "card.html"
    fig, y, plot = Figure(figsize=(12, 6.3), dpi=100, facecolor="white"), 0.94, _plot(run)
    if plot:
        fig.figimage(imread(io.BytesIO(plot)), 740, 170)
    paragraphs = image(plot, "Tokens/s of every strategy", "float:right;margin-left:30px")
    where = f"llmperf on {run.caption}"
    plain = {"va": "top", "parse_math": False}  # names from strangers may hold a $
    fig.text(0.63, 0.2, textwrap.fill(where, 60), fontsize=10, color=plots.GREY, **plain)
    for points, text, lines, height in _fitted(answer):
        fig.text(0.04, y, "\n".join(lines), fontsize=points, linespacing=1.35, **plain)
        y -= height
        paragraphs += f"<p style='font-size:{points * 1.38:.0f}px'>{html.escape(text)}</p>"
    fig.savefig(png)
    paragraphs += f"<p>{html.escape(where)}</p>"
    head = f"<!doctype html><meta charset='utf-8'><title>llmperf</title><body style='{CARD_STYLE}'>"
    page.write_text(f"{head}{paragraphs}</body>", encoding="utf-8")
    return png, page


def _fitted(texts: Sequence[str]) -> list[tuple[float, str, list[str], float]]:
    """Of each text its points, itself, its lines and its share of the card's height: the largest
    letters with which all of them fit."""
    for scale in (1.0, 0.9, 0.8, 0.7, 0.6):
        found = []
        for text, points in zip(texts, (17, 17, 17, 12, 12, 12), strict=True):
            lines = textwrap.wrap(text, int(870 / (scale * points)))
            height = (len(lines) * scale * points * 1.5 + 12) / 450
            found.append((scale * points, text, lines, height))
        if sum(height for *_, height in found) <= CARD_TEXT:
            break
    return found


def _plot(run: Run) -> bytes:
    """A PNG of 430 x 390 pixels; empty when no runs can be compared."""
    rows, drawn = side_by_side.comparable_rows(run.records), io.BytesIO()
    if not len(rows):
        return b""
    fig = Figure(figsize=(4.3, 3.9), dpi=100, layout="constrained")
    ax = fig.add_subplot()
    side_by_side.strategy_curves(ax, rows, *side_by_side.PANELS[0])
    model = f"{rows.work.iloc[0].partition(',')[0]}, {rows.loop.iloc[0]}"
    ax.set_title(f"All strategies in {model}", fontsize=10, parse_math=False)
    ax.legend(frameon=False, fontsize=8)
    fig.savefig(drawn)
    return drawn.getvalue()


def image(png: bytes, alt: str, style: str = "") -> str:
    """An image inside a page; nothing for none."""
    data = base64.b64encode(png).decode()
    source = f'alt="{html.escape(alt)}" style="{style}" src="data:image/png;base64,{data}"'
    return f"<img {source}>" if png else ""

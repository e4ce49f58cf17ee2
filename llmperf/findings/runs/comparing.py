"""Two or more runs against each other: what differs first, then ratios of equal conditions.

Runs on the same card (or, without cards, the same processor) are compared with the first of them.
When nothing that is recorded differs, a ratio shows how much a repeated run varies, and the verdict
is "cannot tell" whatever its interval: there is nothing that it could be blamed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from llmperf import stats
from llmperf.findings.runs.loading import Run
from llmperf.findings.runs.tables import (
    as_text,
    by_condition,
    condition_key,
    differences,
    machine_differences,
    side_by_side,
    value,
    variant,
)

RUN_TO_RUN = 0.05  # runs of one machine differ by about as much with nothing changed
TOKENS_APART = 0.01  # of the tokens that came out: beyond it, different work was done
LOWER_IS_BETTER = ("_s", "_ms")


@dataclass(frozen=True)
class Row:
    """One condition that both runs of a pair measured; `ratio` is second over first."""

    what: str
    level: int
    ratio: float | None
    low: float | None
    high: float | None
    verdict: str  # is the second run faster, slower, or "cannot tell"
    note: str = ""


@dataclass(frozen=True)
class Pair:
    """Two runs on the same hardware."""

    first: str
    second: str
    differs: dict[str, dict[str, str]]
    rows: tuple[Row, ...]
    verdict: str

    @property
    def typical(self) -> float | None:
        """The median ratio over the conditions."""
        found = [r.ratio for r in self.rows if r.ratio is not None]
        return median(found) if found else None


@dataclass(frozen=True)
class Comparison:
    """Everything `llmperf compare` shows. `str()` of it is that text."""

    runs: tuple[Run, ...]
    quantity: str
    differs: dict[str, dict[str, str]]
    pairs: tuple[Pair, ...]

    def __str__(self) -> str:
        parts = ["Runs", *_run_lines(self.runs), "", "Conditions that differ"]
        parts += _difference_lines(self.differs) or ["  none that is recorded"]
        parts += ["", f"{self.quantity}, median of the repeats"]
        parts += [_table_text(self.runs, self.quantity)]
        for pair in self.pairs:
            parts += ["", *_pair_lines(pair, self.quantity)]
        if not self.pairs:
            parts += ["", "No ratios: no two of these runs share a card or a processor."]
        return "\n".join(parts)


def compare(runs: Sequence[Run], quantity: str = "output_tokens_per_s") -> Comparison:
    """Put runs side by side, and compare those on the same hardware in `quantity`.

    Raises ValueError when there is nothing to compare, or no record has that quantity.
    """
    if not runs:
        raise ValueError("there is no run to compare: name two folders or files")
    samples = {run.name: _samples(run, quantity) for run in runs}
    if not any(samples.values()):
        known = sorted({k for run in runs for r in run.measured[:1] for k in r["metrics"]})
        raise ValueError(f"no run has {quantity!r}: choose one of {', '.join(known)}")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.hardware != "unknown":
            groups.setdefault(run.hardware, []).append(run)
    pairs = [
        _pair(group[0], other, samples, quantity)
        for group in groups.values()
        for other in group[1:]
    ]
    return Comparison(tuple(runs), quantity, differences(runs), tuple(pairs))


def _samples(run: Run, quantity: str) -> dict[str, tuple[dict, list[float], list[float]]]:
    """Condition → it, its values, and the tokens that came out."""
    found = {}
    for condition, records in by_condition(run):
        pairs = [(value(r, quantity), r["metrics"].get("output_tokens") or 0) for r in records]
        if known := [(x, tokens) for x, tokens in pairs if x]:
            found[condition_key(condition)] = (condition, *map(list, zip(*known, strict=True)))
    return found


def _pair(first: Run, second: Run, samples: dict, quantity: str) -> Pair:
    a, b = samples[first.name], samples[second.name]
    differs = machine_differences([first, second])  # the work is the same, row by row
    higher = not quantity.split(".")[0].endswith(LOWER_IS_BETTER) or quantity.endswith("_per_s")
    rows = tuple(_row(a[key], b[key], higher, bool(differs)) for key in a if key in b)
    return Pair(first.name, second.name, differs, rows, _verdict(rows, differs))


def _row(a: tuple, b: tuple, higher_is_better: bool, differ: bool) -> Row:
    condition, x, tokens_x = a
    _, y, tokens_y = b
    name = (variant(condition), condition["level"])
    if _different_work(tokens_x, tokens_y):
        return Row(*name, None, None, None, "cannot tell", "not the same number of tokens came out")
    found = stats.ratio_interval(y, x)
    verdict, note = "cannot tell", found.reason or ""
    if found.low is not None and differ:
        if found.low > 1 + RUN_TO_RUN:
            verdict = "faster" if higher_is_better else "slower"
        elif found.high < 1 / (1 + RUN_TO_RUN):
            verdict = "slower" if higher_is_better else "faster"
    return Row(*name, found.value, found.low, found.high, verdict, note)


def _different_work(x: Sequence[float], y: Sequence[float]) -> bool:
    low, high = sorted((median(x), median(y)))
    return high - low > TOKENS_APART * high


def _verdict(rows: Sequence[Row], differs: dict) -> str:
    """Over all conditions, in one sentence."""
    if not rows:
        return "cannot tell: no condition is the same in both"
    if not differs:
        return "cannot tell: nothing that is recorded differs; the ratios show run-to-run noise"
    counts = {word: sum(r.verdict == word for r in rows) for word in ("faster", "slower")}
    if not any(counts.values()):
        return f"cannot tell: none of {len(rows)} conditions is apart by more than the noise"
    said = [f"{word} in {n}" for word, n in counts.items() if n]
    return f"{' and '.join(said)} of {len(rows)} conditions"


def _run_lines(runs: Sequence[Run]) -> list[str]:
    lines = []
    for run in runs:
        lines.append(f"  {run.name}: {run.caption}; {len(run.measured)} runs that count")
        lines += [f"    not clean: {text}" for text in run.dirty]
        lines += [f"    left out: {text}" for text in run.left_out]
    return lines


def _difference_lines(differs: dict) -> list[str]:
    lines = []
    for key, values in differs.items():
        by: dict[str, list[str]] = {}
        for name, text in values.items():
            by.setdefault(text, []).append(name)
        sides = "; ".join(f"{text} ({_names(names)})" for text, names in by.items())
        lines.append(f"  {key}: {sides}")
    return lines


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _table_text(runs: Sequence[Run], quantity: str) -> str:
    """Columns are lettered: a terminal has no room for a machine's name over each."""
    table = side_by_side(runs, quantity)
    letters = [f"[{i}]" for i in range(1, len(table.columns) + 1)]
    rows = [["  strategy", "level", *letters]]
    for (strategy, level), values in table.iterrows():
        cells = ("" if x != x else f"{x:.4g}" for x in values)
        rows.append([f"  {strategy}", str(level), *cells])
    legend = [
        f"  {letter} {' · '.join(name.splitlines())}"
        for letter, name in zip(letters, table.columns, strict=True)
    ]
    return "\n".join([as_text(rows), *legend])


def _pair_lines(pair: Pair, quantity: str) -> list[str]:
    """Conditions that differ stand before any ratio."""
    lines = [f"{pair.second} against {pair.first}: {pair.verdict}", "  differs:"]
    lines += [f"  {line}" for line in _difference_lines(pair.differs)] or ["    nothing recorded"]
    rows = [[f"  {quantity}, ratio", "level", "median", "95 % interval", ""]]
    for r in pair.rows:
        shown = "" if r.ratio is None else f"{r.ratio:.3f}"
        interval = "" if r.low is None else f"{r.low:.3f} to {r.high:.3f}"
        words = "; ".join(text for text in (r.verdict, r.note) if text)
        rows.append([f"  {r.what}", str(r.level), shown, interval, words])
    return [*lines, as_text(rows)] if pair.rows else lines

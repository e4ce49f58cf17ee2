"""Runs against each other: what differs, then ratios of equal conditions, on one hardware first."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special

from llmperf import machine, stats
from llmperf.findings.runs import Run
from llmperf.measure import frame

RUN_TO_RUN = 0.10  # without A/A data: two launches of one machine may differ by as much
LEAST_MARGIN = 0.05
ACROSS = "Different machines: the ratio mixes hardware, software and the time of measuring."
PACKAGES = ("torch", "transformers", "triton", "numpy", "torchao", "gptqmodel", "bitsandbytes")
CARD = ("name", "driver", "driver_model", "memory_total_bytes", "power_limit_w", "pcie_gen_max",
        "pcie_width_max", "compute_capability")  # fmt: skip
SYSTEM = ("os", "os_version", "cpu_model", "ram_total_bytes", "power_plan", "on_battery", "hags",
          "mps_daemon", "python", "gil_enabled")  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Two runs. `rows`: the conditions that both measured, their medians, and second over first.

    `margin`: the share by which two launches differ with nothing changed, from `basis`; what is
    smaller is "cannot tell".
    """

    first: str
    second: str
    differs: list[str]  # facts of the machines
    rows: pd.DataFrame
    margin: float
    basis: str

    @property
    def verdict(self) -> str:
        """Over all conditions, in one sentence."""
        if not len(self.rows):
            return "cannot tell: no condition is the same in both"
        counts, n = self.rows.verdict.value_counts(), int(self.rows.low.notna().sum())
        if not n:
            return "cannot tell: no condition has runs enough for an interval"
        single = len(self.rows) - n
        besides = f" ({single} more have too few runs for an interval)" * (single > 0)
        found = {word: counts[word] for word in ("faster", "slower") if word in counts}
        said = f"{' and '.join(f'{word} in {k}' for word, k in found.items())} of {n} conditions"
        said += besides
        if not found:
            margin = f"the {self.margin:.0%} of two launches ({self.basis})"
            return (
                f"cannot tell: none of {n} conditions surely differs by more than {margin}{besides}"
            )
        if special.bdtr(sum(found.values()) - 1, n, 0.05) < 0.95:  # their intervals are of 95 %
            return f"cannot tell: {said}, no more than chance gives"
        return said + ("" if self.differs else "; nothing that is recorded explains it")


@dataclass(frozen=True)
class RunComparison:
    """What `llmperf compare` shows; `str()` of it is that text."""

    runs: tuple[Run, ...]
    quantity: str
    differs: pd.DataFrame  # a row a fact of the machines that differs, a column a run
    table: pd.DataFrame  # medians; rows are strategies and levels, columns runs and their work
    pairs: tuple[Pair, ...]  # on the same hardware
    across: tuple[Pair, ...]  # the first run against the first run of each other hardware
    alone: pd.DataFrame  # medians of the conditions that are in no pair, a column a run

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        numbers = {run.name: f"({i})" for i, run in enumerate(self.runs, start=1)}
        yield "Runs"
        for run in self.runs:
            yield f"  {numbers[run.name]} {run.name}: {run.caption}"
            yield f"      runs that count: {len(run.measured)}"
            yield from (f"      note: {text}" for text in run.notes)
        yield "\nWhat differs between the machines"
        known = "  nothing that is recorded"
        yield known if self.differs.empty else self.differs.rename(columns=numbers).to_string()
        for pair in (*self.pairs, *self.across):
            first, second = numbers[pair.first], numbers[pair.second]
            yield f"\n{self.quantity}, {second} against {first}: {pair.verdict}"
            if pair in self.across:
                yield f"  {ACROSS}"
            yield f"  differs: {', '.join(pair.differs) or 'nothing recorded'}"
            launches = f"Two launches of one machine differ by as much as {pair.margin:.0%}"
            yield f"  {launches} ({pair.basis}): a smaller difference is no finding."
            heads = [f"{first:>8} {second:>8}  {second}/{first}{'interval':>15}  verdict"]
            yield from _by_work(pair.rows, heads + [_ratio_text(r) for r in pair.rows.itertuples()])
        if len(self.alone):
            yield f"\n{self.quantity} of the conditions without an equal one in these pairs"
            medians = self.alone.iloc[:, 3:].rename(columns=numbers)
            heads = ["".join(f"{number:>9}" for number in medians)]
            cells = medians.map(lambda x: f"{'' if pd.isna(x) else machine.significant(x, 4):>9}")
            yield from _by_work(self.alone, heads + list(cells.agg("".join, axis=1)))


def _by_work(rows: pd.DataFrame, texts: Sequence[str]) -> Iterator[str]:
    """The head, texts[0], then a line a condition, under the model and lengths that it ran."""
    named = rows.assign(name=rows.strategy + " " + rows.level.astype(str), text=texts[1:])
    width = max([0, *named.name.map(len)]) + 4
    yield f"{'':{width}} {texts[0]}"
    for work, group in named.groupby("work", sort=False):
        yield f"  {work}"
        for row in group.sort_values(["strategy", "level"]).itertuples():
            yield f"{'    ' + row.name:<{width}} {row.text}".rstrip()


def _ratio_text(row) -> str:
    known = pd.notna(row.low)
    interval = f"{row.low:.2f} to {row.high:.2f}" if known else ""
    ratio = f"{row.ratio:.2f}" if pd.notna(row.ratio) else ""
    said = f"{row.verdict}{': ' * bool(row.note)}{row.note}"
    medians = "".join(f"{machine.significant(x, 4):>8} " for x in (row.first, row.second))
    return f"{medians}{ratio:>8}{interval:>15}  {said}"


def compare_runs(runs: Sequence[Run], quantity: str = "output_tokens_per_s") -> RunComparison:
    """Put runs side by side. Compare `quantity` on each hardware, its first run with its others,
    and across hardware, the first run of the first one with the first run of each other one.

    Raises ValueError when there is nothing to compare, or no record has that quantity.
    """
    values = {run.name: _values(run, quantity) for run in runs}
    if not any(map(len, values.values())):
        known = sorted({k for run in runs for r in run.measured[:1] for k in r.metrics})
        raise ValueError(f"no run has {quantity!r}: choose one of {', '.join(known)}")
    machines = pd.DataFrame({run.name: _machine_facts(run.environment) for run in runs})
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.hardware != "unknown":
            groups.setdefault(run.hardware, []).append(run)

    def paired(runs: Sequence[Run]) -> Iterator[Pair]:
        for other in runs[1:]:
            yield _pair(runs[0].name, other.name, machines, values, quantity)

    pairs = tuple(pair for group in groups.values() for pair in paired(group))
    firsts = [group[0] for group in groups.values()]
    across = tuple(pair for pair in paired(firsts) if len(pair.rows))
    alone = _without_equal(values, (*pairs, *across))
    table, differs = _side_by_side(values), _differing(machines)
    return RunComparison(tuple(runs), quantity, differs, table, pairs, across, alone)


def _values(run: Run, quantity: str) -> pd.DataFrame:
    """The runs and twins that have the quantity, one a row."""
    kinds = ("measure", "twin")
    ok = (r for r in run.records if r.kind in kinds and r.status == "ok" and r.possible)
    found = [r for r in ok if r.metric(quantity)]
    return frame(found).assign(value=[r.metric(quantity) for r in found], record=found)


def _side_by_side(values: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    table = pd.concat([rows.assign(run=name) for name, rows in values.items() if len(rows)])
    table = table[table.kind == "measure"].assign(run=lambda t: t.run + "\n" + t.work)
    wide = table.pivot_table("value", ["variant", "level"], "run", "median")
    return wide[table.run.unique()]


def _without_equal(values: Mapping[str, pd.DataFrame], pairs: Sequence[Pair]) -> pd.DataFrame:
    """The medians of what is in no pair; columns: work, strategy, level, and the runs."""
    left = []
    for name, rows in values.items():
        shown = {key for p in pairs if name in (p.first, p.second) for key in p.rows.condition}
        rest = rows[(rows.kind == "measure") & ~rows.condition.isin(shown)] if len(rows) else rows
        for _, group in rest.groupby("condition", sort=False) if len(rest) else ():
            left.append((*_named(group), name, np.median(group.value)))
    columns = ["condition", "work", "strategy", "level", "run", "value"]
    long = pd.DataFrame(left, columns=columns)
    wide = long.pivot_table("value", columns[:4], "run", sort=False)
    return wide.reset_index().drop(columns="condition")


def _named(rows: pd.DataFrame) -> tuple:
    """Digest, work, strategy with its options, and level of a condition's rows."""
    return tuple(rows[name].iloc[0] for name in ("condition", "work", "variant", "level"))


def _pair(a: str, b: str, machines: pd.DataFrame, values: Mapping, quantity: str) -> Pair:
    sides = [values[name] for name in (a, b) if len(values[name])]
    apart = [
        medians.max() / medians.min() - 1
        for side in sides
        for _, group in side.groupby("condition")
        if len(medians := group.groupby(["experiment", "kind"]).value.median()) > 1
    ]
    margin = max([LEAST_MARGIN, *apart]) if apart else RUN_TO_RUN
    n = len(apart)
    basis = f"{n} conditions measured twice" if n else "assumed: no condition was measured twice"
    groups = [dict(list(s[s.kind == "measure"].groupby("condition", sort=False))) for s in sides]
    common = [key for key in groups[0] if key in groups[1]] if len(groups) == 2 else []
    rows = [_row(groups[0][key], groups[1][key], quantity, margin) for key in common]
    columns = ["condition", "work", "strategy", "level", "first", "second",
               "ratio", "low", "high", "verdict", "note"]  # fmt: skip
    differs = list(_differing(machines[[a, b]]).index)  # the work is the same, row by row
    return Pair(a, b, differs, pd.DataFrame(rows, columns=columns), margin, basis)


def _row(a: pd.DataFrame, b: pd.DataFrame, quantity: str, margin: float) -> tuple:
    name = (*_named(a), np.median(a.value), np.median(b.value))
    try:
        x = stats.compare_speeds(b.record, a.record, quantity, paired=False, margin=margin)
    except ValueError as error:  # not the same number of tokens came out
        return *name, None, None, None, "cannot tell", str(error)
    note = x.reason or ""
    if x.verdict == "cannot tell" and x.low is not None and not x.low <= 1 <= x.high:
        note = f"inside the {margin:.0%} of two launches"
    return *name, x.ratio, x.low, x.high, x.verdict, note


def _differing(facts: pd.DataFrame) -> pd.DataFrame:
    facts = facts.astype(object).fillna("not recorded")
    return facts[facts.nunique(axis=1) > 1]


def _machine_facts(env: Mapping) -> dict[str, str]:
    """What of a machine decides a speed; the load of the moment is not in it."""
    packages, card = env.get("packages") or {}, (env.get("gpus") or [{}])[0]
    facts = {key: env[key] for key in SYSTEM if key in env}
    if {"cores_logical", "cores_allowed", "cores_quota"} <= env.keys():
        facts["cores"] = machine.cores(dict(env))
    facts |= {key: packages[key] for key in PACKAGES if key in packages}
    facts |= {f"GPU {key}": card[key] for key in CARD if key in card}
    return {key: str(value) for key, value in facts.items()}

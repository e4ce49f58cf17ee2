"""Runs against each other: what differs, then ratios of equal conditions on one hardware."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from scipy import special

from llmperf import machine, stats
from llmperf.findings.runs import Run
from llmperf.measure import frame

RUN_TO_RUN = 0.10  # without A/A data: two launches of one machine may differ by as much
LEAST_MARGIN = 0.05
PACKAGES = ("torch", "transformers", "triton", "numpy", "torchao", "gptqmodel", "bitsandbytes")
CARD = ("name", "driver", "driver_model", "memory_total_bytes", "power_limit_w", "pcie_gen_max",
        "pcie_width_max", "compute_capability")  # fmt: skip
SYSTEM = ("os", "os_version", "cpu_model", "ram_total_bytes", "power_plan", "on_battery", "hags",
          "mps_daemon", "python", "gil_enabled")  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Two runs on the same hardware. `rows`: the conditions that both measured, second over first.

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
            return f"cannot tell: none of {n} conditions differs by more than {margin}{besides}"
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
    pairs: tuple[Pair, ...]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield "Runs"
        for i, run in enumerate(self.runs, start=1):
            yield f"  ({i}) {run.name}: {run.caption}; {len(run.measured)} runs that count"
            yield from (f"      note: {text}" for text in run.notes)
        yield "\nWhat differs between the machines"
        numbers = [f"({i + 1})" for i in range(len(self.runs))]
        yield self.differs.set_axis(numbers, axis=1).to_string()
        yield f"\n{self.quantity}, median of the repeats"
        letters = [f"[{i + 1}]" for i in range(len(self.table.columns))]  # names are too wide
        shown = self.table.set_axis(letters, axis=1).reset_index()
        yield shown.to_string(index=False, na_rep="", float_format="{:.4g}".format)
        for letter, name in zip(letters, self.table, strict=True):
            yield f"  {letter} {name.replace(chr(10), ' · ')}"
        for pair in self.pairs:
            yield f"\n{pair.second} against {pair.first}: {pair.verdict}"
            yield f"  differs: {', '.join(pair.differs) or 'nothing recorded'}"
            yield pair.rows.to_string(index=False, na_rep="", float_format="{:.3f}".format)
        if not self.pairs:
            yield "\nNo ratios: no two of these runs share a card or a processor."


def compare_runs(runs: Sequence[Run], quantity: str = "output_tokens_per_s") -> RunComparison:
    """Put runs side by side, and compare those on the same hardware in `quantity`.

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
    pairs = [
        _pair(first.name, other.name, machines, values, quantity)
        for first, *others in groups.values()
        for other in others
    ]
    table = _side_by_side(values)
    return RunComparison(tuple(runs), quantity, _differing(machines), table, tuple(pairs))


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
    columns = ["strategy", "level", "ratio", "low", "high", "verdict", "note"]
    differs = list(_differing(machines[[a, b]]).index)  # the work is the same, row by row
    return Pair(a, b, differs, pd.DataFrame(rows, columns=columns), margin, basis)


def _row(a: pd.DataFrame, b: pd.DataFrame, quantity: str, margin: float) -> tuple:
    name = (a.variant.iloc[0], a.level.iloc[0])
    try:
        x = stats.compare_speeds(b.record, a.record, quantity, paired=False, margin=margin)
    except ValueError as error:  # not the same number of tokens came out
        return *name, None, None, None, "cannot tell", str(error)
    return *name, x.ratio, x.low, x.high, x.verdict, x.reason or ""


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

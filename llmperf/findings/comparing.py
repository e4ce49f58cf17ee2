"""Two or more runs against each other: what differs first, then ratios of equal conditions.

Runs on the same card (or, without cards, the same processor) are compared with the first of them.
Launches of one program differ by more than the repeats of one launch. How much is taken from
conditions that a run measured twice, in two notebooks (A/A); a smaller ratio is "cannot tell".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp, log
from statistics import median

from llmperf import machine, stats
from llmperf.findings.runs import Run
from llmperf.measure.frames import described

RUN_TO_RUN = 0.10  # without A/A data: two launches of one machine may differ by as much
LEAST_MARGIN = 0.05
TOKENS_APART = 0.01  # of the tokens that came out: beyond it, different work was done
PACKAGES = ("torch", "transformers", "triton", "numpy", "torchao", "gptqmodel", "bitsandbytes")
CARD = ("name", "driver", "driver_model", "memory_total_bytes", "power_limit_w", "pcie_gen_max",
        "pcie_width_max", "compute_capability")  # fmt: skip
SYSTEM = ("os", "os_version", "kernel", "cpu_model", "ram_total_bytes", "container",
          "virtual_machine", "power_plan", "on_battery", "hags", "mps_daemon", "python",
          "gil_enabled", "switch_interval_s")  # fmt: skip
ASKED = ("model", "dtype", "quantization", "weights", "device", "prompt_tokens", "new_tokens",
         "sampling", "loop", "seed")  # fmt: skip


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
    """Two runs on the same hardware. `margin`: by which share two launches differ unchanged."""

    first: str
    second: str
    differs: dict[str, dict[str, str]]
    rows: tuple[Row, ...]
    margin: float
    basis: str  # what the margin rests on

    @property
    def typical(self) -> float | None:
        """The median ratio over the conditions."""
        found = [r.ratio for r in self.rows if r.ratio is not None]
        return median(found) if found else None

    @property
    def verdict(self) -> str:
        """Over all conditions, in one sentence."""
        if not self.rows:
            return "cannot tell: no condition is the same in both"
        counts = {word: sum(r.verdict == word for r in self.rows) for word in ("faster", "slower")}
        if not any(counts.values()):
            margin = f"the {self.margin:.0%} of two launches ({self.basis})"
            return f"cannot tell: none of {len(self.rows)} conditions differs by more than {margin}"
        said = " and ".join(f"{word} in {n}" for word, n in counts.items() if n)
        unexplained = "" if self.differs else "; nothing that is recorded explains it"
        return f"{said} of {len(self.rows)} conditions{unexplained}"


@dataclass(frozen=True)
class Comparison:
    """Everything `llmperf compare` shows. `str()` of it is that text."""

    runs: tuple[Run, ...]
    quantity: str
    differs: dict[str, dict[str, str]]
    pairs: tuple[Pair, ...]

    def __str__(self) -> str:
        lines = ["Runs"]
        for run in self.runs:
            lines.append(f"  {run.name}: {run.caption}; {len(run.measured)} runs that count")
            lines += [f"    not clean: {text}" for text in run.dirty]
            lines += [f"    left out: {text}" for text in run.left_out]
        lines += ["", "Conditions that differ"]
        lines += _difference_lines(self.differs) or ["  none that is recorded"]
        lines += ["", f"{self.quantity}, median of the repeats"]
        table = side_by_side(self.runs, self.quantity)
        letters = [f"[{i}]" for i in range(1, len(table.columns) + 1)]  # names are too wide
        cells = [
            [f"  {name}", str(level), *("" if x != x else f"{x:.4g}" for x in values)]
            for (name, level), values in table.iterrows()
        ]
        lines.append(_aligned([["  strategy", "level", *letters], *cells]))
        names = (name.replace("\n", " · ") for name in table.columns)
        lines += [f"  {letter} {name}" for letter, name in zip(letters, names, strict=True)]
        for pair in self.pairs:
            lines += ["", *_pair_lines(pair, self.quantity)]
        if not self.pairs:
            lines += ["", "No ratios: no two of these runs share a card or a processor."]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Samples:
    """The values of one condition in one run, by experiment, and the tokens that came out."""

    columns: Mapping
    by_experiment: dict[str, list[float]]
    tokens: list[float]

    @property
    def values(self) -> list[float]:
        return [x for values in self.by_experiment.values() for x in values]


def compare(runs: Sequence[Run], quantity: str = "output_tokens_per_s") -> Comparison:
    """Put runs side by side, and compare those on the same hardware in `quantity`.

    Raises ValueError when there is nothing to compare, or no record has that quantity.
    """
    if not runs:
        raise ValueError("there is no run to compare: name two folders or files")
    samples = {run.name: _samples(run, quantity) for run in runs}
    if not any(samples.values()):
        known = sorted({k for run in runs for r in run.measured[:1] for k in r.metrics})
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


def _samples(run: Run, quantity: str) -> dict[str, _Samples]:
    """Condition → its values."""
    found: dict[str, _Samples] = {}
    columns: dict[int, dict] = {}
    for r in run.measured:
        if value := r.metric(quantity):
            if id(r.condition) not in columns:
                columns[id(r.condition)] = described(r.condition, {})
            c = columns[id(r.condition)]
            s = found.setdefault(c["condition"], _Samples(c, {}, []))
            s.by_experiment.setdefault(r.experiment, []).append(value)
            s.tokens.append(r.metric("output_tokens") or 0)
    return found


def _pair(first: Run, second: Run, samples: Mapping, quantity: str) -> Pair:
    a, b = samples[first.name], samples[second.name]
    apart = [x for side in (a, b) for s in side.values() for x in _apart(s)]
    margin = max([LEAST_MARGIN, *apart]) if apart else RUN_TO_RUN
    basis = f"{len(apart)} A/A pairs" if apart else "assumed: no condition was measured twice"
    higher = quantity.split(".")[0].endswith(("_per_s", "_per_user"))
    rows = tuple(_row(a[key], b[key], higher, margin) for key in a if key in b)
    differs = machine_differences([first, second])  # the work is the same, row by row
    return Pair(first.name, second.name, differs, rows, margin, basis)


def _apart(samples: _Samples) -> list[float]:
    """By which shares the medians of one condition differ between experiments of one run."""
    medians = [median(values) for values in samples.by_experiment.values()]
    return [exp(abs(log(x / y))) - 1 for x, y in combinations(medians, 2)]


def _row(a: _Samples, b: _Samples, higher_is_better: bool, margin: float) -> Row:
    name = (a.columns["variant"], a.columns["level"])
    low, high = sorted((median(a.tokens), median(b.tokens)))
    if high - low > TOKENS_APART * high:
        return Row(*name, None, None, None, "cannot tell", "not the same number of tokens came out")
    found = stats.ratio_interval(b.values, a.values)
    verdict = "cannot tell"
    if found.low is not None and (found.low > 1 + margin or found.high < 1 / (1 + margin)):
        verdict = "faster" if (found.low > 1) == higher_is_better else "slower"
    return Row(*name, found.value, found.low, found.high, verdict, found.reason or "")


def side_by_side(runs: Sequence[Run], quantity: str = "output_tokens_per_s"):
    """Median of `quantity`: strategies and levels as rows; run, model and lengths as columns.

    A DataFrame; a missing cell was not measured. Runs that failed or cannot be true are left out.
    """
    import pandas as pd

    rows = [
        (s.columns["variant"], s.columns["level"], f"{run.name}\n{s.columns['work']}", x)
        for run in runs
        for s in _samples(run, quantity).values()
        for x in s.values
    ]
    table = pd.DataFrame(rows, columns=["strategy", "level", "run", quantity])
    wide = table.pivot_table(quantity, ["strategy", "level"], "run", "median")
    return wide.reindex(columns=list(dict.fromkeys(table.run)))


def differences(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """What differs between runs, machine and work: `{what: {run's name: its value}}`."""
    asked = {}
    for run in runs:
        conditions = {id(r.condition): r.condition for r in run.measured}.values()
        values = {key: sorted({_text(c.get(key)) for c in conditions}) for key in ASKED}
        asked[run.name] = {key: ", ".join(texts) for key, texts in values.items() if texts}
    return machine_differences(runs) | _differing(asked)


def machine_differences(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """What of the machines differs; empty for two runs of one machine."""
    return _differing({run.name: _machine_facts(run.environment) for run in runs})


def _differing(facts: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    keys = dict.fromkeys(key for of_run in facts.values() for key in of_run)
    values = {k: {name: f.get(k, "not recorded") for name, f in facts.items()} for k in keys}
    return {key: found for key, found in values.items() if len(set(found.values())) > 1}


def _machine_facts(env: Mapping) -> dict[str, str]:
    """What of a machine decides a speed; the load of the moment is not in it."""
    facts = {key: _text(env[key]) for key in SYSTEM if key in env}
    if {"cores_logical", "cores_allowed", "cores_quota"} <= env.keys():
        facts["cores"] = str(machine.cores(dict(env)))
    packages, card = env.get("packages") or {}, (env.get("gpus") or [{}])[0]
    facts |= {key: _text(packages[key]) for key in PACKAGES if key in packages}
    return facts | {f"GPU {key}": _text(card[key]) for key in CARD if key in card}


def _text(value) -> str:
    words = {True: "yes", False: "no", None: "none"}
    if value is None or isinstance(value, bool):
        return words[value]
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else str(value)


def _difference_lines(differs: Mapping) -> list[str]:
    lines = []
    for key, values in differs.items():
        by: dict[str, list[str]] = {}
        for name, text in values.items():
            by.setdefault(text, []).append(name)
        sides = (
            f"{text} ({', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)})"
            for text, names in by.items()
        )
        lines.append(f"  {key}: {'; '.join(sides)}")
    return lines


def _pair_lines(pair: Pair, quantity: str) -> list[str]:
    """What differs comes before any ratio."""
    lines = [f"{pair.second} against {pair.first}: {pair.verdict}", "  differs:"]
    lines += [f"  {line}" for line in _difference_lines(pair.differs)] or ["    nothing recorded"]
    rows = [[f"  {quantity}, ratio", "level", "median", "95 % interval", ""]]
    for r in pair.rows:
        shown = "" if r.ratio is None else f"{r.ratio:.3f}"
        interval = "" if r.low is None else f"{r.low:.3f} to {r.high:.3f}"
        words = "; ".join(text for text in (r.verdict, r.note) if text)
        rows.append([f"  {r.what}", str(r.level), shown, interval, words])
    return [*lines, _aligned(rows)] if pair.rows else lines


def _aligned(rows: Iterable[Sequence[str]]) -> str:
    """Rows as aligned columns of plain text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)

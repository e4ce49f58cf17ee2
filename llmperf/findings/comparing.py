"""Two or more runs against each other: what differs first, then ratios of equal conditions.

Runs on the same card (or, without cards, the same processor) are compared with the first of them.
Launches of one program differ by more than the repeats of one launch. How much is taken from
conditions that a run measured twice (A/A): as a twin, or in two notebooks; a smaller ratio is
"cannot tell".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import exp, log

import pandas as pd

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
class Pair:
    """Two runs on the same hardware.

    `rows`: one condition each that both measured, with `ratio` (second over first), `low`, `high`,
    `verdict` (is the second faster, slower, or "cannot tell") and `note`. `margin`: the share by
    which two launches differ with nothing changed, from `basis`.
    """

    first: str
    second: str
    differs: dict[str, dict[str, str]]
    rows: pd.DataFrame
    margin: float
    basis: str

    @property
    def typical(self) -> float | None:
        """The median ratio over the conditions."""
        return float(self.rows.ratio.median()) if self.rows.ratio.notna().any() else None

    @property
    def verdict(self) -> str:
        """Over all conditions, in one sentence."""
        if not len(self.rows):
            return "cannot tell: no condition is the same in both"
        counts = self.rows.verdict.value_counts()
        said = [f"{word} in {counts[word]}" for word in ("faster", "slower") if word in counts]
        if not said:
            margin = f"the {self.margin:.0%} of two launches ({self.basis})"
            return f"cannot tell: none of {len(self.rows)} conditions differs by more than {margin}"
        unexplained = "" if self.differs else "; nothing that is recorded explains it"
        return f"{' and '.join(said)} of {len(self.rows)} conditions{unexplained}"


@dataclass(frozen=True)
class Comparison:
    """Everything `llmperf compare` shows. `str()` of it is that text."""

    runs: tuple[Run, ...]
    quantity: str
    differs: dict[str, dict[str, str]]
    pairs: tuple[Pair, ...]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield "Runs"
        for run in self.runs:
            yield f"  {run.name}: {run.caption}; {len(run.measured)} runs that count"
            yield from (f"    not clean: {text}" for text in run.dirty)
            yield from (f"    left out: {text}" for text in run.left_out)
        yield "\nConditions that differ"
        yield from _difference_lines(self.differs) or ["  none that is recorded"]
        table = side_by_side(self.runs, self.quantity)
        letters = {name: f"[{i}]" for i, name in enumerate(table.columns, start=1)}  # short columns
        shown = table.rename(columns=letters).reset_index()
        yield f"\n{self.quantity}, median of the repeats"
        yield shown.to_string(index=False, na_rep="", float_format="{:.4g}".format)
        yield from (
            f"  {letter} {name.replace(chr(10), ' · ')}" for name, letter in letters.items()
        )
        for pair in self.pairs:
            yield f"\n{pair.second} against {pair.first}: {pair.verdict}\n  differs:"
            yield from _difference_lines(pair.differs) or ["  nothing recorded"]
            yield f"  ratio of {self.quantity}, with its 95 % interval:"
            if len(pair.rows):
                yield pair.rows.to_string(index=False, na_rep="", float_format="{:.3f}".format)
        if not self.pairs:
            yield "\nNo ratios: no two of these runs share a card or a processor."


def compare(runs: Sequence[Run], quantity: str = "output_tokens_per_s") -> Comparison:
    """Put runs side by side, and compare those on the same hardware in `quantity`.

    Raises ValueError when there is nothing to compare, or no record has that quantity.
    """
    if not runs:
        raise ValueError("there is no run to compare: name two folders or files")
    values = {run.name: _values(run, quantity) for run in runs}
    if not any(map(len, values.values())):
        known = sorted({k for run in runs for r in run.measured[:1] for k in r.metrics})
        raise ValueError(f"no run has {quantity!r}: choose one of {', '.join(known)}")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.hardware != "unknown":
            groups.setdefault(run.hardware, []).append(run)
    pairs = (
        _pair(group[0], other, values, quantity) for group in groups.values() for other in group[1:]
    )
    return Comparison(tuple(runs), quantity, differences(runs), tuple(pairs))


def _values(run: Run, quantity: str) -> pd.DataFrame:
    """The counted runs and their twins that have the quantity, one a row."""
    twins = [r for r in run.records if r.kind == "twin" and replace(r, kind="measure").counts]
    known = {id(r.condition): r.condition for r in (*run.measured, *twins)}
    known = {key: described(condition, {}) for key, condition in known.items()}
    rows = []
    for r in (*run.measured, *twins):
        if value := r.metric(quantity):
            what = [known[id(r.condition)][k] for k in ("condition", "variant", "level", "work")]
            rows.append((*what, r.experiment, r.kind, value, r.metric("output_tokens") or 0))
    columns = ["condition", "strategy", "level", "work", "experiment", "kind", "value", "tokens"]
    return pd.DataFrame(rows, columns=columns)


def _pair(first: Run, second: Run, values: Mapping, quantity: str) -> Pair:
    sides = [values[run.name] for run in (first, second)]
    apart = [
        exp(abs(log(x / y))) - 1
        for side in sides
        for _, group in side.groupby("condition")
        for x, y in combinations(group.groupby(["experiment", "kind"]).value.median(), 2)
    ]
    margin = max([LEAST_MARGIN, *apart]) if apart else RUN_TO_RUN
    basis = f"{len(apart)} A/A pairs" if apart else "assumed: no condition was measured twice"
    higher = quantity.split(".")[0].endswith(("_per_s", "_per_user"))
    counted = (side[side.kind == "measure"] for side in sides)
    a, b = (dict(list(side.groupby("condition", sort=False))) for side in counted)
    rows = [_row(a[key], b[key], higher, margin) for key in a if key in b]
    columns = ["strategy", "level", "ratio", "low", "high", "verdict", "note"]
    differs = machine_differences([first, second])  # the work is the same, row by row
    table = pd.DataFrame(rows, columns=columns)
    return Pair(first.name, second.name, differs, table, margin, basis)


def _row(a: pd.DataFrame, b: pd.DataFrame, higher_is_better: bool, margin: float) -> tuple:
    name = (a.strategy.iloc[0], a.level.iloc[0])
    low, high = sorted((a.tokens.median(), b.tokens.median()))
    if high - low > TOKENS_APART * high:
        return *name, None, None, None, "cannot tell", "not the same number of tokens came out"
    found = stats.ratio_interval(b.value.to_numpy(), a.value.to_numpy())
    verdict = "cannot tell"
    if found.low is not None and (found.low > 1 + margin or found.high < 1 / (1 + margin)):
        verdict = "faster" if (found.low > 1) == higher_is_better else "slower"
    return *name, found.value, found.low, found.high, verdict, found.reason or ""


def side_by_side(runs: Sequence[Run], quantity: str = "output_tokens_per_s") -> pd.DataFrame:
    """Median of `quantity`: strategies and levels as rows; run, model and lengths as columns.

    A missing cell was not measured. Runs that failed or cannot be true are left out.
    """
    tables = [_values(run, quantity).assign(run=run.name) for run in runs]
    table = pd.concat(tables).query("kind == 'measure'")
    table = table.assign(run=table.run + "\n" + table.work)
    wide = table.pivot_table("value", ["strategy", "level"], "run", "median")
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

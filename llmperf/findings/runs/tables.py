"""Runs as tables: every strategy and level side by side, and the conditions that differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from llmperf import machine
from llmperf.findings.evidence import label
from llmperf.findings.runs.loading import Run

PACKAGES = ("torch", "transformers", "triton", "numpy", "torchao", "gptqmodel", "bitsandbytes")
CARD = ("name", "driver", "driver_model", "memory_total_bytes", "power_limit_w", "pcie_gen_max",
        "pcie_width_max", "compute_capability")  # fmt: skip
SYSTEM = ("os", "os_version", "kernel", "cpu_model", "ram_total_bytes", "container",
          "virtual_machine", "power_plan", "on_battery", "hags", "mps_daemon", "python",
          "gil_enabled", "switch_interval_s")  # fmt: skip
WORK = ("model", "dtype", "quantization", "weights", "device", "prompt_tokens", "new_tokens",
        "sampling", "loop", "seed")  # fmt: skip


def condition_key(condition: Mapping) -> str:
    """Equal for conditions that ask for the same."""
    return json.dumps(condition, sort_keys=True, default=str)


def by_condition(run: Run) -> list[tuple[Mapping, list[Mapping]]]:
    """The counted records of each condition. Equal ones are mostly one object: see `lines`."""
    objects: dict[int, tuple[Mapping, list]] = {}
    for record in run.measured:
        condition = record["condition"]
        objects.setdefault(id(condition), (condition, []))[1].append(record)
    merged: dict[str, tuple[Mapping, list]] = {}
    for condition, rows in objects.values():
        merged.setdefault(condition_key(condition), (condition, []))[1].extend(rows)
    return list(merged.values())


def value(record: Mapping, quantity: str) -> float | None:
    """`output_tokens_per_s`, or `ttft_ms.median`."""
    found = record["metrics"]
    for part in quantity.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found if isinstance(found, int | float) else None


def variant(condition: Mapping) -> str:
    """The strategy with its options: `threads stream=own`."""
    options = condition.get("options") or {}
    return " ".join([condition["strategy"], *(f"{k}={v}" for k, v in sorted(options.items()))])


def side_by_side(runs: Sequence[Run], quantity: str = "output_tokens_per_s"):
    """Median of `quantity`: strategies and levels as rows; run, model and lengths as columns.

    A DataFrame; a missing cell was not measured. Runs that failed or cannot be true are left out.
    """
    import pandas as pd

    cells: dict[tuple, list[float]] = {}
    for run in runs:
        for c, records in by_condition(run):
            if found := [x for r in records if (x := value(r, quantity)) is not None]:
                key = (variant(c), c["level"], f"{run.name}\n{label(c)}")
                cells.setdefault(key, []).extend(found)
    rows = [(*key, median(found)) for key, found in cells.items()]
    table = pd.DataFrame(rows, columns=["strategy", "level", "run", quantity])
    order = list(dict.fromkeys(table.run))
    wide = table.pivot(index=["strategy", "level"], columns="run", values=quantity)
    return wide.reindex(columns=order)


def differences(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """What differs between runs, machine and work: `{what: {run's name: its value}}`."""
    return machine_differences(runs) | _differing({r.name: _work_facts(r) for r in runs})


def machine_differences(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """What of the machines differs; empty for two runs of one machine."""
    return _differing({r.name: _machine_facts(r.environment) for r in runs})


def _differing(facts: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    keys = list(dict.fromkeys(key for own in facts.values() for key in own))
    found = {}
    for key in keys:
        values = {name: own.get(key, "not recorded") for name, own in facts.items()}
        if len(set(values.values())) > 1:
            found[key] = values
    return found


def _machine_facts(env: Mapping) -> dict[str, str]:
    """What of a machine decides a speed; the load of the moment is not in it."""
    facts = {key: _text(env[key]) for key in SYSTEM if key in env}
    if {"cores_logical", "cores_allowed", "cores_quota"} <= env.keys():
        facts["cores"] = str(machine.cores(dict(env)))
    packages = env.get("packages") or {}
    facts |= {key: _text(packages[key]) for key in PACKAGES if key in packages}
    card = (env.get("gpus") or [{}])[0]
    return facts | {f"GPU {key}": _text(card[key]) for key in CARD if key in card}


def _work_facts(run: Run) -> dict[str, str]:
    """What was asked; sets, since a study varies some of it itself."""
    asked: dict[str, set[str]] = {key: set() for key in WORK}
    for condition, _ in by_condition(run):
        for key in WORK:
            asked[key].add(_text(condition.get(key)))
    return {key: ", ".join(sorted(values)) for key, values in asked.items() if values}


def _text(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else str(value)


def as_text(rows: Iterable[Sequence[str]]) -> str:
    """Rows as aligned columns of plain text."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)

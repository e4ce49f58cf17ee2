"""The one data frame of records, from which findings, comparison and figures select."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress

import pandas as pd

from llmperf import machine
from llmperf.measure.records import PLACE, WORK, Record, as_number, digest
from llmperf.memory import GPU_CHANNELS
from llmperf.strategies import STRATEGIES


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row a record as a pandas DataFrame. What is not known is missing, never 0.

    `setting`: what runs share that may be compared (model, lengths, loop, machine), in words;
    `variant`: strategy and options, `threads intra_op=1`; `label`: the same in words, with the
    level; `work`: model and lengths; `precision`: quantisation or dtype; `rows`: requests that
    share a step; `servers`: steps at the same time; `foreign`: another engine, or a strategy or
    options that this version does not know (these have no `rows`). Each entry of the condition is
    a column, each option one (`option_intra_op`). Distributions give their median (`ttft_ms`),
    memory channels their max, mean and first value (`max_rss_bytes`), notes of the strategy numbers
    (`note_gil_contention`).
    """
    known: dict[str, dict] = {}  # condition and machine → their columns
    settings: dict[str, str] = {}
    rows = []
    for r in records:
        same = digest(r.environment, r.condition)
        if same not in known:
            row = known[same] = _condition_columns(r.condition, r.environment)
            place = {k: row.get(k) for k in (*WORK, *PLACE)}
            name = f"{row['work']}, {row['hardware']}, {row['os']}"
            twins = sum(text.startswith(name) for text in settings.values())
            name += f" ({twins + 1})" * (twins > 0)
            row["setting"] = settings.setdefault(digest(place), name)
            row |= {"label": row["variant"], "foreign": True}
            with suppress(KeyError, TypeError, AttributeError):  # a newer strategy, strange options
                strategy = STRATEGIES[row["strategy"]]
                how = row["level"], r.condition.get("options") or {}
                row |= {"label": strategy.words(*how), "rows": strategy.rows_per_step(*how)}
                row |= {"servers": strategy.servers(*how), "joins": strategy.joins}
                row |= {"served": strategy.served, "foreign": strategy.foreign}
        rows.append(known[same] | _measured_columns(r) | known[same])  # a record cannot rename them
    return pd.DataFrame(rows)


def _condition_columns(condition: Mapping, environment: Mapping) -> dict:
    """The columns that come from a condition and a machine."""
    c, cards = condition, environment.get("gpus") or []
    row = {k: _scalar(v) for k, v in c.items() if k != "options"}
    options = {k: _scalar(v) for k, v in (c.get("options") or {}).items()}
    card = cards[0].get("name") if cards else None
    hardware = environment.get("cpu_model") if c.get("device") == "cpu" else card
    return row | {f"option_{k}": v for k, v in options.items()} | {
        "condition": digest(c),
        "machine": machine_in_words(environment),
        "hardware": hardware or "unknown hardware",
        "os": environment.get("os") or "unknown system",
        "precision": _scalar(c.get("quantization") or c.get("dtype")),
        "work": work(c),
        "variant": " ".join([c["strategy"], *(f"{k}={v}" for k, v in sorted(options.items()))]),
    }  # fmt: skip


def machine_in_words(environment: Mapping, describe=machine.caption) -> str | None:
    """The machine of a record; None where its environment is missing or of another form."""
    try:
        return describe(dict(environment)) if environment else None
    except (KeyError, TypeError, AttributeError, IndexError):
        return None


def work(c: Mapping) -> str:
    """Model, dtype, loop where it is not `cached`, and lengths: `gpt2 fp32, 32+64 tokens`."""
    blocks = (c.get(name) for name in ("sampling", "arrivals"))
    sampling, arrivals = (block if isinstance(block, Mapping) else {} for block in blocks)
    return "".join((
        f"{c.get('model')} {c.get('quantization') or c.get('dtype')}",
        " random" * (c.get("weights") == "random"),
        f", {c['loop']}" if c.get("loop", "cached") != "cached" else "",
        f", {c['prompt_tokens']}+" if c.get("prompt_tokens") else ", ",
        f"{c.get('new_tokens')} tokens",
        ", greedy" * bool(sampling.get("greedy")),
        f", {arrivals['rate_per_s']:g} arriving/s" if as_number(arrivals.get("rate_per_s")) else "",
    ))  # fmt: skip


def _measured_columns(r: Record) -> dict:
    """The columns that come from one run."""
    row = {
        "experiment": r.experiment,
        "kind": r.kind,
        "repeat": r.repeat,
        "status": r.status,
        "reason": r.reason,
        "run_id": r.run_id,
        "counts": r.counts,
        "possible": r.possible,
        "warnings": "; ".join(map(str, r.warnings)),
    }
    for name, value in r.metrics.items():
        if name not in ("reasons", "slo", "clock"):
            row[name] = as_number(value.get("median") if isinstance(value, Mapping) else value)
    row |= {k: v for k, v in r.prediction.items() if not isinstance(v, dict | list)}
    on_cpu = r.condition.get("device") == "cpu"  # old records show a card that was not used
    for name, channel in r.memory.items():
        if on_cpu and name in GPU_CHANNELS:
            channel = {"unit": channel.get("unit")}
        for statistic in ("max", "mean", "first"):
            row[f"{statistic}_{name}_{channel.get('unit')}"] = as_number(channel.get(statistic))
    for group, notes in r.notes.items():
        for name, value in notes.items() if isinstance(notes, Mapping) else ():
            if (number := as_number(value)) is not None:
                row[f"note_{group}_{name}"] = number
    if r.agreement:
        row |= {"agree": r.agreement.get("agree"), "compared": r.agreement.get("total")}
    return row


def _scalar(value):
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list | tuple) else value

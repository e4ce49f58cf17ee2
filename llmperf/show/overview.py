"""One figure with all strategies of a machine, from records of whichever notebooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import pandas as pd

from llmperf import machine, strategies
from llmperf.findings.evidence import Setting, gather
from llmperf.findings.runs.tables import condition_key
from llmperf.show import plots

PANELS = (  # metric, title, unit
    ("output_tokens_per_s", "All requests together: more is better", "output tokens/s"),
    ("wait_ms", "Each request, waiting included: less is better", "its time for a token (ms)"),
)


def main_settings(records: Iterable) -> list[Setting]:
    """The settings of the model, dtype and loop with the most runs: lengths may differ."""
    settings = gather(records, across=True).settings

    def what(s: Setting) -> str:
        lengths = ("prompt_tokens", "new_tokens", "strategy", "level", "options", "seed", "stop")
        return condition_key({k: v for k, v in s.condition.items() if k not in lengths})

    runs = Counter()
    for s in settings:
        runs[what(s)] += len(s.rows)
    return [s for s in settings if runs and what(s) == runs.most_common(1)[0][0]]


def strategies_frame(records: Iterable) -> pd.DataFrame:
    """One row a run: every strategy in the variant without options (or the first by spelling),
    from the setting in which it ran at most levels."""
    settings = main_settings(records)
    names = dict.fromkeys(r["condition"]["strategy"] for s in settings for r in s.rows)
    rows = []
    for name in names:
        best = max(settings, key=lambda s: (len(s.levels(name)), len(s.runs(name))))
        for level in sorted(best.levels(name)):
            rows += [_row(r) for r in best.alike(name, level)]
    return pd.DataFrame(rows)


def _row(record: Mapping) -> dict:
    c, m = record["condition"], record["metrics"]
    waited, tokens = (m.get("e2el_ms") or {}).get("median"), m.get("output_tokens")
    each = tokens / m["requests_ok"] if tokens and m.get("requests_ok") else None
    env = record.get("environment") or {}
    return {
        "strategy": c["strategy"],
        "level": c["level"],
        "status": "ok",
        "output_tokens_per_s": m.get("output_tokens_per_s"),
        "wait_ms": waited / each if waited is not None and each else None,
        "repeat": record.get("repeat", 0),
        "model": c.get("model"),
        "dtype": c.get("dtype"),
        "weights": c.get("weights"),
        "quantization": c.get("quantization"),
        "machine": machine.caption(dict(env)) if "cpu_model" in env and "packages" in env else None,
        "warnings": "; ".join(record.get("warnings") or []),
    }


def figure(records: Iterable):
    """Throughput and what each request pays for it, over the requests at once. None without runs.

    Returns a matplotlib Figure.
    """
    frame = strategies_frame(records)
    if not len(frame):
        return None
    fig, axes = plots.figure(columns=2, height=3.8)
    for ax, (y, title, unit) in zip(axes, PANELS, strict=True):
        known = frame[frame[y].notna()]
        for name, rows in known.groupby("strategy", sort=False):
            plots.curve(ax, rows, "level", y, name, style=strategies.STRATEGIES[name].style)
        ax.set(xlabel="requests at once", ylabel=unit, ylim=(0, None))
        ax.set_title(title, fontsize=10)
        plots.levels(ax, sorted(frame.level.unique()))
    plots.legend(axes[1])
    plots.caption(fig, frame)
    return fig

"""One figure with all strategies of a machine, from records of whichever notebooks."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
from matplotlib.figure import Figure

from llmperf.measure import Record, frame
from llmperf.show import plots

PANELS = (  # metric, title, unit
    ("output_tokens_per_s", "All requests together: more is better", "output tokens/s"),
    ("wait_ms", "Each request, waiting included: less is better", "its time for a token (ms)"),
)
MODEL = ["model", "dtype", "quantization", "weights", "loop", "hardware", "os"]


def comparable_rows(records: Iterable[Record]) -> pd.DataFrame:
    """The runs of the model, dtype, loop and machine with the most of them: of every strategy the
    setting and variant with the most levels, and of those the fastest."""
    rows = frame(r for r in records if r.counts and not r.condition.get("arrivals"))
    if not len(rows):
        return rows
    rows = rows.reindex(columns=list(dict.fromkeys([*rows, *MODEL, "e2el_ms", "requests_ok"])))
    rows = rows[~rows.foreign & rows.output_tokens_per_s.notna()]
    model = rows.groupby(MODEL, dropna=False).ngroup()
    rows = rows[model == model.mode()[0]].copy()
    rows["wait_ms"] = rows.e2el_ms * rows.requests_ok / rows.output_tokens
    kinds = rows.groupby(["strategy", "setting", "variant"], as_index=False, sort=False).agg(
        levels=("level", "nunique"), speed=("output_tokens_per_s", "max")
    )
    best = kinds.sort_values(["levels", "speed"]).drop_duplicates("strategy", keep="last")
    return rows.merge(best[["strategy", "setting", "variant"]])


def strategies_figure(records: Iterable[Record]) -> Figure | None:
    """Throughput and what each request pays for it, over requests at once. None without runs."""
    rows = comparable_rows(records)
    if not len(rows):
        return None
    fig, axes = plots.figure(columns=2, height=3.8)
    for ax, (y, title, unit) in zip(axes, PANELS, strict=True):
        for name, runs in rows[rows[y].notna()].groupby("strategy", sort=False):
            plots.curve(ax, runs, "level", y, name)
        ax.set(xlabel="requests at once", ylabel=unit, ylim=(0, None))
        ax.set_title(title, fontsize=10)
        plots.levels(ax, sorted(rows.level.unique()))
    plots.legend(axes[1])
    plots.caption(fig, rows)
    return fig

"""Every strategy in one figure, and the slowest and the fastest one as a replay."""

from collections.abc import Iterable

import pandas as pd
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmperf import measure, models
from llmperf.decoding.trace import Trace
from llmperf.show import plots
from llmperf.show.replaying import replay
from llmperf.strategies import STRATEGIES

PANELS = (  # metric, title, unit
    ("output_tokens_per_s", "All requests together: more is better", "output tokens/s"),
    ("wait_ms", "Each request, waiting included: less is better",
     "whole answer's time / its tokens (ms)"),
)  # fmt: skip
KIND = ["strategy", "setting", "variant"]
MODEL = ["model", "dtype", "quantization", "weights", "loop", "hardware", "os"]


def comparable_rows(records: Iterable[measure.Record]) -> pd.DataFrame:
    """The runs to draw, all of the model, dtype, loop and machine that has the most runs: of each
    strategy the setting and variant with the most levels, of equals the fastest. If the option with
    the most tokens/s of all runs is not among them, its runs are added last."""
    rows = measure.frame(r for r in records if r.counts and not r.condition.get("arrivals"))
    if not len(rows):
        return rows
    needed = (*MODEL, "e2el_ms", "requests_ok", "output_tokens", "output_tokens_per_s")
    rows = rows.reindex(columns=rows.columns.union(needed, sort=False))
    rows = rows[~rows.foreign & rows.output_tokens_per_s.notna()]
    wait = rows.e2el_ms * rows.requests_ok / rows.output_tokens
    rows = rows.assign(wait_ms=wait, curve=rows.strategy)
    model = rows.groupby(MODEL, dropna=False).ngroup()
    same = rows[model == model.mode()[0]]
    kinds = same.groupby(KIND, as_index=False, sort=False).agg(
        levels=("level", "nunique"), speed=("output_tokens_per_s", "max")
    )
    best = kinds.sort_values(["levels", "speed"]).drop_duplicates("strategy", keep="last")
    drawn = same.merge(best[KIND])
    speeds = rows.groupby([*KIND, "level"]).output_tokens_per_s.transform("median")
    most = rows[speeds == speeds.max()]
    if len(drawn.merge(most[KIND])):
        return drawn
    one = most.iloc[0]
    words = f"{one.label}, {one.precision}, {one.loop}"
    return pd.concat([drawn, most.assign(curve=f"the most: {words}")])


def strategy_curves(ax: Axes, rows: pd.DataFrame, y: str, title: str, unit: str) -> None:
    """A quantity of `comparable_rows` over the requests at once, a curve a strategy."""
    for name, runs in rows[rows[y].notna()].groupby("curve", sort=False):
        plots.curve(ax, runs, "level", y, name, nth=int(name not in STRATEGIES))
    ax.set(xlabel="requests at once", ylabel=unit, ylim=(0, None))
    ax.set_title(title, fontsize=10)
    plots.levels(ax, sorted(rows.level.unique()))


def strategies_figure(records: Iterable[measure.Record]) -> Figure | None:
    """Throughput and what each request pays for it, over requests at once. None without runs."""
    rows = comparable_rows(records)
    if not len(rows):
        return None
    fig, axes = plots.figure(columns=2, height=3.8)
    for ax, panel in zip(axes, PANELS, strict=True):
        strategy_curves(ax, rows, *panel)
    plots.legend(axes[1])
    plots.caption(fig, rows)
    return fig


def replay_ends(records: Iterable[measure.Record]) -> HTML:
    """The slowest and the fastest option for the same requests, all sent at once, each by its
    median run: of the highest level at which several options answered them.

    Raises ValueError when there are none, or the tokenizer cannot be had.
    """
    counted = [r for r in records if r.counts and not r.condition.get("arrivals")]
    timed = [r for r in counted if (r.trace or {}).get("requests")]
    if counted and not timed:
        raise ValueError("these records hold no token times (a shared file has none): no replay")
    rows = measure.frame(timed).assign(record=timed)
    needed = ["foreign", "setting", "level", "label", "duration_s", "model", "weights"]
    rows = rows.reindex(columns=rows.columns.union(needed, sort=False))
    rows = rows[rows.foreign.eq(False) & rows.duration_s.notna()].sort_values("duration_s")
    groups = [g for _, g in rows.groupby(["setting", "level"]) if g.label.nunique() > 1]
    if not groups:
        raise ValueError(
            "no two options answered the same requests, so there is no replay: notebooks 04 to 06"
            " answer those of 03 in other ways"
        )
    same = max(groups, key=lambda group: (group.level.iloc[0], group.label.nunique()))
    medians = [g.iloc[(len(g) - 1) // 2] for _, g in same.groupby("label")]
    fastest, *_, slowest = sorted(medians, key=lambda row: row.duration_s)
    tokenizer = models.tokenizer_of(str(fastest.model), fastest.weights)
    try:
        traces = {row.label: Trace.from_dict(row.record.trace) for row in (slowest, fastest)}
        return replay(traces, tokenizer, fastest.work)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError("the token times of a record are damaged: no replay") from error

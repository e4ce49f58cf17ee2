"""Functions that draw data with its spread on an Axes, and captions that name the machine."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from llmperf import machine, measure, stats
from llmperf.decoding.trace import Trace
from llmperf.findings import published
from llmperf.machine import GIB
from llmperf.predict import Ledger
from llmperf.strategies import STRATEGIES

# Okabe and Ito's palette: told apart with any colour vision. Markers differ too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#8c959f"
SIZE = (7.5, 4.2)  # inches
CAPTION_COLUMNS = 120  # characters of a caption's line that fit under the narrowest figure
LINES = ("-", "--", ":", "-.")  # variants of one strategy
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "oo")


def figure(columns: int = 1, height: float = SIZE[1]) -> tuple[Figure, Axes | Sequence[Axes]]:
    """A light figure with `columns` axes side by side."""
    width = SIZE[0] * (1 if columns == 1 else 1.45)
    fig, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
    for ax in [axes] if columns == 1 else axes:
        ax.grid(True, color="#e6e8eb", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return fig, axes


def legend(ax: Axes) -> None:
    """Beside the axes, where it hides nothing."""
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def levels(ax: Axes, values: Iterable[int]) -> None:
    """A logarithmic x axis whose ticks are the levels that were measured; every tick has room."""
    ax.set_xscale("log", base=2)
    shown: list[int] = []
    for value in sorted(values, reverse=True):
        if not shown or shown[-1] >= 1.2 * value:
            shown.append(value)
    ax.set_xticks(shown, [str(v) for v in shown])
    ax.minorticks_off()


def logarithmic(ax: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5 of each power of ten."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())


def caption(
    fig: Figure, frame: pd.DataFrame | None = None, note: str = "", origin: str = ""
) -> None:
    """Under the figure: machine, model, what was drawn, and whether a run was unstable.

    `curve` and `bars` name what they drew in the artists' `gid`, from where it is read. `origin`
    replaces the machine where nothing was measured on one.
    """
    lines = [*origin.split("\n"), note] if origin else [_machines(frame), note]
    if not origin and frame is not None and len(frame):
        ok = frame[frame.status == "ok"]
        runs = zip(ok.model, ok.precision, ok.weights, strict=True)
        named = {f"{m} {p}" + " (random weights)" * (w == "random") for m, p, w in runs}
        models = ", ".join(sorted(named))
        drawn = {a.get_gid() for ax in fig.axes for a in ax.get_children()} - {None}
        words = "; ".join((models, *sorted(drawn)))
        words = words.replace(
            "band: 94 % interval; band: 95 % interval", "bands: 94 to 95 % intervals"
        )
        lines = [lines[0], words, note]
        if len(warned := ok.warnings[ok.warnings != ""]):
            lines.append(f"warning on {len(warned)} of {len(ok)} runs: {warned.iloc[0]}")
        if len(failed := frame[frame.status != "ok"]):
            lines.append(f"left out: {len(failed)} runs, {failed.status.iloc[0]}")
    text = "\n".join(textwrap.fill(line, CAPTION_COLUMNS) for line in lines if line)
    fig.supxlabel(text, fontsize=8, color="#57606a", x=0.01, ha="left", parse_math=False)


def _machines(frame: pd.DataFrame | None) -> str:
    """The machines that the records name; without records, this one."""
    if frame is None or not frame.get("machine", pd.Series(dtype=str)).notna().any():
        return machine.caption(measure.environment())
    return "; ".join(sorted(frame.machine.dropna().unique()))


def curve(
    ax: Axes,
    frame: pd.DataFrame,
    x: str,
    y: str,
    label: str,
    *,
    style: int | None = None,
    nth: int = 0,
    scale: float = 1.0,
) -> None:
    """Runs as points, their median as a line, and a band of its 95 % interval; where repeats are
    too few for one, of the lowest to the highest.

    Colour and marker are those of the strategy, or of `style`; the `nth` variant of a strategy
    has another line. `scale` multiplies y, for instance 1 / GIB. Rows without a value are left out.
    """
    rows = frame[(frame.status == "ok") & frame[y].notna()]
    names = rows["strategy"].unique() if "strategy" in rows else ()
    if style is None:
        style = STRATEGIES[names[0]].style if len(names) == 1 and names[0] in STRATEGIES else 0
    color, marker = COLORS[style % len(COLORS)], MARKERS[style % len(MARKERS)]
    samples = {key: (values * scale).tolist() for key, values in rows.groupby(x)[y]}
    found = {key: stats.median_interval(values) for key, values in samples.items()}
    ax.plot(rows[x], rows[y] * scale, marker, color=color, alpha=0.35, markersize=4, linewidth=0)
    line, face = LINES[nth % len(LINES)], color if not nth else "white"
    label = label.replace("$", r"\$")  # a name, no formula
    look = {"color": color, "marker": marker, "markerfacecolor": face, "label": label}
    repeated = [key for key, values in samples.items() if len(values) > 1]
    drawn = "points are runs, lines their medians" if repeated else "points are single runs"
    ax.plot(list(samples), [i.value for i in found.values()], line, gid=drawn, **look)
    if not repeated:
        return
    low, high = ([getattr(found[k], end) for k in repeated] for end in ("low", "high"))
    least = min(len(samples[k]) for k in repeated)
    kind = f"band: {stats.confidence(least)} interval"
    if None in low:
        low, high = ([end(samples[k]) for k in repeated] for end in (min, max))
        kind = f"band: lowest to highest of {least}"
    ax.fill_between(repeated, low, high, color=color, alpha=0.15, linewidth=0, gid=kind)


def published_groups(ax: Axes, strategy: str, y: str, **wanted) -> None:
    """The published rows of a strategy over concurrency, in grey, one line style a machine;
    crosses mark what the audit calls impossible."""
    dashes = ((0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
    rows = published.groups(strategy, **wanted).dropna(subset=y).sort_values("concurrency")
    for i, (label, group) in enumerate(rows.groupby("label")):
        look = {"linestyle": dashes[i % len(dashes)], "marker": MARKERS[3 + i % 4], "markersize": 4}
        ax.plot(group.concurrency, group[y], color=GREY, label=f"published: {label}", **look)
    if len(wrong := rows[~rows.possible]):
        look = {"color": COLORS[1], "label": "impossible: too fast for its tokens"}
        ax.plot(wrong.concurrency, wrong[y], "x", **look)


def gantt(ax: Axes, trace: Trace, named: bool = True) -> None:
    """Who ran when: per request, waiting in grey, prefill in light, decoding in full colour.

    `named` draws the legend; of several axes side by side, let the last one have it.
    """
    looks = (("waiting", "#e6e8eb"), ("prefill", COLORS[5]), ("decoding", COLORS[0]))
    for row, r in enumerate(trace.requests):
        if r.started_s is not None and r.token_s:
            times = (r.submitted_s, r.started_s, r.token_s[0], r.token_s[-1])
            for (_, color), (begin, end) in zip(looks, pairwise(times), strict=True):
                ax.barh(row, end - begin, left=begin, color=color, height=0.7)
    ax.set(xlabel="time since the start (s)", ylabel="request", yticks=range(len(trace.requests)))
    ax.invert_yaxis()
    for name, color in looks:
        ax.barh(0, 0, color=color, label=name)
    if named:
        legend(ax)


def stacked(ax: Axes, table: pd.DataFrame, unit: str) -> None:
    """Horizontal stacked bars: one bar a row of `table`, one segment a column, hatched apart."""
    labels, left = list(map(str, table.index)), pd.Series(0.0, index=table.index)
    for i, column in enumerate(table.columns):
        look = {"color": COLORS[i % len(COLORS)], "hatch": HATCHES[i % len(HATCHES)]}
        ax.barh(labels, table[column], left=left, alpha=0.85, edgecolor="white", label=column,
                **look)  # fmt: skip
        left = left + table[column]
    ax.set_xlabel(unit)
    ax.invert_yaxis()
    legend(ax)


def ledgers(ax: Axes, books: Mapping[str, Ledger], most: int = 5) -> None:
    """One stacked bar a predicted ledger: its `most` largest lines, the rest, and in grey stripes
    what arithmetic leaves open between the low and the high bound. GiB."""
    lows = pd.DataFrame(
        {label: {line.name: line.low / GIB for line in b.lines} for label, b in books.items()}
    ).T
    lows = lows[lows.max().sort_values(ascending=False, kind="stable").index]
    stacked(ax, lows.iloc[:, :most].assign(rest=lows.iloc[:, most:].sum(axis=1)), "GiB")
    low = [b.low / GIB for b in books.values()]
    width = [(b.high - b.low) / GIB for b in books.values()]
    ax.barh(list(books), width, left=low, color="white", edgecolor=GREY, hatch="////",
            linewidth=0.8, label="up to")  # fmt: skip
    legend(ax)


def bars(
    ax: Axes,
    labels: Iterable[str],
    samples: Sequence[Sequence[float]],
    unit: str,
    ticks: Sequence[Sequence[float]] | None = None,
    of: str = "the runs",
) -> None:
    """One bar a label at the median of its samples, with every sample as a tick, or with `ticks`.
    `of` says in the caption what the ticks are."""
    for i, (label, values, each) in enumerate(zip(labels, samples, ticks or samples, strict=True)):
        style = STRATEGIES[label].style if label in STRATEGIES else i
        drawn = "bars are medians" if len(values) > 1 else "bars are single runs"
        drawn += f", ticks {of}" if len(each) > 1 else ""
        color = COLORS[style % len(COLORS)]
        ax.barh(label, pd.Series(values).median(), color=color, alpha=0.8, gid=drawn)
        ax.plot(each, [label] * len(each), "|", color="black", markersize=9)
    ax.set_xlabel(unit)
    ax.invert_yaxis()


def roofline(ax: Axes, limits: Mapping, points: pd.DataFrame) -> None:
    """Roofs of the dtypes in use and one marker a row of `points`, on logarithmic axes.

    `limits` is what `ceilings.measure` gives; `points` has `name`, `dtype`, `flops`, `bytes` (of
    one step) and `seconds`. Below the slope memory is the limit.
    """
    bandwidth = limits["read_bytes_per_s"]["median"]
    intensity = points.flops / points.bytes
    lowest, highest = intensity.min() / 3, intensity.max() * 8
    for i, dtype in enumerate(points["dtype"].drop_duplicates()):
        measured = limits["flops_per_s"].get(dtype)  # None: only the slope is known
        peak = measured["median"] if measured else math.inf
        xs = [lowest, peak / bandwidth, 3 * peak / bandwidth] if measured else [lowest]
        xs.append(max(highest, *xs))
        ys = [min(x * bandwidth, peak) / 1e9 for x in xs]
        ax.plot(xs, ys, "--" if i else "-", color=GREY, label=f"roof, {dtype}")
    for i, (x, row) in enumerate(zip(intensity, points.itertuples(), strict=True)):
        look = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        ax.plot(x, row.flops / row.seconds / 1e9, ls="", markersize=8, label=row.name, **look)
    ax.set(xscale="log", yscale="log", xlabel="FLOPs for each byte that must move")
    ax.set_ylabel("GFLOP/s")
    legend(ax)

"""Two figures of speed: points under the roofline, and a timeline of decode steps."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes

from llmperf.show import profiling
from llmperf.show.plots import COLORS, GREY, MARKERS, legend

KIND_COLORS = {
    "matrix products": COLORS[0],
    "attention": COLORS[1],
    profiling.OTHER: COLORS[4],
}
HATCHES = {"matrix products": "", "attention": "////", profiling.OTHER: ".."}


def roofline(ax: Axes, limits: Mapping, points: pd.DataFrame) -> None:
    """Roofs of the dtypes in use and one marker a row of `points`.

    `limits` is what `ceilings.measure` gives; `points` has `name`, `dtype`, `flops`, `bytes` (of
    one step) and `seconds`. Both axes are logarithmic; below the slope memory is the limit.
    """
    bandwidth = limits["read_bytes_per_s"]["median"]
    intensity = points.flops / points.bytes
    lowest, highest = intensity.min() / 3, intensity.max() * 8
    for i, dtype in enumerate(points["dtype"].drop_duplicates()):
        peak = limits["flops_per_s"][dtype]["median"]
        xs = [lowest, peak / bandwidth, max(highest, 3 * peak / bandwidth)]
        ys = [min(x * bandwidth, peak) / 1e9 for x in xs]
        ax.plot(xs, ys, "--" if i else "-", color=GREY, label=f"roof, {dtype}")
    for i, (x, row) in enumerate(zip(intensity, points.itertuples(), strict=True)):
        look = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        ax.plot(x, row.flops / row.seconds / 1e9, ls="", markersize=8, label=row.name, **look)
    ax.set(xscale="log", yscale="log", xlabel="FLOPs for each byte that must move")
    ax.set_ylabel("GFLOP/s")
    legend(ax)


def timeline(ax: Axes, lanes: Mapping[str, pd.DataFrame]) -> None:
    """A lane for each entry of `lanes` (rows of `profiling.profile_steps`), another for its GPU.

    Colour and hatch give the kind of operation, thin lines the ends of steps; white is Python, and
    kernels that have no name.
    """
    bars = {
        f"{label}\n{where}": rows[rows["where"] == where]
        for label, rows in lanes.items()
        for where in ("processor", "GPU")
        if (rows["where"] == where).any()
    }
    for lane, found in enumerate(bars.values()):
        steps = found[found.kind == profiling.STEP]
        ends = [*steps.start_ms, *(steps.start_ms + steps.ms)]
        ax.vlines(ends, lane - 0.45, lane + 0.45, color="black", linewidth=0.8)
        for kind, color in KIND_COLORS.items():
            of_kind = found[found.kind == kind]
            spans = list(zip(of_kind.start_ms, of_kind.ms, strict=True))
            ax.broken_barh(
                spans, (lane - 0.35, 0.7), facecolor=color, hatch=HATCHES[kind],
                edgecolor="white", linewidth=0, label=kind if not lane else None,
            )  # fmt: skip
    ax.set_yticks(range(len(bars)), list(bars))
    ax.set_xlabel("time since the first step began (ms)")
    ax.invert_yaxis()
    legend(ax)

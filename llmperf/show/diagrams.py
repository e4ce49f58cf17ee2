"""Diagrams of ideas: what a step computes, who holds the lock, which slot has which request."""

from heapq import heappop, heappush
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from llmperf.decoding.trace import Trace
from llmperf.show.plots import COLORS, GREY

LIGHT = "#e6e8eb"
LANES = {LIGHT: "waits for the lock", COLORS[1]: "Python: holds it", COLORS[5]: "operators"}


def positions(ax: Axes, prompt: int, new: int, loop: str) -> int:
    """What each step of a loop computes: a row a step, a column a position of the text. Gives the
    number of positions that are computed in all."""
    grid = np.zeros((new, prompt + new - 1))  # 0: not there yet, 1: kept, 2: computed
    for step in range(new):
        text = prompt + step
        grid[step, :text] = 2 if loop == "recompute" or not step else 1
        grid[step, text - 1] = 2
    colors = ListedColormap(["white", LIGHT, COLORS[0]])
    ax.pcolormesh(grid, cmap=colors, edgecolor="white", vmin=0, vmax=2)
    computed = int((grid == 2).sum())
    ax.axvline(prompt, color="black", lw=0.8)  # the end of the prompt
    places, steps = range(0, prompt + new - 1, 2), range(0, new, 2)
    ax.set_xticks([i + 0.5 for i in places], [str(i + 1) for i in places])
    ax.set_yticks([i + 0.5 for i in steps], [str(i + 1) for i in steps])
    ax.set(xlabel="position in the text (line: end of the prompt)", ylabel="step")
    ax.set_title(f"{loop}: {computed} positions computed", fontsize=10)
    ax.invert_yaxis()
    marks = {"computed": COLORS[0]} | ({"kept in the cache": LIGHT} if loop != "recompute" else {})
    handles = [Patch(color=color, label=label) for label, color in marks.items()]
    ax.legend(handles=handles, frameon=False, fontsize=8)
    return computed


def named_times(ax: Axes, trace: Trace, row: int) -> None:
    """Arrows under one request of a `plots.gantt`: its TTFT, its first ITL, and its e2el."""
    r = trace.requests[row]
    sent, first, second, last = r.submitted_s, r.token_s[0], r.token_s[1], r.token_s[-1]
    arrow = {"arrowstyle": "<->", "lw": 0.8, "shrinkA": 0, "shrinkB": 0}
    look = {"va": "center", "fontsize": 8, "backgroundcolor": "white"}
    for down, word, begin, end in (
        (0.6, "TTFT", sent, first),
        (0.6, "ITL", first, second),
        (1.0, "e2el", sent, last),
    ):
        ax.annotate("", (end, row + down), (begin, row + down), arrowprops=arrow)
        short = end - begin < 0.2 * (last - sent)  # no room for the word in the arrow
        place, side = (1.01 * end, "left") if short else ((begin + end) / 2, "center")
        ax.text(place, row + down, word, ha=side, **look)
    ax.set_ylim(bottom=max(*ax.get_ylim(), row + 1.4))


def lock_lanes(ax: Axes, threads: int, lock_ms: float, operator_ms: float) -> float:
    """Simulated threads with a core each: each of three tokens takes the lock first, and then runs
    operators without it. Gives the ms until the last one ends."""
    asking = [(0.0, thread, 3) for thread in range(threads)]  # when, who, tokens left
    free = end = 0.0
    while asking:
        asked, thread, left = heappop(asking)
        start = max(asked, free)
        free = start + lock_ms
        end = free + operator_ms
        for (begin, until), color in zip(pairwise((asked, start, free, end)), LANES, strict=True):
            ax.barh(thread, until - begin, left=begin, color=color, height=0.8)
        if left > 1:
            heappush(asking, (end, thread, left - 1))
    for color, label in LANES.items():
        ax.barh(0, 0, color=color, label=label)
    ax.set(xlabel="time (ms)", ylabel="thread", yticks=range(threads))
    ax.invert_yaxis()
    return end


def slots(ax: Axes, trace: Trace) -> None:
    """A lane a request at a time: a bar from its start to its last token, with its number."""
    ends: list[float] = []  # of the last request in each slot
    answered = (r for r in trace.requests if r.started_s is not None and r.token_s)
    for r in sorted(answered, key=lambda r: (r.started_s, r.id)):
        slot = next((i for i, end in enumerate(ends) if end <= r.started_s), len(ends))
        ends[slot : slot + 1] = [r.token_s[-1]]
        width = r.token_s[-1] - r.started_s
        ax.barh(slot, width, left=r.started_s, color=COLORS[0], edgecolor="white")
        ax.annotate(str(r.id + 1), (r.started_s, slot), (2, 0), textcoords="offset points",
                    va="center", fontsize=7, color="white")  # fmt: skip
    ax.axvline(max(ends, default=0), color=GREY, lw=0.8)
    ax.set(xlabel="time (s)", ylabel="slot", yticks=range(len(ends)), xlim=(0, None))
    ax.invert_yaxis()

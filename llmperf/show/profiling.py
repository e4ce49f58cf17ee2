"""What the processor and the GPU do during a few decode steps, by torch.profiler."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pandas as pd
from matplotlib.axes import Axes

from llmperf import decoding
from llmperf.decoding.requests import Request
from llmperf.decoding.sampling import GREEDY
from llmperf.models import Model
from llmperf.show.plots import COLORS, legend

KINDS = {
    "matrix products": ("linear", "mm", "addmm", "bmm", "matmul", "gemm", "gemv"),
    "attention": ("attention", "attend", "sdpa", "flash", "fmha"),
}
OTHER = "other operations"
STEP = "decode step"
LOOKS = {  # colour and hatch of a kind
    "matrix products": (COLORS[0], ""),
    "attention": (COLORS[1], "////"),
    OTHER: (COLORS[4], ".."),
}


def profile_steps(
    model: Model, loop: str = "cached", prompt_tokens: int = 32, steps: int = 3
) -> pd.DataFrame:
    """Every outermost operation of `steps` decode steps, after a prefill and two more to warm up.

    Columns: `where` (processor or GPU), `step` (from 0; of a GPU's kernel None), `name`, `kind`,
    `start_ms` from the first step's start, `ms`. Rows of the kind "decode step" span whole steps.
    Profiling costs time itself: read the shares, not the totals.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    request = Request(0, tuple(range(10, 10 + prompt_tokens)), 3 + steps)
    running = decoding.decode(model, [request], loop=loop, sampling=GREEDY)
    for _ in range(3):
        next(running)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (model.device != "cpu")
    with _quiet(), profile(activities=activities) as profiler:
        for step in range(steps):
            with record_function(f"{STEP} {step}"):
                next(running)
    running.close()
    return rows_of(profiler.events())


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's native code announces its start and stop on the error stream."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def rows_of(events) -> pd.DataFrame:
    """The events of torch.profiler as the rows of `profile_steps`."""

    def on_gpu(event) -> bool:
        return "CPU" not in str(event.device_type)

    spans = [e for e in events if e.name.startswith(STEP) and not on_gpu(e)]
    origin = min(e.time_range.start for e in spans)
    found = [(e, i) for i, span in enumerate(spans) for e in (span, *_operations(span))]
    # The profiler draws a step again above its kernels: that is no kernel.
    found += [(e, None) for e in events if on_gpu(e) and not e.name.startswith(STEP)]
    return pd.DataFrame(
        {
            "where": "GPU" if on_gpu(event) else "processor",
            "step": step,
            "name": event.name,
            "kind": STEP if event.name.startswith(STEP) else kind_of(event.name),
            "start_ms": (event.time_range.start - origin) / 1e3,
            "ms": event.time_range.elapsed_us() / 1e3,
        }
        for event, step in found
    )


def _operations(event) -> list:
    """The outermost operations inside `event`, those of a compiled graph instead of the graph."""
    found = []
    for child in event.cpu_children:
        graph = "CompiledFxGraph" in child.name or child.name.startswith("Torch-Compiled Region")
        found += _operations(child) if graph else [child]
    return found


def kind_of(name: str) -> str:
    """The kind of an operation or kernel by its name: aten::linear is a matrix product."""
    lower = name.lower()
    found = (kind for kind, marks in reversed(KINDS.items()) if any(m in lower for m in marks))
    return next(found, OTHER)


def shares(rows: pd.DataFrame) -> pd.Series:
    """The share of the steps' time on the processor that each kind of operation takes."""
    rows = rows[rows["where"] == "processor"]
    times = rows.groupby("kind").ms.sum()
    found = times.drop(STEP) / times[STEP]
    found["between operations"] = 1 - found.sum()
    return found


def timeline(ax: Axes, lanes: Mapping[str, pd.DataFrame]) -> None:
    """A lane for each entry of `lanes` (rows of `profile_steps`), another for its GPU.

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
        steps = found[found.kind == STEP]
        ends = [*steps.start_ms, *(steps.start_ms + steps.ms)]
        ax.vlines(ends, lane - 0.45, lane + 0.45, color="black", linewidth=0.8)
        for kind, (color, hatch) in LOOKS.items():
            of_kind = found[found.kind == kind]
            spans = list(zip(of_kind.start_ms, of_kind.ms, strict=True))
            ax.broken_barh(
                spans, (lane - 0.35, 0.7), facecolor=color, hatch=hatch,
                edgecolor="white", linewidth=0, label=kind if not lane else None,
            )  # fmt: skip
    ax.set_yticks(range(len(bars)), list(bars))
    ax.set_xlabel("time since the first step began (ms)")
    ax.invert_yaxis()
    legend(ax)

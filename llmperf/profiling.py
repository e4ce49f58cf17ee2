"""What the processor and the GPU do during a few decode steps, by torch.profiler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmperf import decoding
from llmperf.models import Model
from llmperf.sampling import GREEDY
from llmperf.workload import Request

if TYPE_CHECKING:
    import pandas as pd

KINDS = {
    "matrix products": ("linear", "mm", "addmm", "bmm", "matmul", "gemm", "gemv"),
    "attention": ("attention", "attend", "sdpa", "flash", "fmha"),
}
OTHER = "other operations"
STEP = "decode step"


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
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] * (model.device != "cpu")
    with profile(activities=activities) as profiler:
        for step in range(steps):
            with record_function(f"{STEP} {step}"):
                next(running)
    running.close()
    return _rows(profiler.events())


def _rows(events) -> pd.DataFrame:
    import pandas as pd

    spans = [e for e in events if e.name.startswith(STEP) and "CPU" in str(e.device_type)]
    origin = min(e.time_range.start for e in spans)
    rows = []
    for event in events:
        on_gpu = "CPU" not in str(event.device_type)
        if on_gpu and event.name.startswith(STEP):
            continue  # the profiler draws the span again above the kernels
        if on_gpu or event in spans or event.cpu_parent in spans:
            step = None if on_gpu else int((event if event in spans else event.cpu_parent).name[-1])
            rows.append(
                {
                    "where": "GPU" if on_gpu else "processor",
                    "step": step,
                    "name": event.name,
                    "kind": STEP if event in spans else kind_of(event.name),
                    "start_ms": (event.time_range.start - origin) / 1e3,
                    "ms": event.time_range.elapsed_us() / 1e3,
                }
            )
    return pd.DataFrame(rows)


def kind_of(name: str) -> str:
    """The kind of an operation or kernel by its name: aten::linear is a matrix product."""
    lower = name.lower()
    found = (kind for kind, marks in reversed(KINDS.items()) if any(m in lower for m in marks))
    return next(found, OTHER)


def shares(rows: pd.DataFrame) -> pd.Series:
    """Of the processor's time in the steps, the share of each kind; the rest is between them."""
    rows = rows[rows["where"] == "processor"]
    whole = rows[rows.kind == STEP].ms.sum()
    found = rows[rows.kind != STEP].groupby("kind").ms.sum() / whole
    found["between operations"] = 1 - found.sum()
    return found

"""What the processor does during a few decode steps, by torch.profiler."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd

from llmperf import decoding
from llmperf.decoding.requests import GREEDY, Request
from llmperf.models import Model

KINDS = {"matrix products": ("linear", "mm", "matmul"), "attention": ("attention",)}
OTHER = "other operations"
STEP = "decode step"


def profile_steps(
    model: Model, loop: str = "cached", prompt_tokens: int = 32, steps: int = 3
) -> pd.DataFrame:
    """Every outermost operation on the processor in decode steps, after a prefill and two more.

    Columns: `step` (from 0), `name`, `kind`, `ms`. Rows of the kind "decode step" are whole steps.
    Profiling costs time itself: read the shares, not the totals.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    request = Request(0, tuple(range(10, 10 + prompt_tokens)), 3 + steps)
    running = decoding.decode(model, [request], loop=loop, sampling=GREEDY)
    for _ in range(3):
        next(running)
    with _quiet(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        for step in range(steps):
            with record_function(f"{STEP} {step}"):
                next(running)
    running.close()
    return rows_of(profiler.events())


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's native code announces its start and stop on the error stream (torch 2.13)."""
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
    spans = [e for e in events if e.name.startswith(STEP) and "CPU" in str(e.device_type)]
    return pd.DataFrame(
        {
            "step": step,
            "name": event.name,
            "kind": STEP if event is span else kind_of(event.name),
            "ms": event.time_range.elapsed_us() / 1e3,
        }
        for step, span in enumerate(spans)
        for event in (span, *span.cpu_children)
    )


def kind_of(name: str) -> str:
    """The kind of an operation by its name: aten::linear is a matrix product."""
    lower = name.lower()
    found = (kind for kind, marks in reversed(KINDS.items()) if any(m in lower for m in marks))
    return next(found, OTHER)


def shares(rows: pd.DataFrame) -> pd.Series:
    """The share of the steps' time on the processor that each kind of operation takes."""
    times = rows.groupby("kind").ms.sum()
    found = times.drop(STEP) / times[STEP]
    found["between operations"] = 1 - found.sum()
    return found

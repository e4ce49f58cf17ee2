"""How many cards a load needs: a queueing simulation from the measured times of batches.

Arrivals, grouping and the choice of card are those of the server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmperf.decoding.requests import Request, Workload
from llmperf.decoding.trace import RequestTrace, Trace
from llmperf.measure import metrics


@dataclass(frozen=True)
class Curve:
    """Measured times of a batch of `rows` requests: until its first token, and for each further."""

    rows: tuple[int, ...]
    first_s: tuple[float, ...]
    step_s: tuple[float, ...]

    @classmethod
    def of(cls, traces: Sequence[Trace]) -> Curve:
        """From runs of the `batch` strategy, one batch each; medians where a size ran often."""
        seen: dict[int, list[tuple[float, float]]] = {}
        for trace in traces:
            longest = max(trace.requests, key=lambda r: len(r.token_s))
            first = longest.token_s[0] - longest.started_s
            times = first, float(np.median(np.diff(longest.token_s)))
            seen.setdefault(len(trace.requests), []).append(times)
        medians = {n: np.median(seen[n], axis=0).tolist() for n in sorted(seen)}
        return cls(tuple(medians), *map(tuple, zip(*medians.values(), strict=True)))

    def batch_s(self, rows: int) -> tuple[float, float]:
        """(time to the first token, time of each further one) of `rows` requests, interpolated;
        beyond the largest measured size the last slope is drawn on."""
        return tuple(_line(rows, self.rows, ys) for ys in (self.first_s, self.step_s))


def _line(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    if x > xs[-1] and len(xs) > 1:
        return ys[-1] + (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]) * (x - xs[-1])
    return float(np.interp(x, xs, ys))


class _Card:
    """A queue of requests and the batches that a card makes of it."""

    def __init__(self, curve: Curve, max_batch: int, window_s: float):
        self.curve, self.max_batch, self.window_s = curve, max_batch, window_s
        self.waiting: list[Request] = []
        self.done: list[RequestTrace] = []
        self.busy_until = 0.0

    def advance(self, now: float) -> None:
        """Start every batch that is due before `now`: when full, or when its first one waited."""
        while self.waiting:
            due = self.waiting[0].arrival_s + self.window_s
            if len(self.waiting) >= self.max_batch:
                due = min(due, self.waiting[self.max_batch - 1].arrival_s)
            start = max(self.busy_until, due)
            if start >= now:
                return
            batch = [r for r in self.waiting[: self.max_batch] if r.arrival_s <= start]
            del self.waiting[: len(batch)]
            first, step = self.curve.batch_s(len(batch))
            self.busy_until = start + first + step * (max(r.max_new_tokens for r in batch) - 1)
            self.done += [_answered(r, start, first, step) for r in batch]

    def unanswered(self, now: float) -> int:
        recent = self.done[-self.max_batch :]  # older batches have ended
        return len(self.waiting) + sum(r.token_s[-1] >= now for r in recent)


def _answered(r: Request, start: float, first: float, step: float) -> RequestTrace:
    times = tuple(start + first + step * k for k in range(r.max_new_tokens))
    tokens = (0,) * len(times)
    return RequestTrace(r.id, len(r.prompt_ids), r.arrival_s, r.arrival_s, start, times, tokens)


def simulate(
    work: Workload, curve: Curve, *, cards: int = 1, max_batch: int = 8, window_s: float = 0.002
) -> Trace:
    """Run the requests through `cards` simulated cards at their arrival times.

    A request goes to the card with the fewest unanswered ones, as in `Server`. An idle card waits
    `window_s` for a full batch; a batch ends with its longest request. Tokens are made up (0).
    """
    found = [_Card(curve, max_batch, window_s) for _ in range(cards)]
    for request in sorted(work.requests, key=lambda r: r.arrival_s):
        for card in found:
            card.advance(request.arrival_s)
        min(found, key=lambda c: c.unanswered(request.arrival_s)).waiting.append(request)
    for card in found:
        card.advance(math.inf)
    done = sorted((r for card in found for r in card.done), key=lambda r: r.id)
    end = max(r.token_s[-1] for r in done)
    return Trace(tuple(done), end, {"simulated": True, "cards": cards})


def cards_needed(
    work: Workload, curve: Curve, slo: dict, *, share: float = 0.9, most: int = 64, **grouping
) -> int | None:
    """The fewest cards at which `share` of the requests meet `slo`; None if `most` are too few."""
    for cards in range(1, most + 1):
        rows = metrics.per_request(simulate(work, curve, cards=cards, **grouping), "scheduled")
        if sum(metrics.meets(row, slo) for row in rows) >= share * len(rows):
            return cards
    return None

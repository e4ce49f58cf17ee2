"""How far one card carries, and how many a load needs: a queueing simulation.

It knows one thing of a card: how long a batch takes, measured (`Curve`). Arrivals, grouping into
batches and the choice of card are those of the server. What comes out is a Trace, so that a
simulated run is scored like a measured one, and checked against it.
"""

from __future__ import annotations

import heapq
from collections import deque
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

    def __post_init__(self):
        if not self.rows or len({len(self.rows), len(self.first_s), len(self.step_s)}) > 1:
            raise ValueError("a curve needs one first_s and one step_s for each of its rows")
        if list(self.rows) != sorted(set(self.rows)) or min(self.rows) < 1:
            raise ValueError(f"the rows {self.rows} must rise from 1 or more")

    @classmethod
    def of(cls, traces: Sequence[Trace]) -> Curve:
        """From runs of the `batch` strategy, one batch each; medians where a size ran often."""
        seen: dict[int, list[tuple[float, float]]] = {}
        for trace in traces:
            longest = max(trace.requests, key=lambda r: len(r.token_s))
            first = longest.token_s[0] - longest.started_s
            seen.setdefault(len(trace.requests), []).append(
                (first, float(np.median(np.diff(longest.token_s))))
            )
        rows = tuple(sorted(seen))
        medians = [np.median(seen[n], axis=0) for n in rows]
        return cls(rows, *(tuple(float(m[i]) for m in medians) for i in (0, 1)))

    def batch_s(self, rows: int) -> tuple[float, float]:
        """(time to the first token, time of each further one) of `rows` requests, interpolated.

        Beyond the largest measured size, the last slope is drawn on.
        """
        return _line(rows, self.rows, self.first_s), _line(rows, self.rows, self.step_s)


def _line(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    if x > xs[-1] and len(xs) > 1:
        slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
        return ys[-1] + slope * (x - xs[-1])
    return float(np.interp(x, xs, ys))


@dataclass
class _Card:
    waiting: deque
    busy_until: float = 0.0
    outstanding: int = 0
    due: float | None = None  # when its next batch is to be looked at


def simulate(
    work: Workload, curve: Curve, *, cards: int = 1, max_batch: int = 8, window_s: float = 0.002
) -> Trace:
    """Run the requests through `cards` simulated cards at their arrival times.

    A request goes to the card with the fewest unanswered ones, as in `serving.Server`. An idle card
    waits `window_s` for a full batch; a batch ends with its longest request, and rows that are done
    before that get their last token when it comes. Tokens are made up (0).
    """
    if cards < 1 or max_batch < 1:
        raise ValueError(f"{cards} cards with batches of {max_batch}: use at least 1 of each")
    found = [_Card(deque()) for _ in range(cards)]
    events = [(r.arrival_s, 0, i, r) for i, r in enumerate(work.requests)]
    heapq.heapify(events)
    done: list[RequestTrace] = []
    count = len(events)
    while events:
        now, kind, i, what = heapq.heappop(events)
        if kind == 0:  # a request arrives
            card = min(found, key=lambda c: c.outstanding)
            card.outstanding += 1
            card.waiting.append(what)
        elif kind == 1:  # a request has been answered
            what.outstanding -= 1
            continue
        else:  # a card may begin
            card = what
            if card.due == now:
                card.due = None
        for row in _begin(card, now, curve, max_batch, window_s):
            done.append(row)
            count += 1
            heapq.heappush(events, (row.token_s[-1], 1, count, card))
        if card.waiting and card.due is None:
            oldest = card.waiting[0].arrival_s + window_s
            card.due = max(now, card.busy_until if card.busy_until > now else oldest)
            count += 1
            heapq.heappush(events, (card.due, 2, count, card))
    end = max(r.token_s[-1] for r in done)
    return Trace(tuple(sorted(done, key=lambda r: r.id)), end, {"simulated": True, "cards": cards})


def _begin(card: _Card, now: float, curve: Curve, max_batch: int, window_s: float):
    """The rows of the next batch, if the card is free and the batch is full or has waited."""
    waited = card.waiting and now >= card.waiting[0].arrival_s + window_s
    if now < card.busy_until or not (waited or len(card.waiting) >= max_batch):
        return []
    batch = [card.waiting.popleft() for _ in range(min(max_batch, len(card.waiting)))]
    first, step = curve.batch_s(len(batch))
    card.busy_until = now + first + step * (max(r.max_new_tokens for r in batch) - 1)
    return [_row(r, now, first, step) for r in batch]


def _row(r: Request, now: float, first: float, step: float) -> RequestTrace:
    times = tuple(now + first + step * k for k in range(r.max_new_tokens))
    return RequestTrace(
        r.id, len(r.prompt_ids), r.arrival_s, r.arrival_s, now, times, (0,) * len(times)
    )


def cards_needed(
    work: Workload, curve: Curve, slo: dict, *, share: float = 0.9, most: int = 64, **grouping
) -> int | None:
    """The fewest cards at which `share` of the requests meet `slo`; None if `most` are too few."""
    for cards in range(1, most + 1):
        rows = metrics.per_request(simulate(work, curve, cards=cards, **grouping), "scheduled")
        if sum(metrics.meets(row, slo) for row in rows) >= share * len(rows):
            return cards
    return None

"""How many cards a load needs: a queueing simulation from the measured times of batches.

Arrivals, grouping and the choice of card are those of the server.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmperf.decoding.requests import Request, Workload
from llmperf.decoding.trace import RequestTrace, Trace
from llmperf.measure import metrics
from llmperf.strategies.server import ROWS, WINDOW_S


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
            gaps = np.diff(longest.token_s)
            times = first, float(np.median(gaps)) if len(gaps) else 0.0
            seen.setdefault(len(trace.requests), []).append(times)
        medians = {n: np.median(seen[n], axis=0).tolist() for n in sorted(seen)}
        return cls(tuple(medians), *map(tuple, zip(*medians.values(), strict=True)))

    def batch_s(self, rows: int) -> tuple[float, float]:
        """(time to the first token, time of each further one) of `rows` requests, interpolated;
        beyond the largest measured size the last slope is drawn on."""
        return tuple(_extended(rows, self.rows, ys) for ys in (self.first_s, self.step_s))


def _extended(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    if x > xs[-1] and len(xs) > 1:
        return ys[-1] + (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]) * (x - xs[-1])
    return float(np.interp(x, xs, ys))


def start_or_wait(arrived: Sequence[float], now: float, max_batch: int, window_s: float) -> str:
    """The server's policy: "start" when a batch is full or its first request has waited `window_s`,
    else "wait". `arrived` holds the arrival times of the requests that wait, in order."""
    full = len(arrived) >= max_batch
    return "start" if full or (arrived and now - arrived[0] >= window_s) else "wait"


class _Card:
    """A queue of requests, and the steps in which a card answers up to `max_batch` at once."""

    def __init__(
        self, curve: Curve, max_batch: int, window_s: float, joins: bool, decide: Callable
    ):
        self.curve, self.max_batch, self.joins, self.decide = curve, max_batch, joins, decide
        self.window_s = 0.0 if joins else window_s
        self.waiting: list[Request] = []
        self.running: list[tuple[Request, float, list[float]]] = []  # with start, token times
        self.done: list[RequestTrace] = []
        self.free_s = 0.0  # when the last step has ended

    def run_steps_until(self, now: float) -> None:
        """Make every step that begins before `now`."""
        while (self.running or self.waiting) and (start := self._next_start()) < now:
            room = self.max_batch - len(self.running) if self.joins or not self.running else 0
            joined = [r for r in self.waiting[:room] if r.arrival_s <= start]
            del self.waiting[: len(joined)]
            further = self.curve.batch_s(len(self.running))[1] if self.running else 0.0
            first = self.curve.batch_s(len(joined))[0] if joined else 0.0
            self.free_s = start + first + further
            self.running += [(r, start, []) for r in joined]
            for r, began, times in self.running:
                times.append(self.free_s)
                if len(times) == r.max_new_tokens:
                    length, tokens, at = len(r.prompt_ids), (0,) * len(times), r.arrival_s
                    row = RequestTrace(r.id, length, at, at, began, tuple(times), tokens)
                    self.done.append(row)
            self.running = [x for x in self.running if len(x[2]) < x[0].max_new_tokens]

    def _next_start(self) -> float:
        """An idle card asks its policy when it becomes free, at each arrival, and a nanosecond
        after the window ends (at its end, rounding could make the wait too short)."""
        if self.running:
            return self.free_s
        arrived = [r.arrival_s for r in self.waiting]
        here = bisect_right(arrived, self.free_s)
        end = max(self.free_s, arrived[0] + self.window_s + 1e-9)
        for now in sorted([self.free_s] * (here > 0) + arrived[here:] + [end]):
            waiting = arrived[: bisect_right(arrived, now)]
            if self.decide(waiting, now, self.max_batch, self.window_s) == "start":
                return now
        return math.inf

    def unanswered(self, now: float) -> int:
        recent = self.done[-self.max_batch :]  # the last step of older ones has ended
        ending = sum(r.token_s[-1] >= now for r in recent)
        return len(self.waiting) + len(self.running) + ending


def simulate(
    work: Workload,
    curve: Curve,
    *,
    cards: int = 1,
    max_batch: int = ROWS,
    window_s: float = WINDOW_S,
    joins: bool = False,
    decide: Callable = start_or_wait,
) -> Trace:
    """Run the requests through `cards` simulated cards at their arrival times.

    A request goes to the card with the fewest unanswered ones, as in `Server`. An idle card waits
    `window_s` for a full batch; with `joins` (continuous batching) a request enters at the next
    step, which its prompt lengthens, so that the window is 0. `decide` replaces `start_or_wait`.
    Tokens are made up (0). Raises ValueError for a policy that leaves requests unanswered.
    """
    found = [_Card(curve, max_batch, window_s, joins, decide) for _ in range(cards)]
    for request in sorted(work.requests, key=lambda r: r.arrival_s):
        for card in found:
            card.run_steps_until(request.arrival_s)
        min(found, key=lambda c: c.unanswered(request.arrival_s)).waiting.append(request)
    for card in found:
        card.run_steps_until(math.inf)
    if left := sum(len(card.waiting) for card in found):
        raise ValueError(f"the policy never starts {left} of {len(work.requests)} requests")
    done = sorted((r for card in found for r in card.done), key=lambda r: r.id)
    end = max(r.token_s[-1] for r in done)
    return Trace(tuple(done), end, {"simulated": True, "cards": cards})


def cards_needed(
    work: Workload, curve: Curve, slo: dict, *, most: int = 64, **grouping
) -> int | None:
    """The fewest cards with which `metrics.SHARE` of the requests meet `slo`; None: over `most`."""
    for cards in range(1, most + 1):
        rows = metrics.per_request(simulate(work, curve, cards=cards, **grouping), "scheduled")
        if sum(metrics.meets(row, slo) for row in rows) >= metrics.SHARE * len(rows):
            return cards
    return None

"""What happened: when each request was submitted, started, and when each of its tokens came.

All times are seconds since the start of the measurement, read from `time.perf_counter`, which is
one clock for all processes of a machine.
"""

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

OK, ERROR, REJECTED, EXPIRED = "ok", "error", "rejected", "expired"


@dataclass(frozen=True)
class RequestTrace:
    """One request. `scheduled_s` is when the load asked for it, `submitted_s` when it was sent."""

    id: int
    prompt_tokens: int
    scheduled_s: float
    submitted_s: float
    started_s: float | None = None
    token_s: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    status: str = OK
    reason: str | None = None
    worker: str = "0"


@dataclass(frozen=True)
class Trace:
    """One run of one strategy: its requests, how long it took (all work drained), what it noticed.

    `notes` holds what only this strategy can know: event-loop lag, GIL contention, batch sizes.
    """

    requests: tuple[RequestTrace, ...]
    duration_s: float
    notes: dict = field(default_factory=dict)

    @property
    def output_tokens(self) -> int:
        """Tokens that came out, counted."""
        return sum(len(r.tokens) for r in self.requests)

    def digest(self) -> str:
        """One SHA-256 over every request's tokens, in order of id: equal digests, equal text."""
        text = ";".join(
            f"{r.id}:{','.join(map(str, r.tokens))}"
            for r in sorted(self.requests, key=lambda r: r.id)
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict:
        """As JSON-ready values, times rounded to the microsecond."""
        rows = []
        for request in self.requests:
            row = asdict(request)
            row["token_s"] = [round(t, 6) for t in request.token_s]
            row["tokens"] = list(request.tokens)
            for key in ("scheduled_s", "submitted_s", "started_s"):
                row[key] = None if row[key] is None else round(row[key], 6)
            rows.append(row)
        return {"duration_s": round(self.duration_s, 6), "requests": rows, "notes": self.notes}

    @classmethod
    def from_dict(cls, data: dict) -> "Trace":
        """The inverse of `to_dict`."""
        requests = tuple(map(_request, data["requests"]))
        return cls(requests, data["duration_s"], data.get("notes", {}))


def _request(row: Mapping) -> RequestTrace:
    return RequestTrace(**{**row, "token_s": tuple(row["token_s"]), "tokens": tuple(row["tokens"])})


def agreement(trace: Trace, reference: Trace) -> dict:
    """Compare the tokens of the requests that both traces hold and that ended `ok`.

    `agree` of `total` have the same; `first_divergence`: (request id, token index) where the first
    one parts, or None.
    """
    expected = {r.id: r.tokens for r in reference.requests if r.status == OK}
    both = [r for r in trace.requests if r.id in expected and r.status == OK]
    parted = []
    for r in both:
        if r.tokens != (other := expected[r.id]):
            alike = [a == b for a, b in zip(r.tokens, other, strict=False)]
            parted.append(((*alike, False).index(False), r.id))
    first = min(parted)[::-1] if parted else None
    return {"agree": len(both) - len(parted), "total": len(both), "first_divergence": first}


class Recorder:
    """Collects one run's events. Safe to call from several threads."""

    def __init__(self, requests: Iterable):
        self.origin = time.perf_counter()
        self._loops: dict[str, str | None] = {}
        self._rows = {
            r.id: asdict(RequestTrace(r.id, len(r.prompt_ids), r.arrival_s, r.arrival_s))
            | {"token_s": [], "tokens": []}
            for r in requests
        }

    def now(self) -> float:
        """Seconds since the start of the run."""
        return time.perf_counter() - self.origin

    def submitted(self, id: int) -> None:
        """The request was handed to the strategy just now."""
        self._rows[id]["submitted_s"] = self.now()

    def started(self, ids: Iterable[int], worker: str = "0") -> None:
        """Work on these requests begins now."""
        now = self.now()
        for id in ids:
            self._rows[id].update(started_s=now, worker=worker)

    def ran(self, loop: str, reason: str | None = None) -> None:
        """Note which decoding loop ran, and why it was not the one asked for."""
        self._loops[loop] = reason

    def token(self, id: int, token: int, at: float | None = None) -> None:
        """A token of this request has come, at `at` on this recorder's clock (default: now)."""
        row = self._rows[id]
        row["tokens"].append(int(token))
        row["token_s"].append(self.now() if at is None else at)

    def failed(self, id: int, status: str, reason: str) -> None:
        """The request ended without its answer."""
        self._rows[id].update(status=status, reason=reason)

    def merge(self, rows: Iterable[dict]) -> None:
        """Take over an engine's rows; their `perf_counter` times become seconds of this run."""
        for row in rows:
            mine, started = self._rows[row["id"]], row["started_s"]
            mine.update(row, scheduled_s=mine["scheduled_s"], submitted_s=mine["submitted_s"])
            mine["started_s"] = None if started is None else started - self.origin
            mine["token_s"] = [t - self.origin for t in row["token_s"]]

    def trace(self, **notes) -> Trace:
        """Close the run now. Call it only after the device has been synchronised."""
        duration = self.now()
        if self._loops:
            notes["loop"] = " and ".join(sorted(self._loops))
        if reason := next(filter(None, self._loops.values()), None):
            notes["fallback"] = reason
        return Trace(tuple(map(_request, self._rows.values())), duration, notes)

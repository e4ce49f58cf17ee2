"""From a Trace to the metrics of the field: TTFT, TPOT, ITL, E2EL, throughput, goodput.

Names and definitions are those of vLLM's `benchmarks/serve.py` and of aiperf. Latencies come from
the requests that ended `ok`; the rest are counted, not timed. What the trace cannot tell is
`None`, with its reason in the `reasons` beside it.
"""

import math

import numpy as np

from llmperf import stats
from llmperf.decoding.trace import OK, RequestTrace, Trace

CLOCKS = ("submitted", "scheduled")
SLO_KEYS = ("ttft_ms", "tpot_ms", "e2el_ms")
BLOCKS = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "queue_delay_ms")
_ROUNDING_S = 2e-6  # Trace.to_dict rounds to the microsecond: two times may part by twice that


def per_request(trace: Trace, clock: str = "submitted") -> list[dict]:
    """One row per request: TTFT, TPOT, E2EL and queue delay in ms, tokens counted.

    `clock="submitted"` times from the send (vLLM); `"scheduled"` from the arrival that the load
    asked for (MLPerf LoadGen), so that a queue in front of the sender shows. What is undefined is
    `None`, and the row's `reasons` says why. Raises ValueError for times that cannot be true.
    """
    if clock not in CLOCKS:
        raise ValueError(f"clock is {clock!r}; use one of {', '.join(CLOCKS)}")
    return [_row(request, clock) for request in trace.requests]


def summarize(trace: Trace, slo: dict | None = None, clock: str = "submitted") -> dict:
    """All metrics of a run, JSON-ready, units in the names; `reasons` explains every `None`.

    Latency blocks are `{median, mad, n, p50, p90, p95, p99}` in ms (see `stats.describe`).
    `itl_ms` pools the gaps of all requests. Token counts and rates are over requests that ended
    `ok` (vLLM); the tokens of the others are in `discarded_tokens`.
    `output_tokens_per_s_per_user` is the median over requests of 1 / TPOT (aiperf).
    `slo` holds upper limits in ms for any of ttft_ms, tpot_ms, e2el_ms. Raises ValueError for an
    unknown SLO, and for times that cannot be true (backwards, NaN, after the end).
    """
    _check_slo(slo)
    rows = per_request(trace, clock)
    check_end(trace)
    good = [row for row in rows if row["status"] == OK]
    reasons: dict[str, str] = {}
    out = _latencies(trace, good, reasons)
    tokens = sum(row["output_tokens"] for row in good)
    out |= {
        "duration_s": trace.duration_s,
        "requests_ok": len(good),
        "requests_failed": len(rows) - len(good),
        "output_tokens": tokens,
        "discarded_tokens": sum(row["output_tokens"] for row in rows) - tokens,
        "output_tokens_per_s": _rate(tokens, good, trace, "output_tokens_per_s", reasons),
        "output_tokens_per_s_per_user": _per_user(good, reasons),
        "requests_per_s": _rate(len(good), good, trace, "requests_per_s", reasons),
        "peak_output_tokens_per_s": _peak(trace, reasons),
        "goodput_per_s": _goodput(good, slo, trace, reasons),
        "slo": dict(slo) if slo else None,
        "clock": clock,
    }
    return out | {"reasons": reasons}


def itl_ms(trace: Trace) -> np.ndarray:
    """Every gap between consecutive tokens in ms, pooled over `ok` requests; TTFT is not in it."""
    gaps = [np.diff(r.token_s) for r in trace.requests if r.status == OK and len(r.token_s) > 1]
    return np.concatenate(gaps) * 1e3 if gaps else np.empty(0)


def meets(row: dict, slo: dict) -> bool:
    """Whether one row of `per_request` meets all limits of `slo` (ms).

    A request of one token has no TPOT, so it cannot miss that limit (as in vLLM, which takes 0).
    """
    if row["status"] != OK or not row["output_tokens"]:
        return False
    return all(row[key] is None or row[key] <= limit for key, limit in slo.items())


def _row(r: RequestTrace, clock: str) -> dict:
    row = {"id": r.id, "status": r.status, "reason": r.reason, "prompt_tokens": r.prompt_tokens}
    row |= {"output_tokens": len(r.tokens), "worker": r.worker, "reasons": {}}
    if r.status != OK:
        why = f"the request ended as {r.status!r}"
        keys = (*SLO_KEYS, "queue_delay_ms")
        return row | dict.fromkeys(keys) | {"reasons": dict.fromkeys(keys, why)}
    _check_times(r)
    # A timer that fires a little early sends before the schedule: then the send is the start.
    start = r.submitted_s if clock == "submitted" else min(r.scheduled_s, r.submitted_s)
    first, last, n = (*(r.token_s[i] if r.token_s else None for i in (0, -1)), len(r.token_s))
    row["ttft_ms"] = (first - start) * 1e3 if n else None
    row["e2el_ms"] = (last - start) * 1e3 if n else None
    row["tpot_ms"] = (last - first) * 1e3 / (n - 1) if n > 1 else None
    row["queue_delay_ms"] = None if r.started_s is None else (r.started_s - start) * 1e3
    why_not = {
        "ttft_ms": "no token came",
        "e2el_ms": "no token came",
        "tpot_ms": f"{n} token(s) came; TPOT is defined from the second on",
        "queue_delay_ms": "when work on the request began was not observed",
    }
    row["reasons"] = {key: why for key, why in why_not.items() if row[key] is None}
    return row


def _check_times(r: RequestTrace) -> None:
    """Raise ValueError unless the request's times are finite and in order."""
    if len(r.token_s) != len(r.tokens):
        raise ValueError(
            f"request {r.id} has {len(r.tokens)} tokens and {len(r.token_s)} token times; "
            "there must be one time for each token"
        )
    started = () if r.started_s is None else (r.started_s,)
    times = np.array((r.submitted_s, *started, *r.token_s), dtype=float)
    if not (np.isfinite(times).all() and math.isfinite(r.scheduled_s)):
        raise ValueError(f"request {r.id} has a time that is not a finite number of seconds")
    steps = np.diff(times)
    if (steps < -_ROUNDING_S).any():
        i = int(np.argmin(steps))
        names = ["its submission", *["its start"] * len(started)]
        names += [f"token {k}" for k in range(len(r.token_s))]
        raise ValueError(
            f"request {r.id}: time runs backwards, {names[i + 1]} at {times[i + 1]:.6f} s "
            f"is earlier than {names[i]} at {times[i]:.6f} s"
        )


def check_end(trace: Trace) -> None:
    """Raise ValueError when the run ends before its last token, or its duration is impossible."""
    if not math.isfinite(trace.duration_s) or trace.duration_s < 0:
        raise ValueError(f"the run lasted {trace.duration_s} s; a duration is finite and above 0")
    ends = ((r.token_s[-1], r.id) for r in trace.requests if r.status == OK and r.token_s)
    last, id = max(ends, default=(0.0, None))
    if last > trace.duration_s + _ROUNDING_S:
        raise ValueError(
            f"request {id} got a token at {last:.6f} s, after the run's end at "
            f"{trace.duration_s:.6f} s; all work must be finished before the clock is read"
        )


def _check_slo(slo: dict | None) -> None:
    for key, limit in (slo or {}).items():
        if key not in SLO_KEYS:
            raise ValueError(f"unknown SLO {key!r}; use {', '.join(SLO_KEYS)}")
        if not limit > 0 or not math.isfinite(limit):
            raise ValueError(f"the SLO {key} is {limit}; it must be a number of ms above 0")


def _latencies(trace: Trace, good: list[dict], reasons: dict) -> dict:
    out = {}
    for name in BLOCKS:
        known = [row[name] for row in good if row[name] is not None] if name != "itl_ms" else None
        out[name], why = stats.describe(itl_ms(trace) if known is None else known)
        if why:
            reasons[name] = why
        if out[name]["n"] == 0:
            lacking = [row["reasons"][name] for row in good if name in row["reasons"]]
            lacking += ["no request had two tokens"] * (name == "itl_ms" and bool(good))
            reasons[name] = lacking[0] if lacking else "no request ended ok"
    return out


def _rate(count: int, good: list[dict], trace: Trace, name: str, reasons: dict) -> float | None:
    if not good:
        reasons[name] = "no request ended ok"
    elif not trace.duration_s:
        reasons[name] = "the run lasted 0 s"
    return None if name in reasons else count / trace.duration_s


def _per_user(good: list[dict], reasons: dict) -> float | None:
    speeds = [1e3 / row["tpot_ms"] for row in good if row["tpot_ms"]]
    if not speeds:
        reasons["output_tokens_per_s_per_user"] = "no request has a TPOT above 0"
        return None
    return float(np.median(speeds))


def _peak(trace: Trace, reasons: dict) -> float | None:
    """Most tokens in one of the whole seconds counted from the first submission (vLLM)."""
    good = [r for r in trace.requests if r.status == OK and r.token_s]
    if not good or trace.duration_s < 1:
        reasons["peak_output_tokens_per_s"] = (
            f"the run lasted {trace.duration_s:.3f} s; the peak is counted over whole seconds"
            if good
            else "no request ended ok with a token"
        )
        return None
    origin = min(r.submitted_s for r in good)
    seconds = np.concatenate([np.asarray(r.token_s) for r in good]) - origin
    return float(np.bincount(np.maximum(seconds, 0).astype(int)).max())


def _goodput(good: list[dict], slo: dict | None, trace: Trace, reasons: dict) -> float | None:
    if not slo:
        reasons["goodput_per_s"] = "no SLO was given"
        return None
    return _rate(sum(meets(row, slo) for row in good), good, trace, "goodput_per_s", reasons)

"""From a Trace to the metrics of the field: TTFT, TPOT, ITL, E2EL, throughput, goodput.

Names and definitions are those of vLLM's `benchmarks/serve.py` and of aiperf. Latencies come from
the requests that ended `ok`; the others are counted only. What the trace cannot tell is None, with
its reason in `reasons`.
"""

import math

import numpy as np

from llmperf import stats
from llmperf.decoding.trace import OK, RequestTrace, Trace

CLOCKS = ("submitted", "scheduled")
SLO_KEYS = ("ttft_ms", "tpot_ms", "e2el_ms")
_ROUNDING_S = 2e-6  # Trace.to_dict rounds to the microsecond: two times may part by twice that


def per_request(trace: Trace, clock: str = "submitted") -> list[dict]:
    """One row per request: TTFT, TPOT, E2EL and queue delay in ms, tokens counted.

    `clock="submitted"` times from the send (vLLM); `"scheduled"` from the arrival that the load
    asked for (MLPerf LoadGen), so that a queue in front of the sender shows. What is undefined is
    None, and the row's `reasons` says why. Raises ValueError for times that cannot be true.
    """
    if clock not in CLOCKS:
        raise ValueError(f"clock is {clock!r}; use one of {', '.join(CLOCKS)}")
    return [_row(request, clock) for request in trace.requests]


def summarize(trace: Trace, slo: dict | None = None, clock: str = "submitted") -> dict:
    """All metrics of a run, JSON-ready, units in the names; `reasons` explains every None.

    Latency blocks are `{median, mad, n, p50, p90, p95, p99}` in ms (see `stats.describe`).
    `itl_ms` pools the gaps of all requests. Token counts and rates are over requests that ended
    `ok` (vLLM); the tokens of the others are in `discarded_tokens`.
    `output_tokens_per_s_per_user` is the median over requests of 1 / TPOT (aiperf), the peak the
    most tokens in a whole second since the first submission (vLLM).
    `slo` holds upper limits in ms for any of ttft_ms, tpot_ms, e2el_ms. Raises ValueError for an
    unknown SLO, and for times that cannot be true (backwards, NaN, after the end).
    """
    for key, limit in (slo or {}).items():
        if key not in SLO_KEYS:
            raise ValueError(f"unknown SLO {key!r}; use {', '.join(SLO_KEYS)}")
        if not 0 < limit < math.inf:
            raise ValueError(f"the SLO {key} is {limit}; it must be a number of ms above 0")
    rows = per_request(trace, clock)
    check_end(trace)
    good, seconds = [row for row in rows if row["status"] == OK], trace.duration_s
    tokens = sum(row["output_tokens"] for row in good)
    speeds = [1e3 / row["tpot_ms"] for row in good if row["tpot_ms"]]
    in_time = sum(meets(row, slo or {}) for row in good)
    blocks = [_block(name, trace, good) for name in ("ttft_ms", "tpot_ms")]
    blocks += [_block(name, trace, good) for name in ("itl_ms", "e2el_ms", "queue_delay_ms")]
    out = {name: found for name, found, _ in blocks}
    reasons = {name: why for name, _, why in blocks if why}
    no_rate = "the run lasted 0 s" if good else "no request ended ok"
    rates = {
        "output_tokens_per_s": tokens / seconds if good and seconds else no_rate,
        "output_tokens_per_s_per_user": (
            float(np.median(speeds)) if speeds else "no request has a TPOT above 0"
        ),
        "requests_per_s": len(good) / seconds if good and seconds else no_rate,
        "peak_output_tokens_per_s": _peak(trace),
        "goodput_per_s": (
            "no SLO was given" if not slo else in_time / seconds if good and seconds else no_rate
        ),
    }
    reasons |= {name: value for name, value in rates.items() if isinstance(value, str)}
    return {
        **out,
        "duration_s": seconds,
        "requests_ok": len(good),
        "requests_failed": len(rows) - len(good),
        "output_tokens": tokens,
        "discarded_tokens": sum(row["output_tokens"] for row in rows) - tokens,
        **{name: None if name in reasons else value for name, value in rates.items()},
        "slo": dict(slo) if slo else None,
        "clock": clock,
        "reasons": reasons,
    }


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
    row |= {"output_tokens": len(r.tokens), "worker": r.worker}
    row |= dict.fromkeys((*SLO_KEYS, "queue_delay_ms"))
    if r.status == OK:
        _check_times(r)
        # A timer that fires a little early sends before the schedule: then the send is the start.
        start = r.submitted_s if clock == "submitted" else min(r.scheduled_s, r.submitted_s)
        n = len(r.token_s)
        if n:
            row |= {"ttft_ms": (r.token_s[0] - start) * 1e3}
            row |= {"e2el_ms": (r.token_s[-1] - start) * 1e3}
        if n > 1:
            row["tpot_ms"] = (r.token_s[-1] - r.token_s[0]) * 1e3 / (n - 1)
        if r.started_s is not None:
            row["queue_delay_ms"] = (r.started_s - start) * 1e3
        why = {
            "ttft_ms": "no token came",
            "e2el_ms": "no token came",
            "tpot_ms": f"{n} token(s) came; TPOT is defined from the second on",
            "queue_delay_ms": "when work on the request began was not observed",
        }
    else:
        why = dict.fromkeys((*SLO_KEYS, "queue_delay_ms"), f"the request ended as {r.status!r}")
    return row | {"reasons": {key: text for key, text in why.items() if row[key] is None}}


def _check_times(r: RequestTrace) -> None:
    """Raise ValueError unless the request's times are finite and in order."""
    if len(r.token_s) != len(r.tokens):
        raise ValueError(
            f"request {r.id} has {len(r.tokens)} tokens and {len(r.token_s)} token times; "
            "there must be one time for each token"
        )
    names, times = ["its submission"], [r.submitted_s]
    if r.started_s is not None:
        names, times = [*names, "its start"], [*times, r.started_s]
    names += [f"token {k}" for k in range(len(r.token_s))]
    times = np.array((*times, *r.token_s), dtype=float)
    if not (np.isfinite(times).all() and math.isfinite(r.scheduled_s)):
        raise ValueError(f"request {r.id} has a time that is not a finite number of seconds")
    steps = np.diff(times)
    if (steps < -_ROUNDING_S).any():
        i = int(np.argmin(steps))
        raise ValueError(
            f"request {r.id}: time runs backwards, {names[i + 1]} at {times[i + 1]:.6f} s "
            f"is earlier than {names[i]} at {times[i]:.6f} s"
        )


def check_end(trace: Trace) -> None:
    """Raise ValueError when the run ends before its last token, or its duration is impossible."""
    if not 0 <= trace.duration_s < math.inf:
        raise ValueError(f"the run lasted {trace.duration_s} s; a duration is finite and above 0")
    ends = ((r.token_s[-1], r.id) for r in trace.requests if r.status == OK and r.token_s)
    last, id = max(ends, default=(0.0, None))
    if last > trace.duration_s + _ROUNDING_S:
        raise ValueError(
            f"request {id} got a token at {last:.6f} s, after the run's end at "
            f"{trace.duration_s:.6f} s; all work must be finished before the clock is read"
        )


def _block(name: str, trace: Trace, good: list[dict]) -> tuple[str, dict, str | None]:
    """One latency over the `ok` requests: its name, its description, and why it lacks something."""
    if name == "itl_ms":
        found, why = stats.describe(itl_ms(trace))
        missing = ["no request had two tokens"] if good else []
    else:
        found, why = stats.describe([row[name] for row in good if row[name] is not None])
        missing = [row["reasons"][name] for row in good if row[name] is None]
    if not found["n"]:
        why = next(iter(missing), "no request ended ok")
    return name, found, why


def _peak(trace: Trace) -> float | str:
    """Most tokens in one whole second, or why there is none."""
    good = [r for r in trace.requests if r.status == OK and r.token_s]
    if not good:
        return "no request ended ok with a token"
    if trace.duration_s < 1:
        return f"the run lasted {trace.duration_s:.3f} s; the peak is counted over whole seconds"
    seconds = np.concatenate([r.token_s for r in good]) - min(r.submitted_s for r in good)
    return float(np.bincount(np.maximum(seconds, 0).astype(int)).max())

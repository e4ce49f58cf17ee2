"""From a Trace to the metrics of the field: TTFT, TPOT, ITL, E2EL, throughput, goodput.

Names and definitions are those of vLLM's `benchmarks/serve.py`. Latencies come from the requests
that ended `ok`; the others are counted only. What is undefined is None, with a reason.
"""

import math
from collections.abc import Mapping

import numpy as np

from llmperf import stats
from llmperf.decoding.trace import OK, RequestTrace, Trace

CLOCKS = ("submitted", "scheduled")
SLO_KEYS = ("ttft_ms", "tpot_ms", "e2el_ms")
LATENCIES = (*SLO_KEYS, "queue_delay_ms")
SHARE = 0.9  # a load is carried when this share of its requests meets every limit
_ROUNDING_S = 2e-6  # Trace.to_dict rounds to the microsecond: two times may part by twice that


def per_request(trace: Trace, clock: str = "submitted") -> list[dict]:
    """One row per request: TTFT, TPOT, E2EL and queue delay in ms, and its tokens counted.

    `clock="submitted"` times from the send (vLLM); `"scheduled"` from the arrival that the load
    asked for (MLPerf LoadGen), so that a queue in front of the sender shows. What is undefined is
    None, and the row's `reasons` says why. Raises ValueError for times that cannot be true.
    """
    if clock not in CLOCKS:
        raise ValueError(f"clock is {clock!r}; use one of {', '.join(CLOCKS)}")
    _check_times(trace)
    return [_row(request, clock) for request in trace.requests]


def summarize(trace: Trace, slo: dict | None = None, clock: str = "submitted") -> dict:
    """All metrics of a run, JSON-ready, units in the names; `reasons` explains every None.

    Latency blocks are `{median, mad, n, p50, p90, p95, p99}` in ms (see `stats.describe`); `itl_ms`
    pools the gaps of all requests. Token counts and rates are over requests that ended `ok`.
    `slo` holds upper limits in ms for any of ttft_ms, tpot_ms, e2el_ms. Raises ValueError for an
    unknown SLO, and for times that cannot be true (backwards, NaN, after the end).
    """
    check_slo(slo or {})
    rows = per_request(trace, clock)
    good, seconds = [row for row in rows if row["status"] == OK], trace.duration_s
    samples = {key: [row[key] for row in good if row[key] is not None] for key in LATENCIES}
    samples["itl_ms"] = itl_ms(trace)
    out, reasons = {}, {}
    for name, values in samples.items():
        out[name], reasons[name] = stats.describe(values)
        if not out[name]["n"]:
            missing = [row["reasons"].get(name, "no request had two tokens") for row in good]
            reasons[name] = next(iter(missing), "no request ended ok")
    tokens = sum(row["output_tokens"] for row in good)
    counts = {"output_tokens_per_s": tokens, "requests_per_s": len(good)}
    counts["goodput_per_s"] = sum(meets(row, slo) for row in good) if slo else None
    for name, count in counts.items():
        known = count is not None and good and seconds
        out[name] = count / seconds if known else None
        if not known:
            why = "the run lasted 0 s" if good else "no request ended ok"
            reasons[name] = "no SLO was given" if count is None else why
    return {
        **out,
        "duration_s": seconds,
        "requests_ok": len(good),
        "requests_failed": len(rows) - len(good),
        "output_tokens": tokens,
        "slo": dict(slo) if slo else None,
        "clock": clock,
        "reasons": {name: why for name, why in reasons.items() if why},
    }


def check_slo(slo: Mapping) -> None:
    """Raise ValueError for a limit that is not known, or no number of ms above 0."""
    for key, limit in slo.items():
        if key not in SLO_KEYS or not isinstance(limit, int | float) or not 0 < limit < math.inf:
            raise ValueError(
                f"the SLO {key!r} is {limit!r}: give ms above 0 for any of {', '.join(SLO_KEYS)}"
            )


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
    row |= {"output_tokens": len(r.tokens), "worker": r.worker, **dict.fromkeys(LATENCIES)}
    if r.status != OK:
        why = dict.fromkeys(LATENCIES, f"the request ended as {r.status!r}")
        return row | {"reasons": why}
    # A timer that fires a little early sends before the schedule: then the send is the start.
    start = r.submitted_s if clock == "submitted" else min(r.scheduled_s, r.submitted_s)
    n, reasons = len(r.token_s), {}
    if n:
        row["ttft_ms"] = (r.token_s[0] - start) * 1e3
        row["e2el_ms"] = (r.token_s[-1] - start) * 1e3
    else:
        reasons = dict.fromkeys(("ttft_ms", "e2el_ms"), "no token came")
    if n > 1:
        row["tpot_ms"] = (r.token_s[-1] - r.token_s[0]) * 1e3 / (n - 1)
    else:
        reasons["tpot_ms"] = f"{n} token(s) came; TPOT is defined from the second on"
    if r.started_s is not None:
        row["queue_delay_ms"] = (r.started_s - start) * 1e3
    else:
        reasons["queue_delay_ms"] = "when work on the request began was not observed"
    return row | {"reasons": reasons}


def _check_times(trace: Trace) -> None:
    """Raise ValueError unless all times are finite, in order, and before the end of the run."""
    if not 0 <= trace.duration_s < math.inf:
        raise ValueError(f"the run lasted {trace.duration_s} s; it must be finite and at least 0")
    for r in trace.requests:
        if r.status != OK:
            continue
        if len(r.token_s) != len(r.tokens):
            raise ValueError(
                f"request {r.id} has {len(r.tokens)} tokens and {len(r.token_s)} token times: "
                "there must be one time for each token"
            )
        started = [] if r.started_s is None else [r.started_s]
        times = np.array([r.submitted_s, *started, *r.token_s, trace.duration_s], dtype=float)
        if not (np.isfinite(times).all() and math.isfinite(r.scheduled_s)):
            raise ValueError(f"request {r.id} has a time that is not a finite number of seconds")
        steps = np.diff(times)
        if (steps < -_ROUNDING_S).any():
            i = int(np.argmin(steps))
            names = ["its submission", *["its start" for _ in started]]
            names += [*(f"token {k}" for k in range(len(r.token_s))), "the run's end"]
            raise ValueError(
                f"request {r.id}: time runs backwards, {names[i + 1]} at {times[i + 1]:.6f} s "
                f"is earlier than {names[i]} at {times[i]:.6f} s"
            )

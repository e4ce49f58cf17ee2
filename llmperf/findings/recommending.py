"""What to run: every measured option side by side, and for an arriving load the one to choose."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil, inf
from statistics import median

import pandas as pd

from llmperf.decoding.requests import Request, Workload
from llmperf.machine import GIB, significant
from llmperf.measure import Record, capacity, frame, load, metrics
from llmperf.strategies.server import WINDOW_S

SLO = {"ttft_ms": 2000.0, "tpot_ms": 100.0}  # MLPerf's for an 8B model
ARRIVALS = 300  # simulated requests
FOREVER_S = 1e9  # a batch waits until it is full; a server groups what comes in its window
MACHINES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # the numbers that are tried
TIMES = ("output_tokens_per_s", "duration_s", "ttft_ms", "tpot_ms", "e2el_ms", "queue_delay_ms")
# Of the prediction of each run.
PREDICTED = ("read_bytes_per_s", "flops_per_s", "bound_tpot_ms", "weights_bytes")
PEAKS = ("max_device_used_bytes", "max_reserved_bytes", "max_rss_bytes")


@dataclass(frozen=True)
class Recommendation:
    """The option to run, whether it keeps what was asked, and what that rests on."""

    name: str
    share: float  # of the simulated requests, within the limits when one machine takes the load
    machines: int | None  # the fewest that carry the load; None: no number in MACHINES does
    basis: str  # `5 runs`; `2 runs: no interval`
    sentences: tuple[str, ...]  # what to run, what that rests on, what is extrapolated

    def __str__(self) -> str:
        return "\n".join(self.sentences)


def options(records: Iterable[Record]) -> pd.DataFrame:
    """One row for each setting, variant and level that counts: medians over its runs.

    `first_ms` is the time to the first token without waiting, `rows` the requests that share a
    step, `servers` the steps at the same time. Foreign engines are left out.
    """
    rows = frame(r for r in records if r.counts and r.metric("output_tokens_per_s"))
    if rows.empty:
        return rows
    rows = rows[~rows.foreign]
    first = ("label", "model", "dtype", "precision", "loop", "prompt_tokens", "limit", "arrivals",
             "rows", "servers", "joins", "served")  # fmt: skip
    used = [*TIMES, *PEAKS, *PREDICTED, *first, "output_tokens", "requests_ok"]
    rows = rows.reindex(columns=rows.columns.union(used, sort=False))
    rows["loop"] = rows.loop.astype(object).fillna("cached")
    rows["answer_tokens"] = rows.output_tokens / rows.requests_ok.fillna(rows.level)
    rows["memory_gib"] = rows[list(PEAKS)].bfill(axis=1).iloc[:, 0] / GIB
    rows[list(PREDICTED)] = rows[list(PREDICTED)].apply(pd.to_numeric, errors="coerce")
    found = rows.groupby(["setting", "variant", "level"], sort=False).agg(
        **{name: (name, "first") for name in first},
        **{name: (name, "median") for name in (*TIMES, *PREDICTED, "answer_tokens")},
        memory_gib=("memory_gib", "max"),
        runs=("status", "size"),
        warning=("warnings", "max"),
    )
    found = found.reset_index()
    found[["rows", "servers"]] = found[["rows", "servers"]].astype(int)
    found["arriving"] = found.arrivals.notna()
    found["weights_gib"] = found.weights_bytes / GIB
    found["first_ms"] = (found.ttft_ms - found.queue_delay_ms.fillna(0)).clip(lower=0)
    return found


def headline(found: pd.DataFrame) -> str:
    """What gives the most tokens/s of these `options`, against one request after another."""
    if not len(found):
        return "Nothing was measured yet."
    best = found.loc[found.output_tokens_per_s.idxmax()]
    name, speed = name_of(best), best.output_tokens_per_s
    text = f"{name[0].upper()}{name[1:]}: the most tokens here, {significant(speed)} tokens/s"
    alone = one_at_a_time(found, best)
    if alone is None or best["rows"] * best.servers == 1:
        return f"{text}."
    gain = speed / alone.output_tokens_per_s
    return f"{text}, {gain:.1f} times one request after another in {best.precision}."


def one_at_a_time(found: pd.DataFrame, best: pd.Series) -> pd.Series | None:
    """The option that computes one request at a time in the setting of `best`; of several (a batch
    of 1, one thread), the one of median speed, since the fastest would be the luckiest."""
    alone = found[(found.setting == best.setting) & (found["rows"] * found.servers == 1)]
    alone = alone.sort_values("output_tokens_per_s")
    return alone.iloc[(len(alone) - 1) // 2] if len(alone) else None


def name_of(option) -> str:
    """`batches of 8, fp32, compiled`."""
    return f"{option.label}, {option.precision}" + f", {option.loop}" * (option.loop != "cached")


def recommend(
    found: pd.DataFrame,
    load_per_s: float,
    slo: Mapping[str, float] = SLO,
    new_tokens: int | None = None,
) -> Recommendation:
    """The one of these `options` to run for `load_per_s` arriving requests a second.

    Options are ranked by the share of simulated requests within `slo` (ms), 99 % and more counting
    as equal, then by the shorter median answer. `machines` is the fewest with which the best option
    keeps 90 %. `new_tokens` is the length of an answer (default: the longest that was measured).
    """
    if not load_per_s > 0:
        raise ValueError(f"the load is {load_per_s} requests/s: it must be above 0")
    if not len(found):
        raise ValueError("no record has a speed: measure something first")
    tokens = new_tokens or int(found.answer_tokens.fillna(1).max())
    found = _nearest_lengths(found, tokens)

    def rank(o, each_per_s: float) -> tuple:
        share, answer_ms = simulated(o, each_per_s, slo, tokens)
        return share >= metrics.SHARE, min(share, 0.99), -answer_ms, o.output_tokens_per_s

    machines, best = None, None
    for n in MACHINES:
        ranked = {rank(o, load_per_s / n): o for o in found.itertuples()}
        top = max(ranked)
        best = best or ranked[top]
        if top[0]:
            machines, best = n, ranked[top]
            break
    share, answer_ms = simulated(best, load_per_s, slo, tokens)
    limits = ", ".join(f"{k.split('_')[0].upper()} {limit:g} ms" for k, limit in slo.items())
    said = f"{share:.0%} of the requests at {load_per_s:g}/s are within {limits}"
    answer_s = significant(answer_ms / 1e3)
    said += f"; a median answer of {tokens} tokens takes {answer_s} s, waiting included"
    name = name_of(best)
    what = f"Run {name}: {said}."
    if machines is None:
        what = f"Nothing here keeps the limits. Closest: {name}: {said}."
    elif machines > 1:
        what = f"One machine does not carry the load, {machines} would, each with {name}. "
        what += f"On one, {said}."
    exact = found[(found.model == best.model) & (found.precision == found["dtype"])]
    if len(exact) and best.precision != best.dtype:
        what += f" Its weights are rounded to {best.precision}, so its answers differ from those of"
        what += f" {exact.precision.iloc[0]} weights."
    runs = f"{best.runs} run{'s' * (best.runs > 1)}"
    few = ": no interval" * (best.runs < 5)
    rests = f"Rests on {runs} of {best.setting}, among {len(found)} options{few}."
    rests += f" Not quiet: {best.warning}." if best.warning else ""
    extrapolated = (f"Extrapolated: {text}" for text in _extrapolated(best, tokens))
    return Recommendation(name, share, machines, runs + few, (what, rests, *extrapolated))


def _nearest_lengths(found: pd.DataFrame, tokens: int) -> pd.DataFrame:
    """Of equal options the one measured under arrivals, else with answers of nearest length."""
    names = [name_of(o) for o in found.itertuples()]
    order = found.assign(name=names, off=(found.answer_tokens - tokens).abs())
    order = order.sort_values(["arriving", "off"], ascending=[False, True], kind="stable")
    return order.drop_duplicates("name")


def simulated(o, load_per_s: float, slo: Mapping[str, float], tokens: int) -> tuple[float, float]:
    """(share of arriving requests within the limits, median ms of an answer with its waiting).

    An option is `servers` queues; each takes up to `rows` requests at once. A batch begins when
    it is full, unless a server groups what waits.
    """
    step_ms = o.tpot_ms if tokens > 1 else 0.0
    if o.first_ms != o.first_ms or step_ms != step_ms:
        return 0.0, inf
    # Where nobody joins, an answer is modelled as two steps: its first token, then all the others.
    steps = tokens - 1 if not o.joins else 1
    curve = capacity.Curve((o.rows,), (o.first_ms / 1e3,), (step_ms * steps / 1e3,))
    window_s = WINDOW_S if o.arriving or o.served or o.rows == 1 else FOREVER_S
    requests = _arrivals(load_per_s, o.rows, tokens if o.joins else 2)
    how = {"cards": o.servers, "max_batch": o.rows, "window_s": window_s, "joins": o.joins}
    trace = capacity.simulate(requests, curve, **how)
    ttft = [(r.token_s[0] - r.scheduled_s) * 1e3 for r in trace.requests]
    answer = [(r.token_s[-1] - r.scheduled_s) * 1e3 for r in trace.requests]
    within = step_ms <= slo.get("tpot_ms", inf)
    kept = [
        within and first <= slo.get("ttft_ms", inf) and whole <= slo.get("e2el_ms", inf)
        for first, whole in zip(ttft, answer, strict=True)
    ]
    return sum(kept) / len(kept), median(answer)


@cache
def _arrivals(load_per_s: float, rows: int, tokens: int) -> Workload:
    """Poisson arrivals; as many as fill whole batches, so that no last one waits for ever."""
    n = ceil(ARRIVALS / rows) * rows
    work = Workload(tuple(Request(i, (0,), tokens) for i in range(n)))
    return load.arriving(work, "poisson", rate_per_s=load_per_s)


def _extrapolated(o, tokens: int) -> Iterator[str]:
    if not o.arriving:
        yield "the arrivals: measured with all requests at once, waiting is simulated"
    if abs(tokens - o.answer_tokens) > 0.01 * o.answer_tokens:
        yield f"the length: from answers of {o.answer_tokens:g} to {tokens:g} tokens"

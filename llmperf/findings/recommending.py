"""What to run: every measured option side by side, and for an arriving load the one to choose.

An option is judged by simulated arrivals: the share of requests that stay within the limits. Its
times are taken from records, or from arithmetic where there are none; the answer says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, inf, nan
from statistics import median

import pandas as pd

from llmperf import models, predict
from llmperf.decoding.requests import Request, Workload
from llmperf.measure import Record, capacity, frame, load
from llmperf.measure.frames import work
from llmperf.strategies import STRATEGIES

SLO = {"ttft_ms": 2000.0, "tpot_ms": 100.0}  # MLPerf's for an 8B model
SHARE = 0.9  # of the requests must be within the limits
ARRIVALS = 300  # simulated requests
GROUP_WINDOW_S, FOREVER_S = 0.002, 1e9  # a server groups what comes in that time; a batch waits
MACHINES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # the numbers that are tried
GIB = 2**30
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TIMES = ("output_tokens_per_s", "duration_s", "ttft_ms", "tpot_ms", "e2el_ms")


@dataclass(frozen=True)
class Recommendation:
    """The option to run, whether it keeps what was asked, and what that rests on."""

    name: str
    option: object  # a row of `options`
    share: float  # of the simulated requests, within the limits
    machines: int | None  # as many as this carry the load; None: no number of them does
    why: str
    rests_on: str
    extrapolated: tuple[str, ...]

    @property
    def keeps(self) -> bool:
        """Whether one machine carries the load within the limits."""
        return self.machines == 1

    def __str__(self) -> str:
        further = (f"Extrapolated: {text}" for text in self.extrapolated)
        return "\n".join([self.why, self.rests_on, *further])


def options(records: Iterable[Record]) -> pd.DataFrame:
    """One row for each setting, variant and level that counts: medians over its runs.

    `first_ms` is the time to the first token without waiting, `rows` the requests that share a
    step, `servers` the steps at the same time. Foreign engines are left out.
    """
    counted = [r for r in records if r.counts and r.metric("output_tokens_per_s")]
    groups: dict[tuple, list[tuple[Mapping, Record]]] = {}
    for row, r in zip(frame(counted).to_dict("records"), counted, strict=True):
        if not row["foreign"]:
            key = (row["setting"], row["variant"], row["level"])
            groups.setdefault(key, []).append((row, r))
    return pd.DataFrame([_option(*zip(*group, strict=True)) for group in groups.values()])


def _option(rows: Sequence[Mapping], records: Sequence[Record]) -> dict:
    def middle(name: str) -> float:
        known = (r.get(name) for r in rows)
        return median([x for x in known if x is not None and x == x] or [nan])

    def peak(channel: str) -> float:
        return max((r.get(f"max_{channel}_bytes") or nan for r in rows), default=nan) / GIB

    first, c = rows[0], records[0].condition
    strategy, level, chosen = STRATEGIES[c["strategy"]], c["level"], c.get("options") or {}
    waited = middle("queue_delay_ms")
    tokens = middle("output_tokens") / (records[0].metric("requests_ok") or level)
    held = [x for x in map(peak, ("device_used", "reserved", "rss")) if x == x]
    return {
        **{name: first[name] for name in ("label", "level", "variant", "setting")},
        "precision": c.get("quantization") or c.get("dtype") or "unknown dtype",
        "loop": c.get("loop", "cached"),
        **{name: middle(name) for name in TIMES},
        "first_ms": max(middle("ttft_ms") - (waited if waited == waited else 0), 0),
        "answer_tokens": tokens,
        "memory_gib": held[0] if held else nan,
        "runs": len(rows),
        "rows": strategy.rows_per_step(level, chosen),
        "servers": strategy.threads(level, chosen) * max(1, strategy.processes(level, chosen)),
        "arriving": bool(c.get("arrivals")),
        "rate_per_s": (c.get("arrivals") or {}).get("rate_per_s", nan),
        "warning": next((r["warnings"] for r in rows if r["warnings"]), ""),
    }


def headline(records: Iterable[Record]) -> str:
    """The answer in one sentence: what gives the most tokens/s here, against one after another."""
    found = options(records)
    if not len(found):
        return "Nothing was measured yet."
    best = found.loc[found.output_tokens_per_s.idxmax()]
    name, speed = name_of(best), best.output_tokens_per_s
    text = f"{name[0].upper()}{name[1:]}: the most tokens here, {speed:.3g} tokens/s"
    alike = found[(found.precision == best.precision) & (found.loop == best.loop)]
    alone = alike[alike.rows * alike.servers == 1]
    if not len(alone) or best.name in alone.index:
        return f"{text}."
    gain = speed / alone.output_tokens_per_s.max()
    return f"{text}, {gain:.1f} times one request after another."


def name_of(option) -> str:
    """`batches of 8, fp32, compiled`."""
    return f"{option.label}, {option.precision}" + f", {option.loop}" * (option.loop != "cached")


def recommend(
    records: Iterable[Record],
    load_per_s: float,
    slo: Mapping[str, float] = SLO,
    *,
    model: str | None = None,
    new_tokens: int | None = None,
    memory_bytes: float | None = None,
) -> Recommendation:
    """The option to run for `load_per_s` arriving requests a second within `slo` (ms).

    Of the options that keep 90 % of the simulated requests within the limits: those measured at
    this length and load first, then the one with the shortest median answer. Of none: the one that
    keeps most. `new_tokens` is the length of an answer (default: the longest that was measured).
    Raises ValueError when no record is of this model.
    """
    if not load_per_s > 0:
        raise ValueError(f"the load is {load_per_s} requests/s: it must be above 0")
    found = options(r for r in records if model in (None, r.condition.get("model")))
    if not len(found):
        raise ValueError(f"no record of {model or 'any model'} has a speed: measure it first")
    return choose(found, load_per_s, slo, new_tokens, memory_bytes)


def choose(
    found: pd.DataFrame,
    load_per_s: float,
    slo: Mapping[str, float] = SLO,
    new_tokens: int | None = None,
    memory_bytes: float | None = None,
) -> Recommendation:
    """The recommendation among these options: see `recommend`."""
    tokens = new_tokens or int(found.answer_tokens.max())
    candidates = list(found.itertuples())
    if memory_bytes is not None:
        candidates = [o for o in candidates if o.memory_gib * GIB <= memory_bytes]

    def rank(o, each_per_s: float) -> tuple:
        share, answer_ms = simulated(o, each_per_s, slo, tokens)
        keeps = share >= SHARE
        same = keeps and _same_length(o, tokens) + _same_load(o, each_per_s)
        return keeps, same, min(share, 0.99), -answer_ms, o.output_tokens_per_s

    machines, best = None, None
    for n in MACHINES if candidates else ():
        ranked = {rank(o, load_per_s / n): o for o in candidates}
        if max(ranked)[0]:
            machines, best = n, ranked[max(ranked)]
            break
        best = best or ranked[max(ranked)]
    best = best or next(found.itertuples())
    share, answer_ms = simulated(best, load_per_s, slo, tokens)
    limits = ", ".join(f"{k.split('_')[0].upper()} {limit:g} ms" for k, limit in slo.items())
    said = f"{share:.0%} of the requests at {load_per_s:g}/s are within {limits}"
    said += f"; a median answer takes {answer_ms / 1e3:.3g} s, waiting included"
    name = name_of(best)
    why = f"Run {name}: {said}."
    if not candidates:
        why = f"No option fits {memory_bytes / GIB:.2f} GiB."
    elif machines is None:
        why = f"Nothing here keeps the limits. Closest: {name}: {said}."
    elif machines > 1:
        why = f"One machine does not carry the load, {machines} would, each with {name}. "
        why += f"On one, {said}."
    basis = f"{best.runs} runs of {best.setting}" if best.runs else f"no record: {best.setting}"
    rests = f"Rests on {basis}, among {len(found)} options."
    rests += f" Not quiet: {best.warning}." if best.warning else ""
    extrapolated = tuple(_extrapolated(best, load_per_s, tokens))
    return Recommendation(name, best, share, machines, why, rests, extrapolated)


def simulated(o, load_per_s: float, slo: Mapping[str, float], tokens: int) -> tuple[float, float]:
    """(share of arriving requests within the limits, median ms of an answer with its waiting).

    An option is `servers` queues; each takes up to `rows` requests at once. A batch that was not
    measured under arrivals waits until it is full.
    """
    step_ms = o.tpot_ms if tokens > 1 else 0.0
    if o.first_ms != o.first_ms or step_ms != step_ms:
        return 0.0, inf
    # Two tokens stand for the answer: its first, and all further ones in one step.
    curve = capacity.Curve((o.rows,), (o.first_ms / 1e3,), (step_ms * (tokens - 1) / 1e3,))
    window_s = GROUP_WINDOW_S if o.arriving or o.rows == 1 else FOREVER_S
    requests = _arrivals(load_per_s, o.rows)
    trace = capacity.simulate(requests, curve, cards=o.servers, max_batch=o.rows, window_s=window_s)
    ttft = [(r.token_s[0] - r.scheduled_s) * 1e3 for r in trace.requests]
    answer = [(r.token_s[-1] - r.scheduled_s) * 1e3 for r in trace.requests]
    kept = [
        first <= slo.get("ttft_ms", inf)
        and step_ms <= slo.get("tpot_ms", inf)
        and whole <= slo.get("e2el_ms", inf)
        for first, whole in zip(ttft, answer, strict=True)
    ]
    return sum(kept) / len(kept), median(answer)


@cache
def _arrivals(load_per_s: float, rows: int) -> Workload:
    """Poisson arrivals; as many as fill whole batches, so that no last one waits for ever."""
    n = ceil(ARRIVALS / rows) * rows
    times = load.arrival_times("poisson", n, rate_per_s=load_per_s)
    return Workload(tuple(Request(i, (0,), 2, arrival_s=float(t)) for i, t in enumerate(times)))


def _same_length(o, tokens: int) -> bool:
    return abs(tokens - o.answer_tokens) <= 0.01 * o.answer_tokens


def _same_load(o, load_per_s: float) -> bool:
    return o.arriving and abs(o.rate_per_s - load_per_s) <= 0.1 * load_per_s


def _extrapolated(o, load_per_s: float, tokens: int) -> Iterator[str]:
    if not o.runs:
        yield "all of it: a bound from bandwidth and arithmetic, which no run reaches"
        return
    if o.arriving and not _same_load(o, load_per_s):
        yield f"the load: measured at {o.rate_per_s:g} requests/s, simulated at {load_per_s:g}"
    if not o.arriving:
        yield "the arrivals: measured with all requests at once, waiting is simulated"
    if not _same_length(o, tokens):
        yield f"the length: from answers of {o.answer_tokens:g} to {tokens:g} tokens"
    if o.runs < 5:
        yield f"the spread: {o.runs} runs give no interval"


def predicted(model: str, card: str, dtype: str = "fp16", **lengths) -> pd.DataFrame:
    """Continuous batching of a preset on a card of the data sheet: arithmetic, no record at all.

    Each of n slots answers one request at the step time of n rows. `lengths`: prompt_tokens (32)
    and new_tokens (128). Times are bounds, which no run beats. Raises ValueError when the model
    does not fit.
    """
    known, quantization = predict.card(card), "awq" if "4bits" in model else None
    spec = predict.RunSpec(models.shape_of(model), dtype, quantization, **lengths)
    run = {k: getattr(spec, k) for k in ("dtype", "quantization", "prompt_tokens", "new_tokens")}
    fits = predict.largest(spec, "rows", int(known.memory_gib * GIB))
    if not fits.at_best:
        raise ValueError(f"{model} in {dtype} does not fit {known.name}: choose a larger card")
    found = []
    for n in (n for n in BATCHES if n <= max(1, fits.surely)):
        middle = run["prompt_tokens"] + run["new_tokens"] // 2
        rows, card_limits = replace(spec, rows=n), (known.bandwidth_bytes_s, known.fp16_flops_s)
        step_s = predict.decode_bound(rows, middle, *card_limits).seconds
        prefill = predict.forward(rows, run["prompt_tokens"])
        first_s = predict.bound(prefill, *card_limits).seconds
        whole_s = first_s + (run["new_tokens"] - 1) * step_s
        memory = predict.memory(rows)
        found.append({
            "label": STRATEGIES["continuous"].words(n, {"max_batch": n}),
            "level": n,
            "setting": f"{work({'model': model, **run})}, {known.name}, data sheet alone",
            "precision": quantization or dtype,
            "loop": "cached",
            "output_tokens_per_s": n * run["new_tokens"] / whole_s,
            "tpot_ms": step_s * 1e3,
            "first_ms": first_s * 1e3,
            "answer_tokens": run["new_tokens"],
            "memory_gib": memory.high / GIB,
            "rows": 1,
            "servers": n,
        })  # fmt: skip
    return pd.DataFrame(found).assign(runs=0, arriving=False, warning="")

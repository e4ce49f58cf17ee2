"""What to choose: every strategy side by side, and for a load and its limits the one to run.

A recommendation is taken from records where there are some of that model and machine, and from
arithmetic where there are none; it says which, and what it had to extrapolate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from llmperf import predict, strategies
from llmperf.findings.evidence import gather, label
from llmperf.findings.runs.tables import variant
from llmperf.models import shapes

SLO = {"ttft_ms": 2000.0, "tpot_ms": 100.0}  # MLPerf's for an 8B model
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Option:
    """One way to run the model, with the medians of its records (or predictions)."""

    strategy: str  # with its options
    level: int
    setting: str
    requests_per_s: float
    tokens_per_s: float
    ttft_ms: float | None
    tpot_ms: float | None
    e2el_ms: float | None
    duration_s: float
    memory_bytes: float | None
    dtype: str
    new_tokens: float
    n: int  # records that it rests on; 0: predicted
    notes: tuple[str, ...] = ()
    arriving: bool = False  # measured under requests that arrive over time
    loop: str = "cached"

    @property
    def name(self) -> str:
        """`batch of 8`, `3 processes`, in words."""
        kind = self.strategy.split()[0]
        name = strategies.STRATEGIES[kind].words(self.level, {})
        rest = self.strategy.removeprefix(kind).strip()
        loop = f", {self.loop}" if self.loop != "cached" else ""
        return f"{name}{f' ({rest})' if rest else ''}, {self.dtype}{loop}"


@dataclass(frozen=True)
class Recommendation:
    """The option to run, whether it keeps what was asked, and what that rests on."""

    option: Option
    keeps: bool  # the load and all limits, by its figures
    why: str
    rests_on: str
    extrapolated: tuple[str, ...]
    machines: int  # as many as this carry the load

    def __str__(self) -> str:
        lines = [self.why, self.rests_on]
        lines += [f"Extrapolated: {text}" for text in self.extrapolated]
        return "\n".join(lines)


def options(records: Iterable) -> list[Option]:
    """Every strategy, level and variant of these records as an option; impossible runs left out."""
    found = []
    evidence = gather(records, across=True)
    for setting in (*evidence.settings, *evidence.arriving):
        groups: dict[tuple, list[Mapping]] = {}
        for row in setting.rows:
            if row["metrics"].get("output_tokens_per_s"):
                c = row["condition"]
                groups.setdefault((variant(c), c["level"]), []).append(row)
        found += [_option(*key, setting.name, rows) for key, rows in groups.items()]
    return found


def table(records: Iterable):
    """The options as a DataFrame: seconds, tokens/s, latency a request, memory, records."""
    import pandas as pd

    rows = [
        {
            "strategy": o.strategy,
            "level": o.level,
            "setting": o.setting,
            "time (s)": o.duration_s,
            "tokens/s": o.tokens_per_s,
            "TTFT (ms)": o.ttft_ms,
            "TPOT (ms)": o.tpot_ms,
            "E2EL (ms)": o.e2el_ms,
            "memory (GiB)": None if o.memory_bytes is None else o.memory_bytes / 2**30,
            "runs": o.n,
        }
        for o in options(records)
    ]
    return pd.DataFrame(rows)


def headline(records: Iterable) -> str:
    """The answer in one sentence: what gives the most tokens/s here, against one after another."""
    found = options(records)
    if not found:
        return "Nothing was measured yet."
    best = max(found, key=lambda o: o.tokens_per_s)
    name = best.name[0].upper() + best.name[1:]
    text = f"{name}: the most tokens here, {best.tokens_per_s:.3g} tokens/s"
    alike = [o for o in found if (o.dtype, o.loop) == (best.dtype, best.loop)]
    alone = [o for o in alike if o.strategy == "sequential"] or [o for o in alike if o.level == 1]
    if not alone or best in alone:
        return f"{text}."
    one = max(alone, key=lambda o: o.tokens_per_s)
    return f"{text}, {best.tokens_per_s / one.tokens_per_s:.1f} times one request after another."


def recommend(
    records: Iterable,
    load_per_s: float,
    slo: Mapping[str, float] = SLO,
    *,
    model: str | None = None,
    new_tokens: int | None = None,
    memory_bytes: float | None = None,
) -> Recommendation:
    """For `load_per_s` requests a second within `slo` (ms), the option with the most to spare.

    Of the options that carry the load and keep the limits (and `memory_bytes`), the one of highest
    request rate; of none, the one that keeps the limits at the highest rate, else the fastest.
    `new_tokens` is the length of an answer (default: the longest that was measured): rates of
    records with other lengths are scaled by tokens.
    Raises ValueError when no record is of this model.
    """
    if not load_per_s > 0:
        raise ValueError(f"the load is {load_per_s} requests/s: it must be above 0")
    rows = [r if isinstance(r, Mapping) else vars(r) for r in records]
    found = options(r for r in rows if model in (None, r["condition"].get("model")))
    if not found:
        raise ValueError(f"no record of {model or 'any model'} has a speed: measure it first")
    return choose(found, load_per_s, slo, new_tokens, memory_bytes)


def predicted(model: str, card: str, dtype: str = "fp16", **lengths) -> list[Option]:
    """Batches of a preset on a card of the data sheet, by arithmetic alone: no record at all.

    `lengths`: prompt_tokens (32) and new_tokens (128). Times are bounds, which no run beats.
    """
    shape, known = shapes.preset(model), predict.card(card)
    prompt, new = lengths.get("prompt_tokens", 32), lengths.get("new_tokens", 128)
    quantization = "awq" if "4bits" in model else None
    run = {"dtype": dtype, "quantization": quantization, "prompt_tokens": prompt}
    run |= {"new_tokens": new, "strategy": "batch"}
    fits = predict.largest_batch(shape, int(known.memory_gib * 2**30), **run)
    if not fits.at_best:
        raise ValueError(f"{model} in {dtype} does not fit {known.name}: choose a larger card")
    return [
        _predicted(shape, known, n, run, quantization) for n in BATCHES if n <= max(1, fits.surely)
    ]


def choose(
    found: Sequence[Option],
    load_per_s: float,
    slo: Mapping[str, float] = SLO,
    new_tokens: int | None = None,
    memory_bytes: float | None = None,
) -> Recommendation:
    """The recommendation among these options: see `recommend`."""
    new_tokens = new_tokens or max(o.new_tokens for o in found)
    rates = [o.tokens_per_s / new_tokens for o in found]

    def rank(i: int) -> tuple:
        within = keeps(found[i], slo, memory_bytes)
        return within and rates[i] >= load_per_s, within, rates[i]

    best = max(range(len(found)), key=rank)
    option, rate = found[best], rates[best]
    both, within, _ = rank(best)
    return Recommendation(
        option,
        both,
        _why(option, rate, load_per_s, slo, within),
        _rests_on(option, len(found)),
        tuple(_extrapolated(option, new_tokens)),
        math.ceil(load_per_s / rate),
    )


def keeps(option: Option, slo: Mapping[str, float], memory_bytes: float | None = None) -> bool:
    """Whether its figures are within all limits; one that is not known is not within."""
    for key, limit in slo.items():
        value = getattr(option, key)
        if value is None and key == "tpot_ms" and option.new_tokens == 1:
            continue  # one token has no time between tokens
        if value is None or value > limit:
            return False
    return memory_bytes is None or (option.memory_bytes or math.inf) <= memory_bytes


def _option(strategy: str, level: int, setting: str, rows: Sequence[Mapping]) -> Option:
    def middle(name: str) -> float | None:
        values = (r["metrics"].get(name) for r in rows)
        values = [v.get("median") if isinstance(v, Mapping) else v for v in values]
        known = [v for v in values if v is not None]
        return median(known) if known else None

    tokens, ok = middle("output_tokens"), middle("requests_ok") or level
    speed, seconds = middle("output_tokens_per_s"), middle("duration_s")
    rate = middle("requests_per_s") or speed * ok / tokens
    warned = sorted({w for r in rows for w in r.get("warnings") or []})
    c = rows[0]["condition"]
    latencies = (middle(name) for name in ("ttft_ms", "tpot_ms", "e2el_ms"))
    dtype = c.get("quantization") or c.get("dtype") or "unknown dtype"
    return Option(
        strategy, level, setting, rate, speed, *latencies, seconds, _memory(rows), dtype,
        tokens / ok, len(rows), tuple(warned), bool(c.get("arrivals")), c.get("loop") or "cached",
    )  # fmt: skip


def _memory(rows: Sequence[Mapping]) -> float | None:
    """What the device holds; without one, what the processes hold."""
    for channel in ("device_used", "reserved", "rss"):
        found = [(r.get("memory") or {}).get(channel) or {} for r in rows]
        if values := [f["max"] for f in found if f.get("max") is not None]:
            return max(values)
    return None


def _predicted(shape, card, batch: int, run: Mapping, quantization: str | None) -> Option:
    prompt, new, dtype = run["prompt_tokens"], run["new_tokens"], run["dtype"]
    found = predict.latency(
        shape, dtype, quantization, batch, prompt, prompt + new // 2, predict.card_ceilings(card)
    )
    step, first = found.decode.seconds, found.prefill.seconds
    whole = first + (new - 1) * step
    memory = predict.memory(shape, **{**run, "batch": batch}).high
    tokens = batch * new / whole
    name = label({"model": shape.name, "dtype": dtype, "quantization": quantization, **run})
    return Option(
        "batch", batch, f"{name}, {card.name}", batch / whole, tokens, first * 1e3, step * 1e3,
        whole * 1e3, whole, memory, quantization or dtype, new, 0,
    )  # fmt: skip


def _why(o: Option, rate: float, load: float, slo: Mapping, within: bool) -> str:
    limits = ", ".join(
        f"{key.split('_')[0].upper()} {_ms(getattr(o, key))} (limit {limit:g} ms)"
        for key, limit in slo.items()
    )
    carried = f"it answers {rate:.3g} requests/s for a load of {load:g}"
    if within and rate >= load:
        return f"Run {o.name}: {carried}, with {limits}."
    if within:
        count = math.ceil(load / rate)
        return (
            f"Nothing here carries the load within the limits. Closest: {o.name}: {carried},"
            f" with {limits}; {count} such machines would."
        )
    return f"Nothing here keeps the limits. Fastest: {o.name}: {carried}, with {limits}."


def _ms(value: float | None) -> str:
    return (
        "not measured" if value is None else f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"
    )


def _rests_on(o: Option, among: int) -> str:
    if not o.n:
        return f"Rests on no record, on the data sheet alone ({o.setting}), among {among} options."
    warned = f" Not quiet: {o.notes[0]}." if o.notes else ""
    return f"Rests on {o.n} runs of {o.setting}, among {among} options.{warned}"


def _extrapolated(o: Option, new_tokens: float) -> Iterable[str]:
    if not o.n:
        yield "all of it: a bound from bandwidth and arithmetic, which no run reaches"
    if o.arriving:
        yield "the rate: it answered what arrived, and may carry more"
    else:
        yield "requests came all at once; waiting under an arriving load comes on top"
    if abs(new_tokens - o.new_tokens) > 0.01 * o.new_tokens:
        yield f"the rate, by tokens, from answers of {o.new_tokens:g} to {new_tokens:g} tokens"
    if 0 < o.n < 5:
        yield f"the spread: {o.n} runs give no interval"

"""The check shapes: what rows of one setting say of one check of a claim."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from statistics import median

from llmperf import machine, models, predict, stats, strategies
from llmperf.machine import GIB

HOLDS, FAILS, CANNOT_TELL = "holds", "does not hold", "cannot tell"
LEAST_RANGE = 3  # repeats on each side from which full separation has a chance of at most 1 in 20
GIL = "note_gil_contention"  # the one metric that is taken from runs of kind `watched`
EQUAL_STEPS = 1.25  # memory steps of equal processes; the published ones are rounded to 0.1 GB
Row = Mapping[str, object]


@dataclass(frozen=True)
class Checked:
    """What one setting says of one check. `points_to` judges the bare value, without spread."""

    verdict: str
    points_to: str
    text: str


def ratio(rows: Sequence[Row], check: Mapping, n: int, strict: bool) -> Checked | None:
    """Median of one side over median of the other; of one side alone, its value."""
    a = samples(rows, check["of"], n, check["metric"])
    b = samples(rows, check["to"], n, check["metric"]) if "to" in check else [1.0] * len(a)
    if not a or not b:
        return None
    if check.get("exact"):
        grown = max(a) / max(b)
        return _against_limits(grown, grown, grown, "bytes", check=check, n=n)
    floor = check.get("floor", 0.0)
    a, b = ([max(x, floor) for x in side] for side in (a, b))
    return _against_limits(*_quotient(a, b), check=check, n=n) if min(*a, *b) > 0 else None


def steps(rows: Sequence[Row], check: Mapping, n: int, strict: bool) -> Checked | None:
    """Each further process takes equal memory, at least its weights; the first takes even more."""
    names = [check["metric"]] if strict else [check["metric"], check["instead"]]
    for metric in names:
        used = {k: samples(rows, {**check["of"], "level": k}, n, metric) for k in range(1, n + 1)}
        used = {k: median(values) for k, values in used.items() if values}
        if len(used) > (2 if strict else 1) and 1 in used:
            break
    else:
        return None
    sizes = [(used[b] - used[a]) / (b - a) for a, b in pairwise(sorted(used))]
    weights = next((r["weights_bytes"] for r in rows if r.get("weights_bytes")), 0)
    idle = samples(rows, {**check["of"], "level": 1}, n, check["idle"])
    first = used[1] - min(idle) if idle and metric == check["metric"] else None
    grows = min(sizes) >= 0.95 * weights
    points_to = HOLDS if grows and (first is None or first > 1.05 * max(sizes)) else FAILS
    even = max(sizes) <= EQUAL_STEPS * max(min(sizes), 1)
    verdict = points_to if even and (first is not None or not grows) else CANNOT_TELL
    text = f"each further process takes {', '.join(f'{x / GIB:.2f}' for x in sizes)} GiB"
    text += f", the weights are {weights / GIB:.2f}" if weights else ""
    known = "; what the first takes alone was not measured (it needs what was in use before it)"
    text += f"; the first takes {first / GIB:.2f}" if first is not None else known
    text += "" if even else "; unequal steps say nothing of one process"
    return Checked(verdict, points_to, text)


def fits(rows: Sequence[Row], check: Mapping, n: int, strict: bool) -> Checked | None:
    """The largest batch that ran against the predicted one; `rows` hold runs out of memory too."""
    ours = [r for r in rows if r["strategy"] == check["of"]["strategy"]]
    beyond = min((r["level"] for r in ours if r["status"] == "oom"), default=0)
    ran = max((r["level"] for r in ours if r["status"] == "ok" and r["level"] < beyond), default=0)
    first = next((r for r in ours if r.get("card_bytes")), None)
    if not ran or first is None:
        return None
    try:
        spec = predict.RunSpec(
            models.shape_of(str(first["model"])),
            first["dtype"],
            first.get("quantization"),
            prompt_tokens=int(first["prompt_tokens"]),
            new_tokens=int(first["new_tokens"]),
            loop=first.get("loop", "cached"),
            platform=machine.platform_word("cuda", str(first["os"])),
        )
        free = int(first["card_bytes"] - first.get("card_used_bytes", 0))
        budget = predict.budget(spec.platform, free, int(first["card_bytes"]))
    except (ValueError, KeyError):  # no preset's model, several lengths, or a card in use
        return None
    largest = predict.largest(spec, "rows", budget, idle_bytes=0)
    verdict = HOLDS if 0.9 * ran <= largest.at_best and largest.surely <= 1.1 * beyond else FAILS
    text = (
        f"batch {ran} ran and {beyond} did not; predicted {largest.surely} surely,"
        f" {largest.at_best} at best, in {budget / GIB:.1f} GiB"
    )
    return Checked(verdict, verdict, text)


SHAPES = {"ratio": ratio, "steps": steps, "fits": fits}


def samples(rows: Sequence[Row], side: Mapping | Sequence, n: int, metric: str) -> list[float]:
    """One value a run; of several sides, those of the first that was measured."""
    for s in [side] if isinstance(side, Mapping) else side:
        level = s.get("level", n)
        found = [
            r
            for r in rows
            if r["strategy"] == s["strategy"]
            and r["level"] == level
            and ("os" not in s or r["os"] == s["os"])
            and ("loop" not in s or r.get("loop", "cached") in s["loop"])
            # Ten requests through two workers say nothing of ten workers, unless they arrive.
            and (r.get("arrivals") or r.get("option_workers", level) == level)
            and (r.get("kind") != "watched" or metric == GIL)  # gilknocker slows the run down
        ]
        scale, name = n if "times" in s else 1, s.get("metric", metric)
        nearest = _nearest_variant(found, s.get("options", {}))
        values = [r[name] * scale for r in nearest if name in r]
        if values:
            return values
    return []


def _nearest_variant(rows: Sequence[Row], wanted: Mapping) -> list[Row]:
    """The rows of the variant with the wanted options that is else nearest to the defaults."""
    variants: dict[tuple, list[Row]] = {}
    defaults = strategies.STRATEGIES[rows[0]["strategy"]].defaults if rows else {}
    for r in rows:
        given = {k.removeprefix("option_"): v for k, v in r.items() if k.startswith("option_")}
        if all(given.get(k, defaults.get(k)) == v for k, v in wanted.items()):
            further = given.keys() - wanted.keys() - {"intra_op"}
            changed = sum(given[k] != defaults.get(k) for k in further)
            # torch gives an operator all cores, so the largest number is the default
            place = (changed, -given.get("intra_op", 0), r["variant"])
            variants.setdefault(place, []).append(r)
    return variants[min(variants)] if variants else []


def _quotient(a: Sequence[float], b: Sequence[float]) -> tuple:
    """(median(a) / median(b), low, high, basis): the interval from 5 repeats on, the range of all
    pairs from 3, below only the value."""
    found = stats.ratio_interval(a, b)
    if found.low is not None:
        return found.value, found.low, found.high, f"{stats.confidence(found.n)} interval"
    if found.n >= LEAST_RANGE:
        low, high = min(a) / max(b), max(a) / min(b)
        return found.value, low, high, f"range of {found.n} repeats, no interval"
    return found.value, None, None, f"{found.n} repeat{'s' * (found.n > 1)}, no interval"


def _against_limits(
    value: float, low: float | None, high: float | None, basis: str, check: Mapping, n: int
) -> Checked:
    """A value with its interval against the limits of a check; `outside`: it must lie beyond."""
    least, most = check.get("least", -inf), check.get("most", inf)
    inside, outside = (HOLDS, FAILS) if not check.get("outside") else (FAILS, HOLDS)
    points_to = inside if least <= value <= most else outside
    verdict = CANNOT_TELL
    if low is not None and least <= low and high <= most:
        verdict = inside
    elif low is not None and (high < least or low > most):
        verdict = outside
    claimed = f"{least:g} to {most:g}" if least > -inf else f"at most {most:g}"
    claimed = f"at least {least:g}" if most == inf else claimed
    claimed = "outside " * bool(check.get("outside")) + claimed
    span = machine.significant(value)
    if low is not None and low != high:
        span += f" [{machine.significant(low)}, {machine.significant(high)}]"
    text = f"{check['says'].format(x=span, n=n)} (claimed: {claimed}; {basis})"
    return Checked(verdict, points_to, text)
